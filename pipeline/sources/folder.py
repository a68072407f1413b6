"""Source ``folder``: class folders of pictures, with or without split folders, and flat splits with a label file.

``INPUT/{train,val,test}/CLASS/*`` keeps its splits; ``INPUT/CLASS/*`` is split by a seed, class by class. What a file
is, its name tells where it ends as pictures do, else its content. Folders inside a class folder belong to the class.
"""

import dataclasses
import errno
import itertools
import os
from collections.abc import Iterable, Iterator

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, ImageError, SourceError
from pipeline.files import AnyPath, UrlPath, relative_to
from pipeline.manifest import ClassRecord
from pipeline.sources import reasons
from pipeline.sources.labels import Labels, read_labels
from pipeline.sources.layout import ALL, Layout, Part, find_layout, refuse_flat
from pipeline.sources.listing import Item, Listing, Source, SplitListing, Tally, nfc, printable
from pipeline.sources.walk import Walker, join, shown
from twotower.untrusted import read_regular

Row = tuple[str, str, int]  # class, path relative to the root, size in bytes


@dataclasses.dataclass(frozen=True)
class FolderSource(Source):
    """Images in class folders.

    Attributes:
        root: the input folder.
        val_fraction: share of every class for ``val`` where the folder has no splits.
        seed: seed of that split.
        labels: file with the classes of pictures that lie in no class folders; None without one.
        splits: the splits that are wanted; empty for all.
        follow_links: links that lead out of the folder are followed.
    """

    root: AnyPath
    val_fraction: float
    seed: int
    labels: AnyPath | None = None
    splits: tuple[str, ...] = ()
    follow_links: bool = False

    def listing(self) -> Listing:
        """Lists the pictures, split by split, in the order of their names' bytes, and counts the other files."""
        if not self.root.is_dir():
            raise SourceError(f"--input {self.root}: no such folder")
        skip = [] if self.labels is None else _below(self.root, self.labels)
        layout = find_layout(Walker(self.root, Tally(), skip, follow_links=self.follow_links))
        walker = Walker(self.root, Tally(), skip, follow_links=self.follow_links)
        warnings = _count_beside(walker, layout)
        found = {
            part.split: self._class_rows(walker, part, warnings) for part in layout.parts if part.classes_at is not None
        }
        found |= self._flat_rows(walker, layout, found)
        found = self._not_empty(found)
        classes = sorted({name for rows in found.values() for name, _, _ in rows}, key=os.fsencode)
        label_of = {name: label for label, name in enumerate(classes)}
        splits = {
            split: SplitListing.of([Item(path, label_of[name], path, 0, size) for name, path, size in rows])
            for split, rows in found.items()
        }
        if set(splits) == {ALL}:
            splits = splits[ALL].train_and_val(self.val_fraction, self.seed, warnings)
        return Listing(
            classes=tuple(ClassRecord(name=name, title=name) for name in classes),
            label_order="alphabetical",
            splits=splits,
            encoded=True,
            channels=3,
            passed_over=walker.tally.records(),
            warnings=(*walker.warnings, *warnings, *_case_warnings(classes)),
        )

    def read(self, item: Item) -> bytes:
        """The file's bytes."""
        return read_file(self.root, item)

    def _class_rows(self, walker: Walker, part: Part, warnings: list[str]) -> list[Row]:
        """The pictures of a split's class folders; appends to ``warnings`` what is odd about those."""
        assert part.classes_at is not None
        rows: list[Row] = []
        folder_of: dict[str, str] = {}
        empty, deep = [], []
        for entry in _class_folders(walker, part, part.classes_at):
            name, before = nfc(printable(entry)), len(rows)
            rows += [(name, path, size) for path, size in walker.pictures(join(part.classes_at, entry), part.tag)]
            if len(rows) == before:
                empty.append(name)
                continue
            if _only_in_folders(join(part.classes_at, entry), rows[before:]):
                deep.append(name)
            if folder_of.setdefault(name, entry) != entry:
                warnings.append(
                    f"{self.root / part.classes_at}: two folders are one class: their names, {folder_of[name]!a} "
                    f"and {entry!a}, are the same in Unicode's form NFC"
                )
        _refuse_flat_beside(walker, part.classes_at, len(rows))
        if empty and rows:
            warnings.append(f"{self.root / part.classes_at}: folders without a picture: {shown(empty)}")
        if deep:
            warnings.append(
                f"{self.root / part.classes_at}: all pictures of {shown(deep)} lie in sub-folders, and all sub-folders "
                "of a class are that class"
            )
        return sorted(rows, key=lambda row: os.fsencode(row[1]))

    def _flat_rows(self, walker: Walker, layout: Layout, found: dict[str, list[Row]]) -> dict[str, list[Row]]:
        """The pictures of the splits without class folders, with the label file's classes."""
        pictures: dict[str, list[tuple[str, int]]] = {}
        for part in layout.parts:
            if part.classes_at is None and self._is_wanted(part.split):
                pictures[part.split] = list(walker.pictures(part.folder, part.tag))
            elif part.classes_at is None:
                inside = walker.contents(part.folder, part.tag)
                walker.pass_over(part.folder, inside.files + inside.folders, reasons.NOT_CHOSEN, part.tag)
        if self.labels is None:
            counts = {part: num for part in layout.parts if (num := len(pictures.get(part.split, ())))}
            if counts:
                refuse_flat(walker, counts, [split for split in found if found[split]])
            return {split: [] for split in pictures}
        if not any(pictures.values()):
            raise ConfigError(f"--labels {self.labels}: no split needs it, all pictures lie in class folders")
        labels = read_labels(self.labels, (path for rows in pictures.values() for path, _ in rows))
        if "train" not in pictures:
            self._check_labels(labels, {row[0] for row in found.get("train", itertools.chain(*found.values()))})
        for name in labels.unused:
            walker.tally.add(reasons.NO_IMAGE, name)
        return {split: self._labelled(walker, split, rows, labels) for split, rows in pictures.items()}

    def _is_wanted(self, split: str) -> bool:
        return not self.splits or split in self.splits or split == ALL

    def _labelled(self, walker: Walker, split: str, pictures: list[tuple[str, int]], labels: Labels) -> list[Row]:
        """Puts the labels to a split's pictures; those without are counted."""
        rows = []
        for path, size in sorted(pictures, key=lambda row: os.fsencode(row[0])):
            if path in labels.label_of:
                rows.append((printable(labels.label_of[path]), path, size))
            else:
                walker.tally.add(reasons.NO_LABEL, path, split="" if split == ALL else split)
        if pictures and not rows:
            raise SourceError(
                f"{self.labels}: labels none of the {len(pictures):,} pictures of {split}; leave it out with --splits"
            )
        return rows

    def _check_labels(self, labels: Labels, classes: set[str]) -> None:
        """Refuses a label that is no class folder's.

        Raises:
            SourceError: there is one.
        """
        unknown = {label: line for label, line in labels.line_of.items() if printable(label) not in classes}
        if classes and unknown:
            label, line = next(iter(unknown.items()))
            raise SourceError(
                f"{self.labels}, line {line}: {printable(label)!r} is not one of the {len(classes):,} class folders "
                f"({shown(sorted(classes))})"
            )

    def _not_empty(self, found: dict[str, list[Row]]) -> dict[str, list[Row]]:
        """The splits, none of them empty.

        Raises:
            SourceError: one is.
        """
        if not any(found.values()):
            raise SourceError(
                f"{self.root}: no class folders with pictures; expected INPUT/CLASS/* or INPUT/train/CLASS/*"
            )
        for split, rows in found.items():
            if not rows and self._is_wanted(split):
                others = ",".join(sorted(other for other in found if found[other]))
                raise SourceError(
                    f"{self.root}: the folder of {split} holds no picture; fill it, remove it, or --splits {others}"
                )
        return {split: rows for split, rows in found.items() if rows}


