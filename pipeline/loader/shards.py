"""Tars and their indexes, opened: where each sample's image, label and key are, in arrays of about 30 bytes a sample.

All lines of an index are read at once, column by column (:mod:`pipeline.index_checks`): a loop over 1.28 million lines
would take seconds in every process of a run.
"""

import dataclasses
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DatasetError
from pipeline.index_checks import FIELDS, MAX_INDEX_LINE, IndexColumns, check_index
from pipeline.manifest import ShardRecord, path_inside
from pipeline.statistics_file import REPAIR
from twotower.untrusted import read_regular

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
    """Raises DatasetError where a tar is missing, is no file, or has another size than the manifest records."""
    tar = path_inside(folder, shard.name)
    try:
        found = tar.stat()
    except FileNotFoundError:
        raise DatasetError(f"{tar} is missing: {REPAIR}") from None
    except OSError as error:
        raise DatasetError(f"{tar} cannot be read ({error.strerror}): {REPAIR}") from None
    if not stat.S_ISREG(found.st_mode):
        raise DatasetError(f"{tar} is no regular file: {REPAIR}")
    if found.st_size != shard.size_bytes:
        raise DatasetError(f"{tar} has {found.st_size} bytes, the manifest records {shard.size_bytes}: {REPAIR}")


def read_checked(folder: Path, shard: ShardRecord) -> IndexColumns:
    """Reads the index of a tar, and checks it against the manifest, and every number in it.

    An index of another tar would be read without a word. Who made the index made its hash, too.

    Raises:
        DatasetError: it cannot be read, or it is not the one that the manifest records, or it makes no sense.
    """
    path = path_inside(folder, shard.index_name)
    try:
        data = read_regular(path, shard.num_samples * MAX_INDEX_LINE + MAX_INDEX_LINE)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): {REPAIR}") from None
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DatasetError(f"{path} is not the index that the manifest records: {REPAIR}")
    try:
        return check_index(data, shard.num_samples, shard.size_bytes)
    except ValueError as error:
        raise DatasetError(f"{path} {error}: {REPAIR}") from None


def read_index(folder: Path, shard: ShardRecord, extension: str) -> ShardIndex:
    """Where the samples of a tar are: its index, checked.

    Args:
        folder: the data set.
        shard: the tar's record.
        extension: of the images.

    Raises:
        DatasetError: as :func:`read_checked`; or images or labels are not called so.
    """
    lines = read_checked(folder, shard)
    for component, wanted in ((0, extension), (1, "cls")):
        if not _are_called(lines, component, wanted):
            path = folder / shard.index_name
            raise DatasetError(f"{path} has a line whose file {component + 1} is no {wanted!r}: {REPAIR}")
    name = FIELDS // 3 - 1
    keys = _texts(lines.text, lines.starts[:, name], lines.stops[:, name] - len(extension) - 1)
    return ShardIndex(
        lines.offsets[:, 0].copy(),
        lines.sizes[:, 0].copy(),
        lines.offsets[:, 1].copy(),
        lines.sizes[:, 1].astype(np.uint8),
        keys,
    )


def _are_called(lines: IndexColumns, component: int, extension: str) -> bool:
    """Whether every line's file of that number is an ``extension`` and has a name that ends so."""
    wanted = np.frombuffer(f".{extension}".encode(), np.uint8)
    column = component * (FIELDS // 3)
    begin, end = lines.starts[:, column], lines.stops[:, column]
    name_begin, name_end = lines.starts[:, column + 3], lines.stops[:, column + 3]
    if (end - begin != len(wanted) - 1).any() or (name_end - name_begin <= len(wanted)).any():
        return False
    names = lines.text[name_end[:, None] - len(wanted) + np.arange(len(wanted))]
    extensions = lines.text[begin[:, None] + np.arange(len(wanted) - 1)]
    return bool((names == wanted).all() and (extensions == wanted[1:]).all())


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
