"""Two pairs of towers equal one, on the same batch: loss, every gradient, weights after five steps."""

from collections import Counter
from typing import Any

import pytest
import torch

from tests.helpers import tower_work as work
from tests.helpers.pair import run_mesh
from tests.trainer.parallel.test_equality import EXACT, EXPLODING, RELATIVE, relative_error
from trainer.parallel.data_parallel import BUCKET_BYTES
from trainer.planning.describe import count_crossings

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def four(four_processes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What four processes found, by rank."""
    return [found["replicas"] for found in four_processes]


def assert_equal_serial(ranks: list[dict[str, Any]], serial: dict[str, Any], relative: float = EXACT) -> None:
    """The first pair has the serial net's loss, gradients, weights, velocities; the second the first's, to the bit."""
    for ours, expected in zip(ranks[0]["losses"], serial["losses"], strict=True):
        assert ours == pytest.approx(expected, rel=relative)
    for what in ("gradients", "weights", "velocities"):
        found = ranks[0][what] | ranks[1][what]
        assert found.keys() == serial[what].keys()
        for key, tensor in serial[what].items():
            assert tensor.abs().max() > 0, f"{what} of {key} are all zero: the test would prove nothing"
            assert relative_error(found[key], tensor) < relative, f"{what} of {key}"
        for tower in (0, 1):
            assert all(torch.equal(ranks[tower + 2][what][key], own) for key, own in ranks[tower][what].items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_replicas_equal_serial(four: list[dict[str, Any]], accumulate: int) -> None:
    """float64, dropout on: four processes do what one does with the whole batch, in pieces or not."""
    serial = work.train_rows(None, "digits", 16, 5)
    assert_equal_serial([facts["trained"][accumulate] for facts in four], serial)


def test_two_replicas_equal_serial_in_fp32(four: list[dict[str, Any]]) -> None:
    """One step of the net without kinks."""
    serial = work.train_rows(None, "smooth", 16, 1, 1, torch.float32)
    assert_equal_serial([facts["smooth"] for facts in four], serial, RELATIVE)


@pytest.mark.slow
def test_two_replicas_of_the_paper_net_equal_serial() -> None:
    """The same for the net of the paper."""
    serial = work.train_rows(None, "paper", 4, 5)
    assert_equal_serial(run_mesh(work.train_rows, "paper", 4, 5, replicas=2), serial, EXPLODING)


def test_accumulation_equals_the_whole_batch() -> None:
    """float64, one process, in four pieces: the same loss, gradients and weights."""
    whole, pieces = (work.train_rows(None, "digits", 16, 5, accumulate) for accumulate in (1, 4))
    assert pieces["losses"] == pytest.approx(whole["losses"], rel=EXACT)
    for what in ("gradients", "weights", "velocities"):
        for key, tensor in whole[what].items():
            assert relative_error(pieces[what][key], tensor) < EXACT, f"{what} of {key}"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_only_the_crossings_and_one_sum_of_gradients(four: list[dict[str, Any]], accumulate: int) -> None:
    """The dispatcher's own count of calls and bytes: the sum travels once a step, also where it is accumulated."""
    batch_size, replicas = 8, 2
    ranks = [facts["counted"][accumulate] for facts in four]
    model = work.recipe("digits").model
    for rank, facts in enumerate(ranks):
        own = ("b->a", "a->b")[rank % 2 == 0]
        sums = {key: count for key, count in facts["calls"].items() if "allreduce" in key[0]}
        assert sum(size * count for (_, size), count in sums.items()) == 4 * facts["parameters"]
        assert sum(sums.values()) <= 4 * facts["parameters"] // BUCKET_BYTES + 1
        sent = Counter({key: count for key, count in facts["calls"].items() if key[0] == "send"})
        rows = batch_size // replicas // accumulate
        expected: Counter[tuple[str, int]] = Counter()
        for crossing in count_crossings(model):
            forward = {"a->b": crossing.bytes_a_to_b, "b->a": crossing.bytes_b_to_a}
            backward = forward["b->a" if own == "a->b" else "a->b"]
            expected.update({("send", size * rows): accumulate for size in (forward[own],) if size})
            expected.update({("send", size * rows): accumulate for size in (backward,) if size})
        assert sent == expected
        assert {key[0] for key in facts["calls"]} == {"send", "recv_", "allreduce_"}
        (row,) = [row for row in facts["ledger"] if row["kind"] == "replica"]
        assert row["bytes"] == 4 * facts["parameters"]
        assert row["calls"] == sum(sums.values())
        assert row["direction"] == ("a->a", "b->b")[rank % 2]


@pytest.mark.parametrize(
    ("what", "everywhere"),
    [
        ("finite", "finite False, stop False, plateaus 1"),
        ("stop", "finite True, stop True, plateaus 1"),
        ("plateaus", "finite True, stop False, plateaus 3"),
    ],
)
def test_one_rank_tells_all(four: list[dict[str, Any]], what: str, everywhere: str) -> None:
    """What the last of four ranks knows, all know before the update."""
    assert [facts["told"][what] for facts in four] == [everywhere] * 4


def test_different_work_is_noticed(four: list[dict[str, Any]]) -> None:
    """Another batch in the second pair, other gradients on its tower b: who compares with it says so."""
    assert all("step 7: replicas" in facts["told"]["batch"] for facts in four)
    assert all("have different batches" in facts["told"]["batch"] for facts in four)
    for rank in (1, 3):
        assert four[rank]["told"]["gradients"].startswith("step 7: replicas")
        assert four[rank]["told"]["gradients"].endswith("have different gradients")
    assert four[0]["told"]["gradients"] == "finite True, stop False, plateaus 1"
