"""Crossings overlap with computation that does not need them: by the order of events, never by time."""

from typing import Any

import pytest

from tests.helpers import tower_work as work
from tests.helpers.pair import run_pair
from tests.trainer.parallel.test_equality import EXACT, relative_error
from trainer.planning.describe import count_crossings

pytestmark = pytest.mark.numeric

BATCH = 4
# bfloat16 rounds by 2^-8 at most, by 2^-9 usually, in each of 16 layers (there and back) about four times: 8 x 2^-9 =
# 0.016 for a loss or a large tensor, several times that where a tensor has few numbers. A missing half: 0.7.
BF16_LOSS, BF16 = 0.016, 0.1
VARIANTS = (
    ("train.precision=bf16", *work.SMOOTH),
    ("train.comm_dtype=fp16",),
    ("train.comm_dtype=bf16", "train.accumulate=2"),
    ('model.crossings=["conv3", "fc8"]',),
    ('model.crossings=["fc6", "fc8"]', "model.activation=tanh"),
    ("model.paddings=[[2, 2], [2, 2], [0, 2], [1, 1], [1, 1]]",),
    ("model.strides=[1, 1, 2, 1, 1]", "model.paddings=[[2, 2], [2, 2], [4, 3], [1, 1], [1, 1]]"),
)


def halves_cross(layer: str, num_bytes: int, *, sums: str, add: str) -> list[str]:
    """Forward of a layer that sees both towers: its own half's sums while the halves cross, then the other's."""
    return [f"send {num_bytes}", f"recv_ {num_bytes}", sums, f"wait {layer} forward", add]


def gradients_cross(layer: str, num_bytes: int, product: str) -> list[str]:
    """Backward: the borrowed half's gradient leaves first; own half and both halves of the weights meanwhile."""
    return [product, f"send {num_bytes}", f"recv_ {num_bytes}", *[product] * 3, f"wait {layer} backward"]


@pytest.fixture(scope="module")
def towers() -> tuple[dict[str, Any], dict[str, Any]]:
    """What tower a and tower b found."""
    return run_pair(work.overlap_facts, VARIANTS, BATCH)


def test_a_tower_computes_while_halves_are_under_way(towers: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """All messages, waits and products of a step, in their order, on both towers."""
    size = {c.layer: c.bytes_b_to_a * BATCH for c in count_crossings(work.recipe("digits").model)}
    forward = ["convolution"] * 2 + halves_cross("conv3", size["conv3"], sums="convolution", add="convolution")
    forward += ["convolution"] * 2
    for layer in ("fc6", "fc7"):
        forward += halves_cross(layer, size[layer], sums="addmm", add="addmm_")
    backward = gradients_cross("fc7", size["fc7"], "mm") + gradients_cross("fc6", size["fc6"], "mm")
    backward += ["convolution_backward"] * 2 + gradients_cross("conv3", size["conv3"], "convolution_backward")
    backward += ["convolution_backward"] * 2
    fc8 = size["fc8"]
    on_a = [f"recv_ {fc8}", "addmm", "wait fc8 forward", "addmm_"], ["mm", f"send {fc8}", "mm", "mm", "mm"]
    on_b = [f"send {fc8}"], [f"recv_ {fc8}", "wait fc8 backward"]  # b's half leaves, and holds up nobody
    for found, own in zip(towers, (on_a, on_b), strict=True):
        assert found["events"] == (forward + own[0], own[1] + backward)


@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=[" ".join(overrides) for overrides in VARIANTS])
def test_variants_equal_serial(towers: tuple[dict[str, Any], dict[str, Any]], number: int) -> None:
    """Loss and every gradient of the first step: other precisions and wires, crossings left out, zeros on one side."""
    of_loss, relative = (BF16_LOSS, BF16) if "train.precision=bf16" in VARIANTS[number] else (EXACT, EXACT)
    expected = work.first_gradients(None, VARIANTS[number], BATCH)
    a, b = (facts["gradients"][number] for facts in towers)
    assert a.pop("loss") == pytest.approx(expected.pop("loss"), rel=of_loss)
    found = a | {key: value for key, value in b.items() if key != "loss"}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.norm() > 0 and found[key].dtype == gradient.dtype
        assert relative_error(found[key], gradient) < relative, key
