"""The order of the samples: arithmetic on a seed, before a byte is read.

The definition, for ``shuffle = "epoch"``:

1. Every epoch puts the tars of the split into an order of its own, drawn from (seed, epoch), and strings their samples
   together in that order.
2. The string is cut into as many equal stretches as a batch has rows. Row r of every batch of this epoch comes from
   stretch r, so the batch at step t holds one sample of each stretch. What does not fill a last batch is the end of the
   string: another in every epoch, and dropped, or with ``last_batch = "partial"`` one sample more for the first rows.
3. A stretch begins at a place of its own, drawn, and goes around its end. It is read in blocks of :data:`BLOCK`
   samples that lie together in a tar; the blocks come in a drawn order, and so do the samples of each block. What
   fills no block comes last.

For ``shuffle = "once"`` and in evaluation: the stored order, cut into batches.

A replica trains on neighboring rows of every batch. So it reads one piece of the string, as long as its share of the
work, and no other replica's tars but those at the piece's two ends; in stored order its rows are spread over all tars.
Nobody's number is in the definition: one process, or any number of replicas, see the same batches, and step t of an
epoch is found without going through the steps before it.
"""

import dataclasses
import functools
import hashlib

import numpy as np

BLOCK = 32  # samples: with 30 kB each 1 MB in one piece, what a disk or a file system over a network likes to read
_TARS, _STARTS, _BLOCKS, _INSIDE = range(4)  # what numbers are drawn for


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the rows of a batch are stored.

    Attributes:
        tars: (N,) int64 numbers of tars, in the split's order.
        members: (N,) int64 samples inside these, from 0.
    """

    tars: np.ndarray
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.tars)


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """Which samples a process reads, and when.

    Attributes:
        counts: (num_tars,) samples of each tar.
        batch_size: samples in a batch, of all replicas together.
        seed: 0..2**63 - 1.
        shuffle: whether every epoch has another order; else the stored one.
        partial: whether the last samples of an epoch make a smaller batch; else they are dropped.
        rows: rows of every batch that this process reads; None for all.
        part, parts: batches that this process reads of an epoch in stored order, an equal part of them in one piece.
    """

    counts: np.ndarray
    batch_size: int
    seed: int = 0
    shuffle: bool = False
    partial: bool = True
    rows: slice | None = None
    part: int = 0
    parts: int = 1

    @property
    def num_samples(self) -> int:
        """Samples of all tars."""
        return int(self.counts.sum())

    @property
    def steps(self) -> int:
        """Batches in an epoch, of all parts together; a partial one counts."""
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + bool(rest and self.partial)

    @property
    def positions(self) -> range:
        """The batches of an epoch that this process reads."""
        return range(self.steps * self.part // self.parts, self.steps * (self.part + 1) // self.parts)

    @property
    def row_range(self) -> range:
        """The rows of a whole batch that this process reads."""
        return range(*(self.rows or slice(None)).indices(self.batch_size))

    def places(self, epoch: int, position: int) -> Places:
        """Where the rows of a batch lie that this process reads; fewer of the last one, where that is partial."""
        if self.shuffle:
            return self._shuffled(epoch).places(position)
        begin, rows = position * self.batch_size, self.row_range
        numbers = np.arange(begin + rows.start, min(begin + rows.stop, self.num_samples))
        return _find(numbers, np.arange(len(self.counts)), self._ends)

    def tars(self, epoch: int) -> np.ndarray:
        """The numbers of the tars that this process reads in an epoch, ascending."""
        if self.shuffle:
            return self._shuffled(epoch).tars()
        begin, end = self.positions.start * self.batch_size, self.positions.stop * self.batch_size
        edges = np.clip(np.concatenate([[0], self._ends]), begin, min(end, self.num_samples))
        whole, rest = np.divmod(edges, self.batch_size)
        rows = self.row_range
        ours_before = whole * len(rows) + np.clip(rest - rows.start, 0, len(rows))
        return np.flatnonzero(np.diff(ours_before))

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.counts)

    @functools.cached_property
    def _epochs(self) -> "dict[int, _Epoch]":
        return {}

    def _shuffled(self, epoch: int) -> "_Epoch":
        """The draws of an epoch; those of the two last ones are kept, as reading ahead crosses from one to the next."""
        if epoch not in self._epochs:
            for old in sorted(self._epochs, key=lambda other: abs(other - epoch))[1:]:
                del self._epochs[old]
            self._epochs[epoch] = _Epoch(self, epoch)
        return self._epochs[epoch]


class _Epoch:
    """One epoch in a drawn order, for the rows of one process."""

    def __init__(self, order: Order, epoch: int) -> None:
        self._order, self._epoch = order, epoch
        self._tars = np.argsort(self._draw(_TARS, 0, len(order.counts)), kind="stable")
        self._ends = np.cumsum(order.counts[self._tars])
        length, longer = divmod(order.num_samples, order.batch_size)
        rows = np.arange(order.row_range.start, order.row_range.stop)
        longer *= order.partial
        self._begins = rows * length + np.minimum(rows, longer)
        self._lengths = length + (rows < longer)
        shares = (self._draw(_STARTS, int(rows[0]), len(rows)) >> np.uint64(11)) * 2.0**-53
        self._starts = (shares * self._lengths).astype(np.int64)
        self._num_blocks = length // BLOCK
        self._blocks = np.argsort(self._draw_rows(_BLOCKS, int(rows[0]), self._num_blocks), axis=1, kind="stable")
        self._inside: tuple[int, np.ndarray] = (-1, np.empty(0))

    def places(self, position: int) -> Places:
        block, number = divmod(position, BLOCK)
        if self._inside[0] != block:
            self._inside = (block, self._order_inside(block))
        ours = self._lengths > position
        where = self._inside[1][:, number]
        whole = block < self._num_blocks
        first = self._blocks[:, block] * BLOCK if whole else self._num_blocks * BLOCK
        along = self._begins + (self._starts + first + where) % np.maximum(self._lengths, 1)
        return _find(along[ours], self._tars, self._ends)

    def tars(self) -> np.ndarray:
        begin, end = int(self._begins[0]), int(self._begins[-1] + self._lengths[-1])
        if begin == end:
            return np.empty(0, np.int64)
        first, last = np.searchsorted(self._ends, [begin, end - 1], side="right")
        ours = self._tars[first : last + 1]
        return np.sort(ours[self._order.counts[ours] > 0])

    def _order_inside(self, block: int) -> np.ndarray:
        """(rows, BLOCK): the order in which each row's samples of a block come; of the rest, its own samples first."""
        size, rows = self._order.batch_size, self._order.row_range
        drawn = self._draw_rows(_INSIDE, block * size + rows.start, BLOCK) >> np.uint64(1)
        if block == self._num_blocks:
            rest = self._lengths - self._num_blocks * BLOCK
            drawn[np.arange(BLOCK) >= rest[:, None]] = np.iinfo(np.uint64).max
        return np.argsort(drawn, axis=1, kind="stable")

    def _draw_rows(self, purpose: int, first: int, count: int) -> np.ndarray:
        """(rows, count) uint64 for rows ``first``, ``first`` + 1...: each row's own, whoever draws them."""
        width = -(-count // 4) * 4  # the generator counts in fours
        rows = len(self._order.row_range)
        return self._draw(purpose, first * (width // 4), rows * width, fours=True).reshape(rows, width)[:, :count]

    def _draw(self, purpose: int, first: int, count: int, *, fours: bool = False) -> np.ndarray:
        """Random uint64: numbers ``first`` to ``first + count - 1`` of a purpose; ``first`` counts fours if asked."""
        name = f"{self._order.seed} {self._epoch} {purpose}".encode()
        key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), "<u8").astype(np.uint64)
        four, skipped = (first, 0) if fours else divmod(first, 4)
        generator = np.random.Philox(key=key, counter=np.array([four, 0, 0, 0], np.uint64))
        return np.asarray(generator.random_raw(skipped + count), np.uint64)[skipped:]


def _find(along: np.ndarray, tars: np.ndarray, ends: np.ndarray) -> Places:
    """Where samples lie that are ``along`` the string of ``tars``, whose samples end at ``ends`` of it."""
    which = np.searchsorted(ends, along, side="right")
    before = np.where(which > 0, ends[which - 1], 0)
    return Places(tars[which], along - before)
