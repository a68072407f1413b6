"""What a source tells: its images in columns, the class table, and how single images are read."""

import dataclasses
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.errors import SourceError
from pipeline.files import AnyPath
from pipeline.manifest import ClassRecord, PassedOver
from pipeline.sources.split import stratified
from twotower.words import pluralize

EXAMPLES = 3  # names kept of the files passed over for one reason
CHUNK = 65536  # names hashed at a time; part of the digest: the name at a border has no separator


class Item(NamedTuple):
    """One image of a source.

    Attributes:
        name: the source's own name of it, for people.
        label: row in the class table.
        file: path of the file that holds it, relative to the source's input.
        offset: byte in ``file`` where it starts.
        size: its length in bytes.
    """

    name: str
    label: int
    file: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class SplitListing:
    """The images of one split in the source's canonical order, as columns: a million rows cost about 150 MB.

    Attributes:
        names: (N,) source names.
        labels: (N,) int32 rows of the class table.
        files: the files that hold the images.
        file_of: (N,) int32 index into ``files``.
        offsets: (N,) int64 bytes.
        sizes: (N,) int64 bytes.
    """

    names: Sequence[str]
    labels: np.ndarray
    files: Sequence[str]
    file_of: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def items(self, rows: np.ndarray) -> list[Item]:
        """The images in these rows, in this order."""
        return [
            Item(
                self.names[row], int(self.labels[row]), self.files[self.file_of[row]], int(self.offsets[row]), int(size)
            )
            for row, size in zip(rows.tolist(), self.sizes[rows], strict=True)
        ]

    @classmethod
    def of(cls, items: Sequence[Item]) -> "SplitListing":
        """The columns of these images, in this order."""
        number_of = {name: number for number, name in enumerate(dict.fromkeys(item.file for item in items))}
        return cls(
            names=[item.name for item in items],
            labels=np.array([item.label for item in items], np.int32),
            files=tuple(number_of),
            file_of=np.array([number_of[item.file] for item in items], np.int32),
            offsets=np.array([item.offset for item in items], np.int64),
            sizes=np.array([item.size for item in items], np.int64),
        )

    def take(self, rows: np.ndarray) -> "SplitListing":
        """A listing of these rows only, in this order."""
        return dataclasses.replace(
            self,
            names=[self.names[row] for row in rows.tolist()],
            labels=self.labels[rows],
            file_of=self.file_of[rows],
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
        )

    def train_and_val(self, val_fraction: float, seed: int, warnings: list[str]) -> dict[str, "SplitListing"]:
        """Splits off about ``val_fraction`` of every class; a split that gets nothing is left out.

        Appends to ``warnings`` where classes are too small to give their share.
        """
        chosen = stratified(self.labels, val_fraction, seed=seed)
        splits = {"train": self.take(np.flatnonzero(~chosen)), "val": self.take(np.flatnonzero(chosen))}
        if val_fraction and len(self):
            warnings += _few_held_out(self.labels, splits["val"].labels, val_fraction)
        return {split: rows for split, rows in splits.items() if len(rows)}


def _few_held_out(labels: np.ndarray, held_out: np.ndarray, val_fraction: float) -> Iterator[str]:
    """What to say where a share of a class is less than an image; ``labels`` of all images, ``held_out`` of val's."""
    classes, covered = len(np.unique(labels)), len(np.unique(held_out))
    if covered == classes:
        return
    fewest = int(np.bincount(labels)[np.unique(labels)].min())
    small = f"--val-fraction {val_fraction:g} of a class of {pluralize(fewest, 'image')} is less than one image"
    if not covered:
        yield f"{small}: there is no split val, and so no accuracy on held-out images; use a larger share"
    else:
        yield f"{small}: val has images of {covered:,} of {classes:,} classes; use a larger share for all of them"


