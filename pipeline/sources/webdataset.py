"""Source ``webdataset``: tars that others wrote, to be shuffled, resized and indexed anew.

A sample is what shares a key; it needs an image (jpg, jpeg, png) and a label (``cls``, a number as text). Splits are
the folders ``train``, ``val``, ``test``, or those words in the tars' names; tars without either are split by a seed.
Nothing else in the tars is read: no pickles, no ``pipe:`` addresses.
"""

import dataclasses
import os
from collections.abc import Iterator

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, DatasetError, SourceError
from pipeline.files import AnyPath, read_range, relative_to
from pipeline.manifest import MANIFEST_NAME, ClassRecord, from_json
from pipeline.sources.listing import Item, Listing, Source, SplitListing
from pipeline.sources.split import SPLIT_FOLDERS, SPLIT_WORD
from pipeline.sources.tar_reader import TarMember, group_samples, walk_file

IMAGES = ("jpg", "jpeg", "png")
CLASS_FILES = ("classnames.txt", "classes.txt")


@dataclasses.dataclass(frozen=True)
class WebdatasetSource(Source):
    """Samples in tars.

    Attributes:
        root: folder of the tars.
        val_fraction: share of every class for ``val`` where the tars have no splits.
        seed: seed of that split.
    """

    root: AnyPath
    val_fraction: float
    seed: int

    def listing(self) -> Listing:
        """Reads every header and label."""
        found: dict[str, list[Item]] = {}
        for path in self._tars():
            found.setdefault(self._split_of(path), []).extend(_items(self.root, path))
        labels = {item.label for items in found.values() for item in items}
        if not labels:
            raise SourceError(f"{self.root}: the tars hold no samples")
        splits = {split: SplitListing.of(items) for split, items in found.items() if items}
        if "all" in splits:
            if len(splits) > 1:
                raise SourceError(f"{self.root}: some tars name their split and some do not")
            splits = splits["all"].train_and_val(self.val_fraction, self.seed)
        return Listing(self._classes(max(labels) + 1), "source", splits, encoded=True, channels=3)

    def read(self, item: Item) -> bytes:
        """The image's bytes."""
        return read_range(self.root / item.file, item.offset, item.size)

    def _tars(self) -> list[AnyPath]:
        if not self.root.is_dir():
            raise SourceError(f"--input {self.root}: no such folder")
        found: list[AnyPath] = sorted(self.root.rglob("*.tar"), key=lambda path: os.fsencode(str(path)))
        if not found:
            raise SourceError(f"{self.root}: no .tar files here")
        return found

    def _split_of(self, path: AnyPath) -> str:
        for part in reversed(relative_to(path, self.root).parts):
            found = SPLIT_WORD.search(part.lower())
            if found:
                return SPLIT_FOLDERS[found.group(1)]
        return "all"

    def _classes(self, count: int) -> tuple[ClassRecord, ...]:
        """The class table: one of ours, a file of names, or the numbers."""
        if (self.root / MANIFEST_NAME).is_file():
            try:
                return from_json((self.root / MANIFEST_NAME).read_bytes()).classes
            except DatasetError as error:
                raise SourceError(f"{self.root}: {error}") from None
        for name in CLASS_FILES:
            if (self.root / name).is_file():
                lines = (self.root / name).read_text(encoding="utf-8").splitlines()
                if len(lines) < count:
                    raise SourceError(f"{self.root / name}: {len(lines)} names for labels 0 to {count - 1}")
                return tuple(ClassRecord(line.strip(), line.strip()) for line in lines)
        return tuple(ClassRecord(str(label), str(label)) for label in range(count))


def from_options(options: PrepareOptions) -> WebdatasetSource:
    """Makes the source.

    Raises:
        ConfigError: no input was given.
    """
    if options.input is None:
        raise ConfigError("--source webdataset needs --input FOLDER with .tar files")
    return WebdatasetSource(root=options.input.absolute(), val_fraction=options.val_fraction, seed=options.seed)


def _items(root: AnyPath, path: AnyPath) -> Iterator[Item]:
    """The images of a tar with their labels, each sample of it being an image and a label."""
    name = relative_to(path, root).as_posix()
    passed_over: list[TarMember] = []
    for sample in group_samples(walk_file(path), passed_over):
        members = {member.extension.lower(): member for member in sample.members}
        image = next((members[extension] for extension in IMAGES if extension in members), None)
        if image is None or "cls" not in members:
            raise SourceError(f"{path}: sample {sample.key} has {', '.join(members)}; expected an image and cls")
        text = read_range(path, members["cls"].offset, min(members["cls"].size, 32)).strip()
        if not text.isdigit() or len(text) > 9:
            raise SourceError(f"{path}: sample {sample.key}: its cls is {text[:20]!r} instead of a label number")
        yield Item(f"{name}/{image.name}", int(text), name, image.offset, image.size)
    if passed_over:
        raise SourceError(f"{path}: {passed_over[0].name} belongs to no sample; expected KEY.jpg and KEY.cls")
