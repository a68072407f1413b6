"""Where pictures come from. A source lists its pictures once, on the driver, and reads single ones, on any worker.

A new source is one file with a frozen (picklable) dataclass that follows :class:`Source`, and one row in
:data:`SOURCES`.
"""

import dataclasses
import hashlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError
from pipeline.files import Place, UrlPath
from pipeline.manifest import ClassRecord

# Name -> module, imported only when asked for, so that one source's packages are not needed by another.
SOURCES = {
    "imagenet": "pipeline.sources.imagenet",
    "folder": "pipeline.sources.folder",
    "cifar10": "pipeline.sources.cifar10",
    "mnist": "pipeline.sources.idx",
    "fashion-mnist": "pipeline.sources.idx",
    "digits": "pipeline.sources.digits",
    "webdataset": "pipeline.sources.webdataset",
}
AT_URLS = ("imagenet", "folder", "webdataset")  # the others are small enough to be copied first


class Item(NamedTuple):
    """One picture of a source.

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
    """The pictures of one split in the source's canonical order, as columns: a million rows cost about 150 MB.

    Attributes:
        names: (N,) source names.
        labels: (N,) int32 rows of the class table.
        files: the files that hold the pictures.
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
        """The pictures in these rows, in this order."""
        return [
            Item(
                self.names[row], int(self.labels[row]), self.files[self.file_of[row]], int(self.offsets[row]), int(size)
            )
            for row, size in zip(rows.tolist(), self.sizes[rows], strict=True)
        ]

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


@dataclasses.dataclass(frozen=True)
class Listing:
    """Everything a source holds.

    Attributes:
        classes: the class table.
        label_order: ``alphabetical``, ``ilsvrc`` or ``source``.
        splits: pictures by split name.
        encoded: pictures are JPEG or PNG bytes; otherwise they are pixels.
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
            for chunk in _chunks(listing.names):
                digest.update("\0".join(chunk).encode("utf-8", "surrogateescape"))
            digest.update(listing.labels.astype("<i4").tobytes())
            digest.update(listing.sizes.astype("<i8").tobytes())
        return digest.hexdigest()


class Source(Protocol):
    """One kind of input."""

    def listing(self) -> Listing:
        """Lists every picture without reading it.

        Raises:
            SourceError: the input is missing or is not what this source expects.
        """
        ...

    def checksums(self) -> Mapping[Place, str]:
        """The published md5 of the input files that have one.

        Raises:
            SourceError: none has.
        """
        ...

    def read(self, item: Item) -> bytes | np.ndarray:
        """Reads one picture: the file's bytes, or uint8 pixels (H, W, C).

        Raises:
            PictureError: this picture cannot be read.
            SourceError: the whole input cannot be read.
        """
        ...


def open_source(options: PrepareOptions) -> Source:
    """Makes the source that ``options`` name.

    Raises:
        ConfigError: there is no such source, or it lacks an input.
    """
    if options.source not in SOURCES:
        raise ConfigError(f"--source {options.source}: expected one of {', '.join(SOURCES)}")
    if isinstance(options.input, UrlPath) and options.source not in AT_URLS:
        raise ConfigError(f"--input {options.input}: source {options.source} reads local folders; copy its files first")
    module = importlib.import_module(SOURCES[options.source])
    return module.from_options(options)


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 are written as ``\\xNN``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _chunks(names: Sequence[str], size: int = 65536) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]
