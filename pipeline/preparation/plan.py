"""Which sample goes into which shard. Pure: no files, no clock, no global state.

The order comes from a hash written out here, not from a library's generator, so a seed means the same order for ever.
"""

import dataclasses
import itertools

import numpy as np

from pipeline.sources.split import shuffled


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