class Tally:
    """Counts what a source passes over, by split and reason, so that nothing is lost in silence.

    A reason is a short fixed phrase, of :mod:`pipeline.sources.reasons` where one fits. Of the names the first few in
    the order of their bytes are kept, so the result does not depend on the order in which a folder is read.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._examples: dict[tuple[str, str], list[str]] = {}

    def add(self, reason: str, name: str, *, split: str = "", count: int = 1) -> None:
        """Counts ``count`` files; ``name`` is that of one of them."""
        key = (split, reason)
        self._counts[key] += count
        names = self._examples.setdefault(key, [])
        if len(names) < EXAMPLES or os.fsencode(name) < os.fsencode(names[-1]):
            names.append(name)
            names.sort(key=os.fsencode)
            del names[EXAMPLES:]

    def extend(self, rows: Iterable[PassedOver]) -> None:
        """Adds what another tally counted."""
        for row in rows:
            for name in row.examples:
                self.add(row.reason, name, split=row.split, count=0)
            self._counts[row.split, row.reason] += row.count

    def records(self) -> tuple[PassedOver, ...]:
        """The counts, as the manifest has them."""
        return tuple(
            PassedOver(split, reason, count, tuple(map(printable, self._examples[split, reason])))
            for (split, reason), count in sorted(self._counts.items())
            if count
        )


@dataclasses.dataclass(frozen=True)
class Listing:
    """Everything a source holds: the images to be made samples, and the count of all else.

    Attributes:
        classes: the class table.
        label_order: ``alphabetical``, ``ilsvrc`` or ``source``.
        splits: images by split name.
        encoded: images are JPEG or PNG bytes; otherwise they are pixels.
        channels: 3 for RGB, 1 for gray.
        passed_over: files that are no images of a split, by split and reason.
        warnings: what a person should know before the work, a line each.
    """

    classes: tuple[ClassRecord, ...]
    label_order: str
    splits: dict[str, SplitListing]
    encoded: bool
    channels: int
    passed_over: tuple[PassedOver, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def num_found(self) -> int:
        """Everything that the input holds: the images of all splits, and what is passed over."""
        return sum(map(len, self.splits.values())) + sum(row.count for row in self.passed_over)

    def digest(self) -> str:
        """sha256 over classes, names, labels and sizes: tells whether the images are still the same.

        What is passed over does not count: a ``.DS_Store`` that appears makes no other data set.
        """
        digest = hashlib.sha256()
        for record in self.classes:
            digest.update(f"{record.name}\0{record.title}\0".encode("utf-8", "surrogateescape"))
        for split in sorted(self.splits):
            listing = self.splits[split]
            digest.update(f"{split}\0{len(listing)}\0".encode())
            for start in range(0, len(listing), CHUNK):
                digest.update("\0".join(listing.names[start : start + CHUNK]).encode("utf-8", "surrogateescape"))
            digest.update(listing.labels.astype("<i4").tobytes())
            digest.update(listing.sizes.astype("<i8").tobytes())
        return digest.hexdigest()


class Source(Protocol):
    """One kind of input. A source is a frozen, picklable dataclass that inherits from this."""

    def listing(self) -> Listing:
        """Lists every image without reading it.

        Raises:
            SourceError: the input is missing or is not what this source expects.
        """
        ...

    def checksums(self) -> Mapping[AnyPath, str]:
        """The published md5 of the input files that have one.

        Raises:
            SourceError: none has; so it is for a source that does not define this.
        """
        raise SourceError("--verify-source: this source has no published checksums")

    def read(self, item: Item) -> bytes | np.ndarray:
        """Reads one image: the file's bytes, or uint8 pixels (H, W, C).

        Raises:
            ImageError: this image cannot be read.
            SourceError: the whole input cannot be read.
        """
        ...


def nfc(text: str) -> str:
    """The one Unicode form of names: a letter with an accent beside it (as macOS writes it) becomes one character."""
    return unicodedata.normalize("NFC", text)


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 are written as ``\\xNN``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