def from_options(options: PrepareOptions) -> FolderSource:
    """Makes the source.

    Raises:
        ConfigError: no input was given.
    """
    if options.input is None:
        raise ConfigError("--source folder needs --input FOLDER")
    return FolderSource(
        root=options.input.absolute(),
        val_fraction=options.val_fraction,
        seed=options.seed,
        labels=None if options.labels is None else options.labels.absolute(),
        splits=options.splits,
        follow_links=options.follow_links,
    )


def read_file(root: AnyPath, item: Item) -> bytes:
    """Reads an image that is a file of its own, and no more of it than was listed.

    Raises:
        ImageError: this file cannot be read.
        SourceError: the whole input is gone.
    """
    try:
        path = root / item.file
        return path.read_bytes() if isinstance(path, UrlPath) else read_regular(path, item.size)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise ImageError("is larger than when it was listed") from None
        if not root.is_dir():
            raise SourceError(f"{root}: the input folder is gone, or not on this machine") from None
        raise ImageError(f"cannot be read: {error.strerror}") from None


def _count_beside(walker: Walker, layout: Layout) -> list[str]:
    """Counts what lies beside the splits and above them; returns warnings."""
    part_folders = {part.folder for part in layout.parts}
    if part_folders == {""}:
        return []  # no splits: their only part counts from the root on
    for folder in _path_down("", layout.base):
        found = walker.contents(folder)
        for entry in found.files:
            walker.tally.add(reasons.BESIDE, join(folder, entry.name))
        others = [entry for entry in found.folders if not _leads_to(join(folder, entry.name), part_folders)]
        walker.pass_over(folder, others, reasons.UNKNOWN_SPLIT)
    if not layout.others:
        return []
    return [f"{walker.root / layout.base}: folders beside the splits are passed over: {shown(layout.others)}"]


