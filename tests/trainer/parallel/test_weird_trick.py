"""Workers of one tower equal one process: loss, every gradient, weights after five updates; and what they send."""

from collections import Counter
from typing import Any

import pytest
import torch

from tests.helpers import worker_work as work
from tests.trainer.parallel.test_equality import EXACT, relative_error
from trainer.experiments.one_weird_trick import traffic
from trainer.experiments.one_weird_trick.found import WORLDS
from trainer.model.layers import DropoutDraws
from trainer.parallel.mesh import MeshCoord
from trainer.parallel.weird_trick import HalfDropout, pair_rows, worker_rows, worker_share

NAMES = tuple(WORLDS)


@pytest.fixture(scope="module")
def four(four_processes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What four processes found, by rank."""
    return [found["workers"] for found in four_processes]


@pytest.fixture(scope="module")
def serial() -> dict[str, Any]:
    """One process with the whole batch."""
    return work.updates(None)


@pytest.mark.numeric
@pytest.mark.parametrize("name", NAMES)
def test_workers_equal_serial(four: list[dict[str, Any]], serial: dict[str, Any], name: str) -> None:
    """float64, dropout on, eleven classes between two workers."""
    ranks = [found[name] for found in four]
    pairs = [ranks[0], ranks[2]] if name == "two-by-two" else [ranks[0]]
    for update, expected in enumerate(serial["losses"]):
        mean = sum(pair["losses"][update] for pair in pairs) / len(pairs)
        assert mean == pytest.approx(expected, rel=EXACT)
    for what in ("gradients", "weights"):
        for rank, found in enumerate(ranks):
            share = worker_share(serial[what], "ab"[rank % 2])
            assert found[what].keys() == share.keys() and len(share) == 16
            for key, tensor in share.items():
                assert tensor.abs().max() > 0, f"{what} of {key} are all zero: the test would prove nothing"
                assert found[what][key].dtype == torch.float64
                assert relative_error(found[what][key], tensor) < EXACT, f"{what} of {key}, rank {rank}"


def test_a_worker_has_half_of_the_units_and_all_convolutions(serial: dict[str, Any]) -> None:
    """Together they have every unit once."""
    a, b = (worker_share(serial["weights"], worker) for worker in "ab")
    for name, whole in serial["weights"].items():
        if name.startswith("fc"):
            assert torch.equal(torch.cat((a[name], b[name])), whole)
            assert 0 <= len(a[name]) - len(b[name]) <= 1
        else:
            assert torch.equal(a[name], whole) and torch.equal(b[name], whole)


@pytest.mark.parametrize("name", NAMES)
def test_the_ledger_is_what_is_sent_and_what_the_formula_says(four: list[dict[str, Any]], name: str) -> None:
    """The dispatcher's own count of calls and bytes, of a step in float32, on every rank."""
    formula = traffic.workers_formula(work.layouts().one_tower.model, WORLDS[name])
    expected = {each.name: each.in_ledger(work.BATCH_SIZE) for each in formula}
    # A worker's ledger has both directions; of the odd class worker b has no unit, so it sums that much less.
    assert [found[name]["counted"] for found in (four[0], four[2])] == [expected, expected]
    summed = {traffic.GRADIENTS, traffic.CONVOLUTIONS} & expected.keys()
    unit = 4 * (work.layouts().one_tower.model.hidden[1] + 1) if traffic.GRADIENTS in summed else 0
    for rank, found in enumerate(four):
        calls: Counter[tuple[str, int]] = found[name]["calls"]
        by_kind = {kind: sum(n * size for (k, size), n in calls.items() if k == kind) for kind, _ in calls}
        assert by_kind["allreduce_"] == sum(expected[each] for each in summed) - unit * (rank % 2)
        assert by_kind["send"] == by_kind["recv_"] == sum(n for each, n in expected.items() if each not in summed)
        assert by_kind.keys() == {"allreduce_", "send", "recv_"}


@pytest.mark.parametrize("world", [2, 4])
def test_the_count_without_processes_equals_the_formula(world: int) -> None:
    """For any batch; of both layouts."""
    nets = work.layouts()
    for counted, formula in (
        (traffic.count_workers(nets.one_tower, world), traffic.workers_formula(nets.one_tower.model, world)),
        (traffic.count_towers(nets.towers, world), traffic.towers_formula(nets.towers.model, world)),
    ):
        assert sorted(counted, key=str) == sorted(formula, key=str)


def test_bytes_of_the_papers_net() -> None:
    """By hand: 234,496 an image between towers (see tests of the crossings), 3,747,200 parameters of convolutions."""
    from tests.helpers.recipes import recipe
    from trainer.experiments.one_weird_trick.layouts import make_layouts

    nets = make_layouts(recipe("paper"))
    towers = traffic.towers_formula(nets.towers.model, 2)
    workers = traffic.workers_formula(nets.one_tower.model, 2)
    image = 4 * (9216 + 2 * 2048 + 2 * 2048 + 2)
    assert traffic.total_bytes(towers, 128) == 128 * 234_496
    assert traffic.total_bytes(workers, 128) == 128 * image + 4 * 3_747_200
    found = traffic.crossover(towers, workers)
    assert found == pytest.approx(4 * 3_747_200 / (234_496 - image)) and 90 < found < 92
    assert traffic.crossover(workers, towers) is None, "where the first costs less an image"


def test_of_a_sum_a_ring_sends_its_share() -> None:
    """2 (P - 1) / P of what takes part: as much with two, 1.5 times with four."""
    assert [traffic.Sent("sum", 100, 0, by).leaving(7) for by in (2, 4)] == [100, 150]
    assert traffic.Sent("message", 100, 3).leaving(7) == 121


def test_rows_are_shared_out_once() -> None:
    """Each worker's rows lie in its pair's, and all together are the batch."""
    coords = [MeshCoord(rank, 4) for rank in range(4)]
    rows = list(range(16))
    assert [row for coord in coords for row in rows[worker_rows(coord, 16)]] == rows
    for coord in coords:
        assert set(rows[worker_rows(coord, 16)]) < set(rows[pair_rows(coord, 16)])


def test_a_workers_mask_is_its_columns_of_the_whole_one() -> None:
    """Also where a worker's units are no multiple of four, which share a random word."""
    model, draws = work.layouts("model.dropout=0.5").one_tower.model, DropoutDraws(3, 7, first=5)
    whole = draws.mask("a", "fc6", torch.ones(9, 26), 0.5)
    halves = [HalfDropout(model, "fc6", worker).mask(torch.ones(9, 13), draws) for worker in "ab"]
    assert torch.equal(torch.cat(halves, dim=1), whole) and 0 < whole.mean() < 1
