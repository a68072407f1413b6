"""Two processes equal one: loss, every gradient, weights after five steps; and nothing else crosses."""

from collections import Counter

import pytest
import torch

from tests.helpers import tower_work as work
from tests.helpers.pair import run_pair
from trainer.planning.describe import count_crossings

pytestmark = pytest.mark.numeric

# Two computations that add in another order. In fp32 a sum of n products is off by about sqrt(n) 2^-24 of its size.
# Forward and backward of eight layers, n up to 288, then the sum over the pixels of a batch, n up to 3136:
# sqrt(2) sqrt(16 x 288 + 3136) 2^-24 = 7e-6 between the two, typically, and several times that in a tensor of few
# numbers. A half that was rounded to fp16 on its way would be off by 2e-4. That is for one step without kinks (SMOOTH):
# where ReLU or pooling have kinks, or steps follow on steps, equality is a claim about float64: 7e-6 x 2^-29 = 1e-14.
RELATIVE = 5e-5
EXACT = 1e-12
EXPLODING = 1e-9  # on noise the loss of the paper's net grows from 22 to 10^15 in five steps, and roundings with it


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("name", "batch_size", "steps", "relative"),
    [
        ("digits", 16, 5, EXACT),
        pytest.param("paper", 4, 5, EXPLODING, marks=pytest.mark.slow),
        ("smooth", 16, 1, RELATIVE),
    ],
)
def test_two_processes_equal_serial(name: str, batch_size: int, steps: int, relative: float) -> None:
    """Dropout on: loss and every gradient of the first step, and the weights after the last."""
    dtype = torch.float32 if relative == RELATIVE else torch.float64
    serial = work.train_tower(None, name, batch_size, steps, dtype)
    towers = run_pair(work.train_tower, name, batch_size, steps, dtype)
    for ours, expected in zip(towers[0]["losses"], serial["losses"], strict=True):
        assert ours == pytest.approx(expected, rel=relative)
    for what in ("gradients", "weights"):
        found = towers[0][what] | towers[1][what]
        assert found.keys() == serial[what].keys()
        assert len(found) == 2 * (8 + 7)  # weight and bias of eight layers on tower a, seven on b
        for key, tensor in serial[what].items():
            assert tensor.abs().max() > 0, f"{what} of {key} are all zero: the test would prove nothing"
            assert found[key].dtype == dtype
            assert relative_error(found[key], tensor) < relative, f"{what} of {key}"


@pytest.mark.parametrize(("name", "batch_size"), [("digits", 8), pytest.param("paper", 2, marks=pytest.mark.slow)])
def test_only_the_four_crossings_and_control(name: str, batch_size: int) -> None:
    """The dispatcher's own count of c10d calls and bytes, and the ledger, both equal the counts from the recipe."""
    a, b = run_pair(work.count_one_step, name, batch_size)
    crossings = count_crossings(work.recipe(name).model)
    assert [crossing.layer for crossing in crossings] == ["conv3", "fc6", "fc7", "fc8"]
    from_a = Counter(("send", c.bytes_a_to_b * batch_size) for c in crossings if c.bytes_a_to_b)
    from_b = Counter(("send", c.bytes_b_to_a * batch_size) for c in crossings if c.bytes_b_to_a)
    to_a, to_b = (
        Counter({("recv_", n): k for (_, n), k in from_b.items()}),
        Counter({("recv_", n): k for (_, n), k in from_a.items()}),
    )
    assert a["forward"] == from_a + to_a
    assert b["forward"] == from_b + to_b
    assert a["backward"] == Counter({("send", n): k for (_, n), k in to_a.items()}) + Counter(
        {("recv_", n): k for (_, n), k in from_a.items()}
    )
    assert b["backward"] == Counter({("send", n): k for (_, n), k in to_b.items()}) + Counter(
        {("recv_", n): k for (_, n), k in from_b.items()}
    )
    control = Counter({("send", 24): 1, ("recv_", 24): 1})
    assert a["rest"] == control
    assert b["rest"] == control
    assert sorted(map(str, a["ledger"])) == sorted(map(str, b["ledger"]))
    assert sum(row["bytes"] for row in a["ledger"] if row["kind"] == "control") <= 64
    assert {row["kind"] for row in a["ledger"]} == {"crossing", "control"}
    for crossing in crossings:
        rows = {(r["phase"], r["direction"]): r["bytes"] for r in a["ledger"] if r["name"] == crossing.layer}
        forward = {"a->b": crossing.bytes_a_to_b * batch_size, "b->a": crossing.bytes_b_to_a * batch_size}
        expected = {("forward", way): n for way, n in forward.items() if n}
        expected |= {("backward", way[::-1].replace(">-", "->")): n for way, n in forward.items() if n}
        assert rows == expected, crossing.layer
