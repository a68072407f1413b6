"""Tars and their indexes, opened: where each sample's image, label and key are, in arrays of about 30 bytes a sample.

An index line is ``EXTENSION OFFSET SIZE NAME``, repeated for each component of the sample. All lines of a tar are read
at once, column by column: a loop over 1.28 million lines would take seconds in every process of a run.
"""

import dataclasses
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DatasetError
from pipeline.manifest import ShardRecord

REPAIR = "run python -m pipeline verify on it, then prepare again to repair it"
_BLOCK = 512  # of a tar
_MOST_DIGITS = 18  # of an offset or a size
_COLUMNS = 4  # of a component
_THREADS = 16  # that open tars: they wait for a disk or a network


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one tar, or of several one after the other, are.

    Attributes:
        offsets, sizes: (n,) int64 of the image, bytes.
        label_offsets, label_sizes: (n,) int64 and uint8 of the label.
        keys: (n,) bytes.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    label_offsets: np.ndarray
    label_sizes: np.ndarray
    keys: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        return sum(array.nbytes for array in self._arrays())

    def take(self, rows: slice | np.ndarray) -> "ShardIndex":
        """Some of the samples."""
        return ShardIndex(*(array[rows] for array in self._arrays()))

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.offsets, self.sizes, self.label_offsets, self.label_sizes, self.keys


def join(parts: Iterable[ShardIndex]) -> ShardIndex:
    """Several indexes one after the other; at least one."""
    return ShardIndex(*(np.concatenate(arrays) for arrays in zip(*(part._arrays() for part in parts), strict=True)))


