"""Reads the samples of batches out of the tars, in the order that :mod:`pipeline.loader.order` defines.

Mapped tars are not read here: a sample is a view of its tar, and DALI's threads are the first to touch the pages.
Files are read ahead, by threads of this reader. A process opens the tars that it reads in an epoch, and the next
epoch's in the second half of it.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.errors import DatasetError
from pipeline.loader.open_split import OpenSplit, check_limits
from pipeline.loader.order import Order
from pipeline.loader.shards import OpenShards, ShardIndex, TarFile, check_tar, in_threads, join, read_index
from twotower.words import pluralize

_READERS = 8  # threads that read files: more requests at once than a network file system answers one after the other
_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Samples:
    """The rows of a batch that this process reads.

    Attributes:
        keys: of the samples.
        tars: the number of each one's tar.
        images: the stored bytes of each image, (bytes,) uint8 that may be read-only; valid while they are held, and
            where tars are not mapped until the reader is some batches further.
        labels: gives the texts of the labels. Of a mapped tar best called when the images have been read: a label lies
            behind its image, in a page that is in memory by then.
    """

    keys: tuple[str, ...]
    tars: tuple[int, ...]
    images: Sequence[np.ndarray]
    labels: Callable[[], list[bytes]]


class SampleReader:
    """Reads the batches of an order.

    Args:
        split: the samples.
        order: which, and when.
        mapped: tars are mapped into memory; else read as files.
        held: batches whose images must stay valid beside the newest.
        epoch: the first epoch that will be asked for; its tars are opened at once.

    Raises:
        DatasetError: a tar or an index of it is missing, or not the one that the manifest records.
    """

    def __init__(self, split: OpenSplit, order: Order, *, mapped: bool, held: int = 0, epoch: int = 0) -> None:
        self.split, self.order, self._mapped = split, order, mapped
        self._buffers: list[np.ndarray] = [np.empty(0, np.uint8)] * (held + 2)
        self._pool = None if mapped else ThreadPoolExecutor(_READERS, "tars")
        self._opener = ThreadPoolExecutor(1, "open")
        self._ahead: dict[int, _Reading] = {}
        self._coming: tuple[int, Future[OpenShards]] | None = None
        begin_s = time.perf_counter()
        self._epoch = epoch
        self._open: OpenShards | None = self._open_tars(epoch, None)
        self._say_cost(time.perf_counter() - begin_s)

    def _say_cost(self, elapsed_s: float) -> None:
        assert self._open
        _LOGGER.info(
            "%s: opened %d of %s with %s in %.1f s; their index takes %.1f MB of memory",
            self.split.folder,
            len(self._open.tars),
            pluralize(len(self.split.tars), "shard"),
            pluralize(sum(self._open.counts.values()), "sample"),
            elapsed_s,
            self._open.index.num_bytes / 1e6,
        )

    @property
    def num_open(self) -> int:
        """Tars that are open."""
        return len(self._open.tars) if self._open else 0

    def read(self, number: int) -> Samples:
        """Batch ``number`` of this process, counted through all epochs from 0."""
        if self._mapped:
            return self._map(number)
        batch = self._ahead.get(number) or self._start(number)
        self._ahead = {number + 1: self._ahead.get(number + 1) or self._start(number + 1)}
        return batch.result()

    def _rows(self, number: int) -> tuple[ShardIndex, tuple[int, ...], list[TarFile]]:
        """Index and tar, by number and open, of each row of a batch."""
        epoch, position = divmod(number, len(self.order.positions))
        position = self.order.positions[position]
        opened, places = self._opened(epoch, position), self.order.places(epoch, position)
        numbers = tuple(places.tars.tolist())
        rows = opened.index.take(opened.first[places.tars] + places.members)
        return rows, numbers, [opened.tars[number] for number in numbers]

    def _opened(self, epoch: int, position: int) -> OpenShards:
        """The open tars of an epoch; in its second half those of the next one are opened beside."""
        if self._open is None:
            raise DatasetError("the loader is closed")
        if epoch != self._epoch:
            known = self._coming[1] if self._coming and self._coming[0] == epoch else None
            self._open = known.result() if known else self._open_tars(epoch, self._open)
            self._epoch, self._coming = epoch, None
        if self.order.shuffle and self._coming is None and 2 * position >= self.order.steps:
            self._coming = (epoch + 1, self._opener.submit(self._open_tars, epoch + 1, self._open))
        return self._open

    def _open_tars(self, epoch: int, before: OpenShards | None) -> OpenShards:
        """The tars of an epoch; those that are open already stay so."""
        numbers = self.order.tars(epoch).tolist()
        if before is not None and before.tars.keys() == set(numbers):
            return before
        check_limits(len(numbers) + (len(before.tars) if before else 0), mmap=self._mapped)
        old = {number for number in numbers if before is not None and number in before.tars}

        def open_one(number: int) -> tuple[TarFile, ShardIndex]:
            if number in old:
                assert before is not None
                return before.tars[number], before.index_of(number)
            return self._open_one(number)

        opened = in_threads(open_one, numbers)
        first = np.full(len(self.split.tars), -1, np.int64)
        counts = [int(self.split.counts[number]) for number in numbers]
        first[numbers] = np.cumsum([0, *counts[:-1]]) if numbers else 0
        index = join(index for _, index in opened) if opened else _NOTHING
        tars = {number: tar for number, (tar, _) in zip(numbers, opened, strict=True)}
        return OpenShards(first, index, tars, dict(zip(numbers, counts, strict=True)))

    def _open_one(self, number: int) -> tuple[TarFile, ShardIndex]:
        folder, shard = self.split.folder, self.split.record.shards[number]
        check_tar(folder, shard)
        index = read_index(folder, shard, self.split.manifest.image.extension)
        if number in self.split.kept:
            index = index.take(self.split.kept[number])
        path = Path(self.split.tars[number])
        try:
            return TarFile(path, mapped=self._mapped), index
        except OSError as error:
            raise DatasetError(f"{path} cannot be opened ({error.strerror})") from None

    def _map(self, number: int) -> Samples:
        """A batch as views of mapped tars."""
        rows, numbers, tars = self._rows(number)
        ends = (rows.offsets + rows.sizes).tolist()
        images = [tar.array[begin:end] for tar, begin, end in zip(tars, rows.offsets.tolist(), ends, strict=True)]
        label_ends = (rows.label_offsets + rows.label_sizes).tolist()
        spans = list(zip(tars, rows.label_offsets.tolist(), label_ends, strict=True))
        return Samples(
            _keys(rows), numbers, images, lambda: [bytes(tar.mapping[begin:end]) for tar, begin, end in spans]
        )

    def _start(self, number: int) -> "_Reading":
        """Begins to read a batch from files; its tars stay open as long as that takes."""
        assert self._pool
        rows, numbers, tars = self._rows(number)
        ends = np.cumsum(rows.sizes).tolist()
        slot = number % len(self._buffers)
        if len(self._buffers[slot]) < ends[-1]:
            self._buffers[slot] = np.empty(ends[-1] * 5 // 4, np.uint8)  # images of other batches may be larger
        images = [self._buffers[slot][end - size : end] for end, size in zip(ends, rows.sizes.tolist(), strict=True)]
        offsets = (rows.offsets.tolist(), rows.label_offsets.tolist(), rows.label_sizes.tolist())
        work = list(zip(tars, images, *offsets, strict=True))
        pieces = [self._pool.submit(_read_files, work[piece::_READERS]) for piece in range(_READERS)]
        return _Reading(pieces, Samples(_keys(rows), numbers, images, list))

    def close(self) -> None:
        """Lets go of the tars; what has been handed out of mapped ones stays valid."""
        self._open, self._coming, self._ahead = None, None, {}
        self._opener.shutdown(cancel_futures=True)
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


class _Reading:
    """A batch that several threads are reading."""

    def __init__(self, pieces: "list[Future[list[bytes]]]", samples: Samples) -> None:
        self._pieces, self._samples = pieces, samples

    def result(self) -> Samples:
        """Waits for all of it."""
        labels: list[bytes] = [b""] * len(self._samples.keys)
        for number, piece in enumerate(self._pieces):
            labels[number::_READERS] = piece.result()
        return dataclasses.replace(self._samples, labels=lambda: labels)


def _read_files(work: Sequence[tuple[TarFile, np.ndarray, int, int, int]]) -> list[bytes]:
    """Reads images into their buffers; returns the labels."""
    labels = []
    for tar, image, offset, label_offset, label_size in work:
        tar.read_into(image, offset)
        label = np.empty(label_size, np.uint8)
        tar.read_into(label, label_offset)
        labels.append(label.tobytes())
    return labels


def _keys(rows: ShardIndex) -> tuple[str, ...]:
    return tuple(key.decode() for key in rows.keys.tolist())


_NOTHING = ShardIndex(
    np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8), np.empty(0, "S1")
)
