"""The order of the samples: its definition's properties, whatever the sizes, and what of it each replica looks at."""

import itertools

import numpy as np
import pytest

from pipeline.loader.order import BLOCK, Order

SHAPES = [  # samples of each tar, batch size
    ([5, 5, 5, 5, 4], 4),
    ([7], 3),
    ([300, 0, 1, 299], 6),
    ([64] * 20, 16),
    ([100] * 9 + [37], 8),
]


def numbers(order: Order, epoch: int) -> list[np.ndarray]:
    """The samples of each batch of an epoch, as numbers in stored order."""
    first = np.cumsum(order.counts) - order.counts
    places = (order.places(epoch, position) for position in order.positions)
    return [first[batch.tars] + batch.members for batch in places]


@pytest.mark.parametrize(("counts", "batch_size"), SHAPES)
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_sample_once_an_epoch(counts: list[int], batch_size: int, partial: bool, shuffle: bool) -> None:
    total = sum(counts)
    order = Order(np.array(counts), batch_size, 3, shuffle, partial)
    for epoch in range(3):
        batches = numbers(order, epoch)
        seen = np.concatenate(batches)
        assert len(batches) == order.steps == -(-total // batch_size) if partial else total // batch_size
        assert len(np.unique(seen)) == len(seen) == (total if partial else total // batch_size * batch_size)
        assert seen.min() >= 0 and seen.max() < total
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}


@pytest.mark.parametrize(("counts", "batch_size"), SHAPES)
@pytest.mark.parametrize("shuffle", [False, True])
def test_replicas_have_rows_of_the_same_batches_and_open_what_they_read(
    counts: list[int], batch_size: int, shuffle: bool
) -> None:
    whole = Order(np.array(counts), batch_size, 3, shuffle, partial=False)
    for parts in {1, 2, batch_size} if batch_size % 2 == 0 else {1, batch_size}:
        size = batch_size // parts
        orders = [
            Order(np.array(counts), batch_size, 3, shuffle, False, slice(part * size, (part + 1) * size))
            for part in range(parts)
        ]
        for epoch in range(2):
            found = [numbers(order, epoch) for order in orders]
            for batch, rows in zip(numbers(whole, epoch), zip(*found, strict=True), strict=True):
                assert np.array_equal(np.concatenate(rows), batch)
            for order in orders:
                read = [order.places(epoch, position).tars for position in order.positions]
                assert np.array_equal(np.unique(np.concatenate(read)), order.tars(epoch))


def test_a_step_is_found_without_those_before_it() -> None:
    straight = Order(np.full(20, 100), 8, 5, shuffle=True, partial=False)
    in_order = [numbers(straight, epoch) for epoch in range(3)]
    jumping = Order(np.full(20, 100), 8, 5, shuffle=True, partial=False)
    first = np.cumsum(jumping.counts) - jumping.counts
    for epoch, position in reversed(list(itertools.product(range(3), range(0, jumping.steps, 7)))):
        places = jumping.places(epoch, position)
        assert np.array_equal(first[places.tars] + places.members, in_order[epoch][position])


def test_seed_and_epoch_decide() -> None:
    orders = [numbers(Order(np.full(20, 100), 8, seed, True, False), epoch) for seed in (1, 2) for epoch in (0, 1)]
    for one, other in itertools.combinations(orders, 2):
        assert np.mean(np.concatenate(one) == np.concatenate(other)) < 0.01


@pytest.mark.parametrize("replicas", [1, 8, 64])
def test_what_a_replica_touches_is_its_share(replicas: int) -> None:
    """At 64 replicas, each with as many rows as one process alone: the same work a step, and 1/64 of the tars."""
    rows, counts = 16, np.full(640, 250)
    order = Order(counts, rows * replicas, 0, True, False, slice(rows * (replicas - 1), rows * replicas))
    assert {len(order.places(0, position)) for position in range(0, order.steps, 5)} == {rows}
    share = 640 // replicas
    assert share <= len(order.tars(0)) <= share + 2 and share <= len(order.tars(1)) <= share + 2
    epoch = order._shuffled(0)  # what it keeps of an epoch: numbers of its rows, and of all tars
    assert epoch._blocks.shape == (rows, order.steps // BLOCK) and epoch._inside[1].shape[0] in (0, rows)


def test_a_row_reads_blocks_that_lie_together() -> None:
    """What a disk or a network file system likes: BLOCK samples of one row come from one or two stretches of a tar."""
    order = Order(np.full(40, 1000), 8, 0, shuffle=True, partial=False)
    batches = np.stack(numbers(order, 0))
    for first in range(0, order.steps - BLOCK, BLOCK):
        block = np.sort(batches[first : first + BLOCK], axis=0)
        assert (np.sum(np.diff(block, axis=0) > 1, axis=0) <= 2).all()


def test_evaluation_is_dealt_in_whole_batches() -> None:
    counts = np.array([5, 5, 5, 5, 4])
    whole = numbers(Order(counts, 7), 0)
    assert [len(batch) for batch in whole] == [7, 7, 7, 3]
    for parts in (1, 2, 3, 6):
        orders = [Order(counts, 7, part=part, parts=parts) for part in range(parts)]
        dealt = [batch for order in orders for batch in numbers(order, 0)]
        assert all(np.array_equal(one, other) for one, other in zip(dealt, whole, strict=True))
        for order in orders:
            read = [order.places(0, position).tars for position in order.positions]
            assert np.array_equal(np.unique(np.concatenate([[], *read])), order.tars(0))


def test_the_order_is_the_documented_one() -> None:
    """Runs go on after an update: the numbers drawn must never change."""
    order = Order(np.array([40, 40, 40]), 3, 7, shuffle=True, partial=False)
    found = [numbers(order, epoch)[position].tolist() for epoch, position in ((0, 0), (0, 39), (5, 33))]
    assert found == [[30, 92, 41], [39, 104, 57], [85, 69, 12]]
