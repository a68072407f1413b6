"""Source ``cifar10``: the binary version, extracted or as ``cifar-10-binary.tar.gz``. Its test set becomes ``val``.

The "python version" is a set of pickles, which can run any code when read: it is refused.
"""

import dataclasses
import functools
import itertools
from pathlib import Path

import numpy as np

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, SourceError
from pipeline.files import AnyPath
from pipeline.manifest import ClassRecord
from pipeline.sources import reasons
from pipeline.sources.listing import Item, Listing, Source, SplitListing, Tally
from pipeline.sources.tar_reader import open_compressed, read_compressed
from pipeline.sources.walk import Walker, check_link, join, pass_over_unread
from twotower.untrusted import read_regular
from twotower.words import pluralize

ARCHIVE_NAME = "cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDERS = ("", "cifar-10-batches-bin")
FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "val": ["test_batch.bin"]}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PIXEL_BYTES = 3 * 32 * 32
RECORD_BYTES = 1 + PIXEL_BYTES
MOST_BYTES = 2**30  # of a file


@dataclasses.dataclass(frozen=True)
class Cifar10Source(Source):
    """32x32 color images of ten classes.

    Attributes:
        root: folder of the binary files or of the archive.
        follow_links: links that lead out of it are followed.
    """

    root: Path
    follow_links: bool = False

    def listing(self) -> Listing:
        """50,000 train and 10,000 val images, in the order of the files; other files are counted."""
        where = self._find()
        names = (
            [ARCHIVE_NAME]
            if where == ARCHIVE_NAME
            else [join(where, name) for name in itertools.chain(*FILES.values())]
        )
        for name in names:
            check_link(self.root, name, follow_links=self.follow_links)
        walker = Walker(self.root, Tally(), follow_links=self.follow_links)
        if where == ARCHIVE_NAME:
            _count_members(self.root / where, walker.tally)
        pass_over_unread(walker, names)
        return Listing(
            classes=tuple(ClassRecord(name, name) for name in CLASSES),
            label_order="source",
            splits={split: self._split(where, names) for split, names in FILES.items()},
            encoded=False,
            channels=3,
            passed_over=walker.tally.records(),
        )

    def read(self, item: Item) -> np.ndarray:
        """One image, uint8 (32, 32, 3); the file holds it as three planes."""
        data = read_batch(self.root / item.file)
        planes = np.frombuffer(data, np.uint8, PIXEL_BYTES, item.offset).reshape(3, 32, 32)
        return np.ascontiguousarray(planes.transpose(1, 2, 0))

    def checksums(self) -> dict[AnyPath, str]:
        """The published md5 of the archive."""
        if not (self.root / ARCHIVE_NAME).is_file():
            raise SourceError(f"{self.root}: only {ARCHIVE_NAME} has a published checksum, and it is not here")
        return {self.root / ARCHIVE_NAME: MD5}

    def _find(self) -> str:
        """Where the files are, relative to the root: a folder, or the archive."""
        if not self.root.is_dir():
            raise SourceError(f"--input {self.root}: no such folder")
        for folder in FOLDERS:
            if (self.root / folder / FILES["val"][0]).is_file():
                return folder
        if (self.root / ARCHIVE_NAME).is_file():
            return ARCHIVE_NAME
        if any((self.root / folder / "data_batch_1").is_file() for folder in (".", "cifar-10-batches-py")):
            raise SourceError(f"{self.root}: this is the pickled version, which can run any code; get {ARCHIVE_NAME}")
        raise SourceError(f"{self.root}: neither {FILES['val'][0]} nor {ARCHIVE_NAME} is here")

    def _split(self, where: str, names: list[str]) -> SplitListing:
        labels = []
        for name in names:
            data = np.frombuffer(read_batch(self.root / where / name), np.uint8)
            if not len(data) or len(data) % RECORD_BYTES:
                raise SourceError(
                    f"{self.root / where / name}: {pluralize(len(data), 'byte')} is no multiple of {RECORD_BYTES:,}"
                )
            labels.append(data[::RECORD_BYTES].astype(np.int32))
            if labels[-1].max() >= len(CLASSES):
                raise SourceError(f"{self.root / where / name}: label {labels[-1].max()}, expected 0 to 9")
        counts = [len(row) for row in labels]
        numbers = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
        file_of = np.repeat(np.arange(len(names), dtype=np.int32), counts)
        return SplitListing(
            names=[
                f"{names[file].removesuffix('.bin')}/{number:05d}"
                for file, number in zip(file_of, numbers, strict=True)
            ],
            labels=np.concatenate(labels),
            files=[join(where, name) for name in names],
            file_of=file_of,
            offsets=numbers * RECORD_BYTES + 1,
            sizes=np.full(len(numbers), PIXEL_BYTES, np.int64),
        )


def from_options(options: PrepareOptions) -> Cifar10Source:
    """Makes the source.

    Raises:
        ConfigError: no input was given.
    """
    if options.input is None:
        raise ConfigError(f"--source cifar10 needs --input FOLDER with {ARCHIVE_NAME} or its files")
    assert isinstance(options.input, Path), "open_source refuses a URL for this source"
    return Cifar10Source(options.input.absolute(), options.follow_links)


def _count_members(archive: Path, tally: Tally) -> None:
    """Counts the files of the archive that nobody reads.

    Raises:
        SourceError: it is damaged.
    """
    with open_compressed(archive) as tar:
        for member in tar:
            name = member.name.rpartition("/")[2]
            if not member.isdir() and name not in (*FILES["train"], *FILES["val"]):
                reason = reasons.HIDDEN if name.startswith(".") else reasons.NOT_READ
                tally.add(reason, f"{archive.name}/{member.name}")


@functools.lru_cache(maxsize=6)
def read_batch(path: Path) -> bytes:
    """One of the six files (30.7 MB), plain or out of the archive; a worker keeps it.

    Raises:
        SourceError: it is missing or the archive is damaged.
    """
    if path.parent.name == ARCHIVE_NAME:
        return read_compressed(path.parent, [path.name])[path.name]
    try:
        return read_regular(path, MOST_BYTES)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
