"""Source ``webdataset``: tars that others wrote, to be shuffled, resized and indexed anew.

A sample is what shares a key; it needs a picture (jpg, jpeg, png) and a label (``cls``, a number as text). Splits are
the folders ``train``, ``val``, ``test``, or those words in the tars' names; tars without either are split by a seed.
Nothing else in the tars is read: no pickles, no ``pipe:`` addresses.
"""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, DatasetError, SourceError
from pipeline.files import Place, below, tars
from pipeline.manifest import MANIFEST_NAME, ClassRecord, from_json
from pipeline.sources import Item, Listing, SplitListing
from pipeline.sources.folder import SPLIT_FOLDERS
from pipeline.sources.split import stratified
from pipeline.sources.tar_reader import ArchiveMember, read_range, reader, walk_tar

PICTURES = ("jpg", "jpeg", "png")
CLASS_FILES = ("classnames.txt", "classes.txt")
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLIT_FOLDERS, key=len, reverse=True))})(?![a-z])")

Row = tuple[int, str, str, int, int]  # label, name, file, offset, size


@dataclasses.dataclass(frozen=True)
class WebdatasetSource:
    """Samples in tars.

    Attributes:
        root: folder of the tars.
        val_fraction: share of every class for ``val`` where the tars have no splits.
        seed: seed of that split.
    """

    root: Place
    val_fraction: float
    seed: int

    def listing(self) -> Listing:
        """Reads every header and label."""
        rows: dict[str, list[Row]] = {}
        for path in self._tars():
            rows.setdefault(self._split_of(path), []).extend(_rows(self.root, path))
        labels = {row[0] for split in rows.values() for row in split}
        if not labels:
            raise SourceError(f"{self.root}: the tars hold no samples")
        splits = {split: _listing(found) for split, found in rows.items() if found}
        if "all" in splits:
            if len(splits) > 1:
                raise SourceError(f"{self.root}: some tars name their split and some do not")
            chosen = stratified(splits["all"].labels, self.val_fraction, seed=self.seed)
            parts = {"train": np.flatnonzero(~chosen), "val": np.flatnonzero(chosen)}
            splits = {split: splits["all"].take(part) for split, part in parts.items() if len(part)}
        return Listing(self._classes(max(labels) + 1), "source", splits, encoded=True, channels=3)

    def checksums(self) -> dict[Place, str]:
        """There are none."""
        raise SourceError("--verify-source: source webdataset has no published checksums")

    def read(self, item: Item) -> bytes:
        """The picture's bytes."""
        return read_range(self.root / item.file, item.offset, item.size)

    def _tars(self) -> list[Place]:
        if not self.root.is_dir():
            raise SourceError(f"--input {self.root}: no such folder")
        found = tars(self.root)
        if not found:
            raise SourceError(f"{self.root}: no .tar files here")
        return found

    def _split_of(self, path: Place) -> str:
        for part in reversed(below(self.root, path).parts):
            found = SPLIT_WORD.search(part.lower())
            if found:
                return SPLIT_FOLDERS[found.group(1)]
        return "all"

    def _classes(self, count: int) -> tuple[ClassRecord, ...]:
        """The class table: one of ours, a file of names, or the numbers."""
        if (self.root / MANIFEST_NAME).is_file():
            try:
                return from_json((self.root / MANIFEST_NAME).read_text(encoding="utf-8")).classes
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


def _rows(root: Place, path: Place) -> Iterator[Row]:
    for key, members in _samples(path):
        picture = next((members[name] for name in PICTURES if name in members), None)
        if picture is None or "cls" not in members:
            raise SourceError(f"{path}: sample {key} has {', '.join(members)}; expected a picture and cls")
        text = read_range(path, members["cls"].offset, min(members["cls"].size, 32)).strip()
        if not text.isdigit() or len(text) > 9:
            raise SourceError(f"{path}: sample {key}: its cls is {text[:20]!r} instead of a label number")
        name = below(root, path).as_posix()
        yield int(text), f"{name}/{picture.name}", name, picture.offset, picture.size


def _samples(path: Place) -> Iterator[tuple[str, dict[str, ArchiveMember]]]:
    """Groups members by key: the name up to the first dot of its last part."""
    key, members = None, {}
    for member in walk_tar(reader(path), 0, path.stat().st_size, str(path)):
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        found = f"{folder}/{stem}"
        if key is not None and found != key:
            yield key, members
            members = {}
        key = found
        members[extension.lower()] = member
    if key is not None:
        yield key, members


def _listing(rows: list[Row]) -> SplitListing:
    files = sorted({row[2] for row in rows})
    file_of = {name: number for number, name in enumerate(files)}
    return SplitListing(
        names=[row[1] for row in rows],
        labels=np.array([row[0] for row in rows], np.int32),
        files=files,
        file_of=np.array([file_of[row[2]] for row in rows], np.int32),
        offsets=np.array([row[3] for row in rows], np.int64),
        sizes=np.array([row[4] for row in rows], np.int64),
    )
