"""Which sample goes into which shard. Pure: no files, no clock, no global state.

The order comes from a hash written out here, not from a library's generator, so a seed means the same order for ever.
"""

import dataclasses
import itertools
import zlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """One shard to be written.

    Attributes:
        name: path of the tar inside the data set, ``train/train-000000.tar``.
        split: the split it belongs to.
        start: position in the shuffled split of its first sample.
        rows: (n,) rows of the split's listing, in the order of writing.
    """

    name: str
    split: str
    start: int
    rows: np.ndarray


def key_of(split: str, position: int) -> str:
    """The key of the sample at this position of the shuffled split: unique in the data set, only ``a-z0-9-``."""
    return f"{split}-{position:08d}"


def shuffled(count: int, seed: int, purpose: str) -> np.ndarray:
    """A permutation of ``range(count)``, (count,) int64, decided by ``seed`` and ``purpose`` alone."""
    state = np.array([(seed * 0x9E3779B97F4A7C15 + zlib.crc32(purpose.encode())) % 2**64], np.uint64)
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) + _mix(state)), kind="stable")


def plan_split(split: str, count: int, *, seed: int, shard_size: int, limit: int | None = None) -> list[ShardPlan]:
    """Cuts a shuffled split into shards of equal size, give or take one sample.

    Args:
        split: name of the split.
        count: pictures in it.
        seed: seed of the shuffle.
        shard_size: most samples in a shard.
        limit: only the first ``limit`` pictures of the shuffled order.
    """
    order = shuffled(count, seed, f"shuffle {split}")[:limit]
    num_shards = -(-len(order) // shard_size)
    bounds = [len(order) * shard // max(num_shards, 1) for shard in range(num_shards + 1)]
    return [
        ShardPlan(name=f"{split}/{split}-{shard:06d}.tar", split=split, start=start, rows=order[start:end])
        for shard, (start, end) in enumerate(itertools.pairwise(bounds))
    ]


def stratified(labels: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """Chooses about ``fraction`` of every class, at least one picture of it staying out; (N,) bool, True = chosen."""
    order = shuffled(len(labels), seed, "stratified split")
    rank_of = np.empty(len(labels), np.int64)
    rank_of[order] = np.arange(len(labels))
    by_class = np.lexsort((rank_of, labels))  # class by class, shuffled inside
    chosen = np.zeros(len(labels), bool)
    starts = np.flatnonzero(np.r_[True, np.diff(labels[by_class]) != 0]) if len(labels) else np.zeros(0, int)
    for start, end in zip(starts, np.r_[starts[1:], len(labels)], strict=True):
        chosen[by_class[start : start + min(round((end - start) * fraction), end - start - 1)]] = True
    return chosen


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64 (Steele, Lea, Flood 2014)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
