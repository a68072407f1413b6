"""Sources ``mnist`` and ``fashion-mnist``: IDX files, plain or .gz. The official test set is stored as ``val``."""

import dataclasses
import functools
import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, SourceError
from pipeline.files import AnyPath
from pipeline.manifest import ClassRecord
from pipeline.sources.listing import Item, Listing, Source, SplitListing, Tally
from pipeline.sources.walk import Walker, check_link, pass_over_unread
from twotower.untrusted import read_regular
from twotower.words import pluralize

PREFIXES = {"train": "train", "val": "t10k"}
KINDS = {"images": "idx3", "labels": "idx1"}
HEADER_BYTES = 16
MOST_BYTES = 2**30  # of a file, unpacked: MNIST's largest has 47 MB
MD5 = {
    "mnist": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
}
TITLES = {
    "mnist": tuple(str(digit) for digit in range(10)),
    "fashion-mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}


@dataclasses.dataclass(frozen=True)
class IdxSource(Source):
    """28x28 gray images of ten classes.

    Attributes:
        name: ``mnist`` or ``fashion-mnist``; it decides the class titles and checksums.
        root: folder of the four files.
        follow_links: links that lead out of it are followed.
    """

    name: str
    root: Path
    follow_links: bool = False

    def listing(self) -> Listing:
        """60,000 train and 10,000 val images, in the order of the files; other files are counted."""
        if not self.root.is_dir():
            raise SourceError(f"--input {self.root}: no such folder")
        walker = Walker(self.root, Tally(), follow_links=self.follow_links)
        stems = [(f"{prefix}-{what}", kind) for prefix in PREFIXES.values() for what, kind in KINDS.items()]
        pass_over_unread(walker, [self._find(stem, kind).name for stem, kind in stems])
        return Listing(
            classes=tuple(ClassRecord(str(label), title) for label, title in enumerate(TITLES[self.name])),
            label_order="source",
            splits={split: self._split(split) for split in PREFIXES},
            encoded=False,
            channels=1,
            passed_over=walker.tally.records(),
        )

    def read(self, item: Item) -> np.ndarray:
        """One image, uint8 (H, W, 1)."""
        shape, data = read_idx(self.root / item.file, dimensions=3)
        start = item.offset - HEADER_BYTES
        return np.frombuffer(data, np.uint8, item.size, start).reshape(shape[1], shape[2], 1)

    def checksums(self) -> dict[AnyPath, str]:
        """The published md5 of the .gz files that are there."""
        published: dict[AnyPath, str] = {self.root / name: md5 for name, md5 in MD5[self.name].items()}
        found = {path: md5 for path, md5 in published.items() if path.is_file()}
        if not found:
            raise SourceError(f"{self.root}: no .gz files, and only those have published checksums")
        return found

    def _split(self, split: str) -> SplitListing:
        images, labels_path = (self._find(f"{PREFIXES[split]}-{what}", kind) for what, kind in KINDS.items())
        shape, _ = read_idx(images, dimensions=3)
        _, data = read_idx(labels_path, dimensions=1)
        labels = np.frombuffer(data, np.uint8).astype(np.int32)
        if len(labels) != shape[0]:
            raise SourceError(f"{labels_path}: {pluralize(len(labels), 'label')} for {pluralize(shape[0], 'image')}")
        if len(labels) and labels.max() >= len(TITLES[self.name]):
            raise SourceError(f"{labels_path}: label {labels.max()}, expected 0 to {len(TITLES[self.name]) - 1}")
        size = shape[1] * shape[2]
        return SplitListing(
            names=[f"{split}/{number:05d}" for number in range(shape[0])],
            labels=labels,
            files=(images.name,),
            file_of=np.zeros(shape[0], np.int32),
            offsets=HEADER_BYTES + size * np.arange(shape[0], dtype=np.int64),
            sizes=np.full(shape[0], size, np.int64),
        )

    def _find(self, stem: str, kind: str) -> Path:
        names = [f"{stem}{dash}{kind}-ubyte{suffix}" for dash in "-." for suffix in ("", ".gz")]
        for name in names:
            if (self.root / name).is_file():
                check_link(self.root, name, follow_links=self.follow_links)
                return self.root / name
        raise SourceError(f"{self.root}: {names[0]} (or .gz) is missing")


def from_options(options: PrepareOptions) -> IdxSource:
    """Makes the source.

    Raises:
        ConfigError: no input was given.
    """
    if options.input is None:
        raise ConfigError(f"--source {options.source} needs --input FOLDER with the four IDX files")
    assert isinstance(options.input, Path), "open_source refuses a URL for this source"
    return IdxSource(options.source, options.input.absolute(), options.follow_links)


@functools.lru_cache(maxsize=4)
def read_idx(path: Path, dimensions: int) -> tuple[tuple[int, ...], bytes]:
    """Reads an IDX file of unsigned bytes whole; a worker keeps it (47 MB at most).

    Args:
        path: the file; a gzip file is known by its content.
        dimensions: how many it must have.

    Raises:
        SourceError: its magic number, dimensions or length are wrong.
    """
    try:
        data = read_regular(path, MOST_BYTES)
        if data.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as unpacked:
                data = unpacked.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from None
    if len(data) > MOST_BYTES:
        raise SourceError(f"{path}: unpacks to more than {MOST_BYTES:,} bytes")
    start = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < start:
        raise SourceError(f"{path}: not an IDX file of bytes in {dimensions} dimensions (magic {data[:4].hex()})")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, 4))
    if 0 in shape or len(data) != start + math.prod(shape):
        raise SourceError(f"{path}: {pluralize(len(data), 'byte')}, but its header states {shape}")
    return shape, data[start:]
