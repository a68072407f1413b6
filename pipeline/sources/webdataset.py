"""Source ``webdataset``: tars that others wrote, to be shuffled, resized and indexed anew.

A sample is what shares a key; it needs an image (jpg, png, webp, ...) and a label (``cls``, a number as text). Splits
are the folders ``train``, ``val``, ``test``, or those words in the tars' names; tars without either are split by a
seed. Nothing else in the tars is read: no pickles, no ``pipe:`` addresses.
"""

import dataclasses
import os
from collections.abc import Iterable

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, DatasetError, SourceError
from pipeline.files import AnyPath, read_range, read_whole
from pipeline.manifest import MANIFEST_NAME, ClassRecord, from_json
from pipeline.sources import reasons
from pipeline.sources.listing import Item, Listing, Source, SplitListing, Tally, printable
from pipeline.sources.samples import EXPECTED, LabelTexts, labeled_images
from pipeline.sources.split import SPLIT_FOLDERS, SPLIT_WORD, apart_by_split, split_of
from pipeline.sources.tar_reader import COMPRESSED_NAME
from pipeline.sources.walk import Walker, check_link, join, shown
from twotower.untrusted import MAX_JSON_BYTES
from twotower.words import one_line

CLASS_FILES = ("classnames.txt", "classes.txt")
ALL = ""  # the split of tars whose names tell none


@dataclasses.dataclass(frozen=True)
class WebdatasetSource(Source):
    """Samples in tars.

    Attributes:
        root: folder of the tars.
        val_fraction: share of every class for ``val`` where the tars have no splits.
        seed: seed of that split.
        splits: the splits that are wanted; empty for all.
        follow_links: links that lead out of the folder are followed.
    """

    root: AnyPath
    val_fraction: float
    seed: int
    splits: tuple[str, ...] = ()
    follow_links: bool = False

    def listing(self) -> Listing:
        """Reads every header and label."""
        if not self.root.is_dir():
            raise SourceError(f"--input {self.root}: no such folder")
        walker = Walker(self.root, Tally(), (MANIFEST_NAME, *CLASS_FILES), follow_links=self.follow_links)
        texts = LabelTexts()
        found: dict[str, list[Item]] = {}
        for name in self._tars(walker):
            split = _split_of(self.root, name)
            images = list(labeled_images(self.root / name, name, texts, walker.tally, split))
            if not images:
                walker.tally.add(reasons.EMPTY_TAR, name, split=split)
            found.setdefault(split, []).extend(images)
        found = self._with_samples(found)
        classes, row_of = self._class_table(texts)
        splits = {
            split: SplitListing.of([image._replace(label=row_of[image.label]) for image in images])
            for split, images in found.items()
        }
        few: list[str] = []
        if ALL in splits:
            splits = splits[ALL].train_and_val(self.val_fraction, self.seed, few)
        return Listing(
            classes,
            "source",
            splits,
            encoded=True,
            channels=3,
            passed_over=walker.tally.records(),
            warnings=(*walker.warnings, *_renumbered(row_of), *few),
        )

    def read(self, item: Item) -> bytes:
        """The image's bytes."""
        return read_range(self.root / item.file, item.offset, item.size)

    def _tars(self, walker: Walker) -> list[str]:
        """The tars, relative to the root, in the order of their names' bytes; the other files are counted.

        Raises:
            SourceError: there are none, or compressed ones, which nobody may think were read, or it is unclear which
                splits they are of.
        """
        found, compressed = list[str](), list[str]()
        for folder, files in walker.below("", mixed=True):
            tars = [entry for entry in files if entry.name.lower().endswith(".tar")]
            found += [join(folder, entry.name) for entry in tars]
            compressed += [join(folder, entry.name) for entry in files if COMPRESSED_NAME.fullmatch(entry.name)]
            walker.pass_over(folder, [entry for entry in files if entry not in tars], reasons.NOT_READ)
        if compressed:
            raise SourceError(
                f"{self.root}: {one_line(printable(min(compressed)))} is compressed ({len(compressed):,} such files): "
                "tars are read in place, by byte ranges, so unpack it (gunzip, unzstd, unxz, bunzip2) or take it away"
            )
        if not found:
            raise SourceError(f"{self.root}: no .tar files here")
        apart = apart_by_split(sorted(name for name in found if _split_of(self.root, name) == ALL))
        if apart:
            raise SourceError(
                f"{self.root}: {one_line(shown(apart))} look like splits: name the split in a word of its own "
                "(train-NAME.tar)"
            )
        return sorted(found, key=os.fsencode)

    def _with_samples(self, found: dict[str, list[Item]]) -> dict[str, list[Item]]:
        """The splits that hold samples.

        Raises:
            SourceError: one that is wanted does not, or only some tars name their split.
        """
        filled = {split: images for split, images in found.items() if images}
        if ALL in filled and len(filled) > 1:
            raise SourceError(
                f"{self.root}: some tars name their split and some do not: name it in all (train-NAME.tar), or in none"
            )
        for split in sorted(found.keys() - filled.keys()):
            if not filled or (split != ALL and (not self.splits or split in self.splits)):
                raise SourceError(f"{self.root}: the tars{f' of {split}' * bool(split)} hold no samples: {EXPECTED}")
        return filled

    def _class_table(self, texts: LabelTexts) -> tuple[tuple[ClassRecord, ...], dict[int, int]]:
        """The class table (one of ours, a file of names, or the labels that exist) and the row of each label."""
        named = self._named_classes()
        if named is None:
            labels = sorted(texts.text_of)
            classes = tuple(ClassRecord(texts.text_of[label], texts.text_of[label]) for label in labels)
            return classes, {label: row for row, label in enumerate(labels)}
        classes, where = named
        if max(texts.text_of) >= len(classes):
            raise SourceError(
                f"{where}: {len(classes):,} names, for labels 0 to {len(classes) - 1:,}, and a sample has label "
                f"{max(texts.text_of):,}: line N names label N - 1; without such a file the labels are the names"
            )
        return classes, {label: label for label in texts.text_of}

    def _named_classes(self) -> tuple[tuple[ClassRecord, ...], AnyPath] | None:
        """The classes that a manifest or a file of names lists, and that file.

        Raises:
            SourceError: it cannot be read.
        """
        path = self.root / MANIFEST_NAME
        for name in (MANIFEST_NAME, *CLASS_FILES):
            check_link(self.root, name, follow_links=self.follow_links)
        if path.is_file():
            try:
                return from_json(_read_text(path)).classes, path
            except DatasetError as error:
                raise SourceError(f"{self.root}: {error}; if another program wrote it, take it away") from None
        for path in (self.root / name for name in CLASS_FILES):
            if path.is_file():
                return _read_names(path), path
        return None


