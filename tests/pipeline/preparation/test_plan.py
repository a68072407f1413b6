"""The plan covers every picture once, in equal shards, and is the same for ever for a seed."""

import numpy as np
import pytest

from pipeline.preparation.plan import plan_split
from pipeline.preparation.shard import key_of
from pipeline.sources.split import shuffled, stratified


@pytest.mark.parametrize(("count", "shard_size"), [(1, 1), (7, 3), (1437, 128), (1000, 1000), (1001, 1000)])
def test_every_picture_is_in_exactly_one_shard(count: int, shard_size: int) -> None:
    shards = plan_split("train", count, seed=3, shard_size=shard_size)
    rows = np.concatenate([shard.rows for shard in shards])
    assert sorted(rows.tolist()) == list(range(count))
    sizes = [len(shard.rows) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= shard_size
    assert [shard.start for shard in shards] == np.cumsum([0, *sizes[:-1]]).tolist()


def test_no_pictures_make_no_shards() -> None:
    assert plan_split("val", 0, seed=0, shard_size=10) == []


def test_order_depends_on_seed_and_purpose_and_never_changes() -> None:
    assert shuffled(8, 0, "shuffle train").tolist() == shuffled(8, 0, "shuffle train").tolist()
    assert shuffled(1000, 0, "a").tolist() != shuffled(1000, 1, "a").tolist()
    assert shuffled(1000, 0, "a").tolist() != shuffled(1000, 0, "b").tolist()
    assert shuffled(10, 7, "shuffle train").tolist() == [
        3,
        5,
        7,
        8,
        6,
        0,
        2,
        4,
        9,
        1,
    ]  # another order would silently be another data set


def test_shuffle_spreads_classes_over_shards() -> None:
    labels = np.repeat(np.arange(10), 1000)  # sorted by class, as sources list them
    for shard in plan_split("train", len(labels), seed=0, shard_size=500):
        counts = np.bincount(labels[shard.rows], minlength=10)
        assert counts.min() > 20  # expected 50, standard deviation 6.5
        assert counts.max() < 80


def test_limit_takes_the_first_of_the_shuffled_order() -> None:
    whole = np.concatenate([shard.rows for shard in plan_split("train", 100, seed=1, shard_size=10)])
    limited = np.concatenate([shard.rows for shard in plan_split("train", 100, seed=1, shard_size=10, limit=25)])
    assert limited.tolist() == whole[:25].tolist()


def test_keys_are_plain_and_sort_like_positions() -> None:
    keys = [key_of("train", position) for position in (0, 9, 10, 1_281_166)]
    assert keys == sorted(keys)
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for key in keys)


def test_stratified_takes_the_share_of_every_class_and_never_all() -> None:
    labels = np.repeat(np.arange(4), [1, 2, 10, 100])
    chosen = stratified(labels, 0.1, seed=5)
    assert np.bincount(labels[chosen], minlength=4).tolist() == [0, 0, 1, 10]
    assert stratified(labels, 0.99, seed=5).sum() == 0 + 1 + 9 + 99
    assert stratified(labels, 0.0, seed=5).sum() == 0


def test_a_million_pictures_are_planned_in_columns() -> None:
    shards = plan_split("train", 1_281_167, seed=0, shard_size=2048)
    assert len(shards) == 626
    assert {len(shard.rows) for shard in shards} == {2046, 2047}