def _class_folders(walker: Walker, part: Part, classes_at: str) -> Iterator[str]:
    """Yields the names of the class folders; counts the files beside them and beside the folders that wrap them."""
    for folder in _path_down(part.folder, classes_at):
        found = walker.contents(folder, part.tag)
        for entry in found.files:
            walker.tally.add(reasons.BESIDE, join(folder, entry.name), split=part.tag)
        for entry in found.folders:
            if folder == classes_at:
                yield entry.name
            elif not _leads_to(join(folder, entry.name), {classes_at}):
                walker.pass_over(folder, [entry], reasons.BESIDE, part.tag)


def _only_in_folders(folder: str, rows: list[Row]) -> bool:
    """Tells whether a class's pictures lie in several folders of ``folder`` alone, which were perhaps the classes."""
    start = len(folder) + 1
    if "/" not in rows[0][1][start:]:
        return False  # as usual: pictures of the folder itself come first
    return len({path[start:].partition("/")[0] for _, path, _ in rows}) > 1


def _refuse_flat_beside(walker: Walker, folder: str, num_in_classes: int) -> None:
    """Refuses where most pictures lie beside the class folders, which are then perhaps none.

    Raises:
        SourceError: they do.
    """
    looker = Walker(walker.root, Tally(), follow_links=walker.follow_links)
    num_beside = sum(1 for _ in looker.pictures_of(folder, looker.contents(folder).files))
    if num_beside > num_in_classes:
        raise SourceError(
            f"{walker.root / folder}: {num_beside:,} pictures lie beside the class folders, which hold "
            f"{num_in_classes:,}: put them into class folders, or take them or the folders away"
        )


def _path_down(top: str, bottom: str) -> list[str]:
    """The folders from ``top`` down to ``bottom``, both among them."""
    names = bottom.removeprefix(top).strip("/").split("/") if bottom != top else []
    return list(itertools.accumulate(names, join, initial=top))


def _leads_to(path: str, folders: set[str]) -> bool:
    return any(folder == path or folder.startswith(f"{path}/") for folder in folders)


def _below(root: AnyPath, file: AnyPath) -> list[str]:
    """The path of ``file`` relative to the root, if it lies there."""
    inside = str(file).startswith(f"{str(root).rstrip('/')}/")
    return [str(relative_to(file, root))] if inside else []


def _case_warnings(classes: Iterable[str]) -> Iterator[str]:
    """Names of classes that differ in case only: perhaps one class in two spellings."""
    spellings: dict[str, list[str]] = {}
    for name in classes:
        spellings.setdefault(name.casefold(), []).append(name)
    for names in spellings.values():
        if len(names) > 1:
            yield f"classes whose names differ in case only stay apart: {shown(names)}"