def from_options(options: PrepareOptions) -> WebdatasetSource:
    """Makes the source.

    Raises:
        ConfigError: no input was given.
    """
    if options.input is None:
        raise ConfigError("--source webdataset needs --input FOLDER with .tar files")
    return WebdatasetSource(
        options.input.absolute(), options.val_fraction, options.seed, options.splits, options.follow_links
    )


def _split_of(root: AnyPath, name: str) -> str:
    """The split that a tar's name tells, or else the folder nearest to it.

    Raises:
        SourceError: it tells two, or another one than a folder that is named as a split.
    """
    parts = name.split("/")
    folders = {split for folder in parts[:-1] if (split := split_of(folder))}
    for part in reversed(parts):
        found = {SPLIT_FOLDERS[word] for word in SPLIT_WORD.findall(part.lower())}
        if len(found) > 1 or (found and folders - found):
            both = " and ".join(sorted(found | folders))
            raise SourceError(
                f"{root}: {one_line(printable(name))} names two splits, {both}: rename it so that it names one"
            )
        if found:
            return found.pop()
    return ALL


def _read_text(path: AnyPath) -> bytes:
    try:
        return read_whole(path, MAX_JSON_BYTES)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_names(path: AnyPath) -> tuple[ClassRecord, ...]:
    """A file of class names, a line each."""
    try:
        lines = _read_text(path).decode("utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise SourceError(f"{path}: is not UTF-8: expected a class name on each line") from None
    names = [line.strip() for line in lines]
    if "" in names:
        raise SourceError(f"{path}: line {names.index('') + 1} is empty: line N names label N - 1")
    return tuple(ClassRecord(name, name) for name in names)


def _renumbered(row_of: dict[int, int]) -> Iterable[str]:
    """What is to be said where labels are not 0..N-1."""
    if any(label != row for label, row in row_of.items()):
        first, last = min(row_of), max(row_of)
        yield (
            f"the labels are {len(row_of):,} numbers from {first:,} to {last:,}: they are rows 0 to "
            f"{len(row_of) - 1:,} of the class table, each named as it was"
        )