def in_threads(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """``work`` for every item, in order; reading and hashing let others run meanwhile."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, items))


def check_tar(folder: Path, shard: ShardRecord) -> None:
    """Raises DatasetError where a tar is missing, or has another size than the manifest records."""
    tar = folder / shard.name
    try:
        found = tar.stat().st_size
    except OSError as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DatasetError(f"{tar} {why}: {REPAIR}") from None
    if found != shard.size_bytes:
        raise DatasetError(f"{tar} has {found} bytes, the manifest records {shard.size_bytes}: {REPAIR}")


def read_index(folder: Path, shard: ShardRecord, extension: str) -> ShardIndex:
    """Reads the index of a tar, and checks it against the manifest and against the tar's size.

    Args:
        folder: the data set.
        shard: the tar's record.
        extension: of the images.

    Raises:
        DatasetError: it cannot be read, or it is not the one that the manifest records, or it makes no sense.
    """
    path = folder / shard.index_name
    data = read_checked(folder, shard)
    try:
        return _parse(data[data.index(b"\n") + 1 :], shard, extension)
    except ValueError as error:
        raise DatasetError(f"{path}: {error}: {REPAIR}") from None


def read_checked(folder: Path, shard: ShardRecord) -> bytes:
    """The bytes of an index whose hash and number of samples are those of the manifest.

    An index of another tar would be read without a word, so the hash is always looked at: 1 to 2 GB/s.
    """
    path = folder / shard.index_name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): {REPAIR}") from None
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DatasetError(f"{path} is not the index that the manifest records: {REPAIR}")
    header = data.split(b"\n", 1)[0].decode("ascii", "replace")
    if header != f"v1.2 {shard.num_samples}" or b"\n" not in data:
        raise DatasetError(f"{path} begins {header!r}, expected 'v1.2 {shard.num_samples}': {REPAIR}")
    return data


def _parse(lines: bytes, shard: ShardRecord, extension: str) -> ShardIndex:
    """The columns of an index without its first line.

    Raises:
        ValueError: says what is wrong.
    """
    text = np.frombuffer(lines, np.uint8)
    stops = np.flatnonzero((text == ord(" ")) | (text == ord("\n")))
    count = shard.num_samples
    num_columns = len(stops) // count
    if len(stops) != count * num_columns or num_columns % _COLUMNS or not num_columns or stops[-1] != len(text) - 1:
        raise ValueError("its lines are not EXTENSION OFFSET SIZE NAME, the same components for every sample")
    begins = np.concatenate([[0], stops[:-1] + 1]).reshape(count, num_columns)
    ends = stops.reshape(count, num_columns)
    if not (text[ends] == [ord(" ")] * (num_columns - 1) + [ord("\n")]).all():
        raise ValueError("its lines have different numbers of components")
    image = _component(text, begins, ends, extension)
    label = _component(text, begins, ends, "cls")
    offsets, sizes = _span(text, begins, ends, image, shard.size_bytes)
    label_offsets, label_sizes = _span(text, begins, ends, label, shard.size_bytes)
    if label_sizes.max() > 255:
        raise ValueError(f"a label of {label_sizes.max()} bytes")
    names = image + _COLUMNS - 1
    keys = _texts(text, begins[:, names], ends[:, names] - len(extension) - 1)
    return ShardIndex(offsets, sizes, label_offsets, label_sizes.astype(np.uint8), keys)


def _component(text: np.ndarray, begins: np.ndarray, ends: np.ndarray, extension: str) -> int:
    """The first column of a component, the same in every line, whose names end in its extension."""
    wanted = np.frombuffer(extension.encode(), np.uint8)
    for column in range(0, begins.shape[1], _COLUMNS):
        begin, end, name_end = begins[:, column], ends[:, column], ends[:, column + _COLUMNS - 1]
        if bytes(text[begin[0] : end[0]]) != extension.encode():
            continue
        long_enough = (name_end - begins[:, column + _COLUMNS - 1] > len(wanted) + 1).all()
        if (end - begin == len(wanted)).all() and long_enough:
            places = np.arange(len(wanted))
            names = text[name_end[:, None] - len(wanted) + places] == wanted
            dots = text[name_end - len(wanted) - 1] == ord(".")
            if (text[begin[:, None] + places] == wanted).all() and names.all() and dots.all():
                return column
        break
    raise ValueError(f"not every line has a component {extension!r} whose name ends so")


def _span(text: np.ndarray, begins: np.ndarray, ends: np.ndarray, column: int, size_bytes: int) -> Any:
    """Offset and size of a component in every line, inside a tar of ``size_bytes``."""
    offsets = _numbers(text, begins[:, column + 1], ends[:, column + 1])
    sizes = _numbers(text, begins[:, column + 2], ends[:, column + 2])
    if (offsets % _BLOCK).any() or (offsets < _BLOCK).any() or (offsets + sizes > size_bytes).any():
        raise ValueError(f"an offset is no multiple of {_BLOCK}, or outside the tar of {size_bytes:,} bytes")
    return offsets, sizes


def _numbers(text: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(n,) int64 out of n texts of digits."""
    widths = ends - begins
    if widths.min() < 1 or widths.max() > _MOST_DIGITS:
        raise ValueError(f"an offset or a size has {widths.min()} to {widths.max()} digits")
    values = np.zeros(len(begins), np.int64)
    for place in range(int(widths.max())):
        inside = place < widths
        digits = text[np.where(inside, begins + place, begins)].astype(np.int64) - ord("0")
        if ((digits < 0) | (digits > 9)).any():
            raise ValueError("an offset or a size is no whole number")
        values = np.where(inside, values * 10 + digits, values)
    return values


def _texts(text: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(n,) bytes of n texts."""
    width = int((ends - begins).max())
    places = begins[:, None] + np.arange(width)
    inside = places < ends[:, None]
    return np.where(inside, text[np.where(inside, places, 0)], 0).astype(np.uint8).view(f"S{width}").ravel()


class TarFile:
    """One tar, mapped or as a file; goes when nothing refers to it any more, also not a piece of it.

    Attributes:
        mapping: the whole file; nothing where it is not mapped.
        array: uint8 view of it.
    """

    def __init__(self, path: Path, *, mapped: bool) -> None:
        self.path = path
        self.mapping: mmap.mmap | bytes = b""
        self._descriptor = -1
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if mapped:
            try:
                self.mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
            finally:
                os.close(descriptor)
        else:
            self._descriptor = descriptor
        self.array = np.frombuffer(self.mapping, np.uint8)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    def read_into(self, buffer: np.ndarray, offset: int) -> None:
        """Fills ``buffer`` from a place of a file that is not mapped.

        Raises:
            DatasetError: the file ends before, or cannot be read.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:].data], offset + done)
            except OSError as error:
                raise DatasetError(f"{self.path} cannot be read ({error.strerror}): {REPAIR}") from None
            if not count:
                raise DatasetError(f"{self.path} ends at {offset + done} bytes, inside a sample: {REPAIR}")
            done += count


@dataclasses.dataclass(frozen=True)
class OpenShards:
    """The tars that a process reads in an epoch.

    Attributes:
        first: (num_tars,) int64, number of a tar's first sample in ``index``; -1 where it is not open.
        index: of all their samples, tar after tar.
        tars: by number.
        counts: samples by number.
    """

    first: np.ndarray
    index: ShardIndex
    tars: Mapping[int, TarFile]
    counts: Mapping[int, int]

    def index_of(self, number: int) -> ShardIndex:
        """The index of one tar."""
        begin = int(self.first[number])
        return self.index.take(slice(begin, begin + self.counts[number]))
