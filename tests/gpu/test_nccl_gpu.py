"""Two ranks on one card over NCCL: equal to one process, counted right, and what happens when one is lost.

The bodies are in ``tests.helpers.two_ranks``; ``tests/trainer/parallel/test_two_ranks.py`` runs them over gloo.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import two_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda:0"


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks found, in one start."""
    folder = tmp_path_factory.mktemp("nccl")
    codes, said = two_ranks.start("facts", DEVICE, folder)
    assert codes == [0, 0], said
    assert "destroy_process_group" not in "".join(said), "torch warns where a group is left"
    return two_ranks.results(folder)


def test_nccl_carries_it(facts: list[dict[str, Any]]) -> None:
    assert [rank["backend"] for rank in facts] == ["nccl", "nccl"]


def test_two_ranks_equal_one_process(facts: list[dict[str, Any]]) -> None:
    two_ranks_equal(facts, two_ranks.train(None, DEVICE))


def two_ranks_equal(facts: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Loss and gradients of a step, losses and weights of five updates, in float64."""
    first, second = (rank["trained"] for rank in facts)
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-9, atol=0)
    for what in ("gradients", "weights"):
        together = first[what] | second[what]
        assert together.keys() == alone[what].keys()
        for name, tensor in together.items():
            scale = float(alone[what][name].abs().max())
            torch.testing.assert_close(tensor, alone[what][name], rtol=0, atol=1e-9 * scale, msg=f"{what} {name}")


def test_the_ledger_equals_what_nccl_counts(facts: list[dict[str, Any]]) -> None:
    for rank in facts:
        assert rank["nccl"], "NCCL logged no message: has NCCL_DEBUG_SUBSYS=COLL changed?"
        assert len(rank["nccl"]) == sum(row["calls"] for row in rank["sent"])
        assert sum(rank["nccl"]) == sum(row["bytes"] for row in rank["sent"])


def test_the_tower_computes_while_halves_cross(facts: list[dict[str, Any]]) -> None:
    """By the profiler: kernels of this process that ran while one of NCCL's was under way."""
    for rank in facts:
        assert rank["overlap"]


def test_a_run_that_goes_on_equals_one_in_one_go(facts: list[dict[str, Any]]) -> None:
    resumed_equals_whole(facts)


def resumed_equals_whole(facts: list[dict[str, Any]]) -> None:
    """Six steps, or three, a checkpoint and three more."""
    for rank in facts:
        assert rank["resumed"]["steps"] == [6, 3, 6]
        for name, tensor in rank["resumed"]["whole"].items():
            torch.testing.assert_close(rank["resumed"]["cut"][name], tensor, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_finite_changes_no_weights(facts: list[dict[str, Any]]) -> None:
    diverged_alike(facts)


def diverged_alike(facts: list[dict[str, Any]]) -> None:
    """Both ranks say so, of the step in which it happened, and keep their weights."""
    said = [rank["diverged"]["said"] for rank in facts]
    assert all("step 2: not finite" in text for text in said), said
    for rank in facts:
        for name, tensor in rank["diverged"]["before"].items():
            assert torch.equal(rank["diverged"]["after"][name], tensor) and tensor.isfinite().all()


@pytest.mark.parametrize("mode", ["killed", "hung"])
def test_a_lost_rank_ends_the_other_in_seconds(mode: str, tmp_path: Path) -> None:
    lost_rank_ends_the_other(mode, DEVICE, tmp_path)


def lost_rank_ends_the_other(mode: str, device: str, folder: Path) -> None:
    """With exit code 4 and one line."""
    codes, said = two_ranks.start(mode, device, folder)
    assert codes[0] == 4, said[0]
    lines = [line for line in said[0].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith("error: tower b (rank 1) is lost at "), said[0]
    if device == "cpu":
        assert said[0].splitlines() == lines
