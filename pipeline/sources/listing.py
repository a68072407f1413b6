"""What a source tells: its images in columns, the class table, and how single images are read."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.errors import SourceError
from pipeline.files import AnyPath
from pipeline.manifest import ClassRecord
from pipeline.sources.split import stratified

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

    def train_and_val(self, val_fraction: float, seed: int) -> dict[str, "SplitListing"]:
        """Splits off about ``val_fraction`` of every class; a split that gets nothing is left out."""
        chosen = stratified(self.labels, val_fraction, seed=seed)
        splits = {"train": self.take(np.flatnonzero(~chosen)), "val": self.take(np.flatnonzero(chosen))}
        return {split: rows for split, rows in splits.items() if len(rows)}


@dataclasses.dataclass(frozen=True)
class Listing:
    """Everything a source holds.

    Attributes:
        classes: the class table.
        label_order: ``alphabetical``, ``ilsvrc`` or ``source``.
        splits: images by split name.
        encoded: images are JPEG or PNG bytes; otherwise they are pixels.
        channels: 3 for RGB, 1 for gray.
    """

    classes: tuple[ClassRecord, ...]
    label_order: str
    splits: dict[str, SplitListing]
    encoded: bool
    channels: int

    def digest(self) -> str:
        """sha256 over classes, names, labels and sizes: tells whether the input is still the same."""
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


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 are written as ``\\xNN``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
