"""The paper's rule by hand across rate drops, and every schedule against sequences worked out by hand."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from trainer.config import LayerOverride, OptimizerConfig, load_config
from trainer.errors import RecipeError
from trainer.training.optimizer import PaperSGD, Rates, count_plateaus, rates_at

pytestmark = pytest.mark.numeric


class OneLayer(nn.Module):
    """A weight and a bias, each one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0]], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))


def test_five_steps_by_hand() -> None:
    """v = 0.9 v - 0.0005 lr w - lr g, lr divided by 10 after step 3; biases at twice the rate, without decay."""
    config = OptimizerConfig(learning_rate=0.01, bias_learning_rate=0.02, momentum=0.9, weight_decay=0.0005)
    layer = OneLayer()
    optimizer = PaperSGD(layer.named_parameters(), config)
    w, vw, b, vb = 1.0, 0.0, 0.5, 0.0
    for step, (gw, gb) in enumerate([(0.3, -1.0), (0.1, 0.2), (-0.5, 0.7), (0.4, 0.0), (0.25, -0.125)]):
        factor = 1.0 if step < 3 else 0.1
        layer.weight.grad = torch.tensor([[gw]], dtype=torch.float64)
        layer.bias.grad = torch.tensor([gb], dtype=torch.float64)
        optimizer.set_rates(Rates(0.01 * factor, 0.02 * factor))
        optimizer.step()
        vw = 0.9 * vw - 0.0005 * 0.01 * factor * w - 0.01 * factor * gw
        w += vw
        vb = 0.9 * vb - 0.02 * factor * gb
        b += vb
        assert layer.weight.item() == pytest.approx(w, rel=1e-14)
        assert layer.bias.item() == pytest.approx(b, rel=1e-14)


def test_differs_from_torch_sgd_only_after_a_drop() -> None:
    """At a constant rate the two rules agree; one step after a drop they do not (torch scales the old velocity too)."""
    config = OptimizerConfig(learning_rate=0.1, bias_learning_rate=0.1, weight_decay=0.01, decay_biases=True)
    ours, theirs = OneLayer(), OneLayer()
    paper = PaperSGD(ours.named_parameters(), config)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(6):
        for layer in (ours, theirs):
            for parameter in layer.parameters():
                parameter.grad = torch.full_like(parameter, 0.3)
        if step == 5:
            paper.set_rates(Rates(0.01, 0.01))
            sgd.param_groups[0]["lr"] = 0.01
        paper.step()
        sgd.step()
        if step < 5:
            torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=0)
    assert abs(ours.weight.item() - theirs.weight.item()) > 0.05


class ThreeLayers(nn.Module):
    """conv1 and conv2 with one-number weights and biases, conv1 with a batch norm's scale; all 1.0."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("conv1", "conv2"):
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
            layer.bias = nn.Parameter(torch.ones(1, dtype=torch.float64))
            self.add_module(name, layer)
        self.conv1.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def read(self) -> dict[str, float]:
        return {name: parameter.item() for name, parameter in self.named_parameters()}


@pytest.mark.parametrize(
    ("bias_schedule", "factors"),
    [
        ({"bias_schedule": "same"}, [1, 0.1, 0.01, 0.01]),
        ({"bias_schedule": "constant"}, [1, 1, 1, 1]),
        ({"bias_schedule": "halfway", "bias_gamma": 0.3}, [1, 1, 0.3, 0.3]),
        ({"bias_schedule": "steps", "bias_gamma": 0.5, "bias_milestones": (1.0, 3.0)}, [1, 0.5, 0.5, 0.25]),
    ],
)
def test_schedules_of_the_biases(bias_schedule: dict[str, Any], factors: list[float]) -> None:
    """At epochs 0 to 3 of 4, beside weights that fall at 1 and 2; a layer without a bias rate of its own follows."""
    own = (LayerOverride("fc8", 2.0, 0.3),)
    config = OptimizerConfig(bias_learning_rate=0.02, milestones=(1.0, 2.0), layer_overrides=own, **bias_schedule)
    rates = [rates_at(config, float(epoch), epochs=4) for epoch in range(4)]
    assert [row.weights for row in rates] == pytest.approx([0.01, 0.001, 0.0001, 0.0001])
    assert [row.biases for row in rates] == pytest.approx([0.02 * factor for factor in factors])
    assert [row.layers for row in rates[:2]] == [{}, {}]
    assert rates[3].layers["fc8"] == (0.3, rates[3].biases)


def test_warm_up_is_linear_and_leaves_late_rates_alone() -> None:
    """Half of the warm-up: half of both rates."""
    config = OptimizerConfig(
        bias_learning_rate=0.02, warmup_epochs=2.0, layer_overrides=(LayerOverride("fc8", 0.0, 0.3, 0.4),)
    )
    assert rates_at(config, 0.5, epochs=9) == Rates(0.0025, 0.005, {"fc8": (0.3, 0.4)})
    assert rates_at(config, 2.0, epochs=9) == Rates(0.01, 0.02, {"fc8": (0.3, 0.4)})


@pytest.mark.parametrize(
    ("errors", "counts"),
    [
        ([0.9, 0.8, 0.7, 0.6], [0, 0, 0, 0]),
        # two without a fall: a drop; then the error falls, stays for two: a second
        ([0.9, 0.9, 0.9, 0.8, 0.8, 0.8], [0, 0, 1, 1, 1, 2]),
        # falls by less than the threshold of 0.01 do not count, and add up to one that does
        ([0.500, 0.495, 0.489, 0.489, 0.489], [0, 0, 0, 0, 1]),
        # rising counts as waiting; never more than three drops
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], [0, 0, 1, 1, 2, 2, 3, 3, 3]),
    ],
)
def test_plateaus_by_hand(errors: list[float], counts: list[int]) -> None:
    """Patience 2, threshold 0.01, most 3: the count after each evaluation; it never falls as evaluations are added."""
    config = OptimizerConfig(schedule="plateau", patience=2, threshold=0.01, max_drops=3)
    assert [count_plateaus(errors[: n + 1], config) for n in range(len(errors))] == counts
    factors = [rates_at(config, 3.0, epochs=90, plateaus=count).weights for count in counts]
    assert factors == pytest.approx([0.01 * 0.1**count for count in counts], rel=1e-12)


def test_late_rates_by_hand() -> None:
    """conv1's weights slow down, then all of it freezes, velocity and all; conv2 goes on; a scale moves like a bias."""
    config = OptimizerConfig(
        learning_rate=0.01,
        bias_learning_rate=0.02,
        weight_decay=0.5,
        milestones=(2.0,),
        layer_overrides=(LayerOverride("conv1", 1.0, 0.001), LayerOverride("conv1", 2.0, 0.0, 0.0)),
    )
    net = ThreeLayers()
    optimizer = PaperSGD(net.named_parameters(), config)
    values = dict.fromkeys(net.read(), 1.0)
    speeds = dict.fromkeys(values, 0.0)
    by_hand = [  # rates of conv1.weight, conv1.bias and .scale, conv2.weight, conv2.bias at epochs 0, 1, 2
        (0.01, 0.02, 0.01, 0.02),
        (0.001, 0.02, 0.01, 0.02),
        (0.0, 0.0, 0.001, 0.002),
    ]
    for epoch, (w1, b1, w2, b2) in enumerate(by_hand):
        rates = {"conv1.weight": w1, "conv1.bias": b1, "conv1.scale": b1, "conv2.weight": w2, "conv2.bias": b2}
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, 0.25)
        optimizer.set_rates(rates_at(config, float(epoch), epochs=3))
        optimizer.step()
        for name, rate in rates.items():
            if rate:
                decay = 0.5 if name.endswith("weight") else 0.0
                speeds[name] = 0.9 * speeds[name] - decay * rate * values[name] - rate * 0.25
                values[name] += speeds[name]
        assert net.read() == pytest.approx(values, rel=1e-13), f"epoch {epoch}"
        found = {name: optimizer.velocity(parameter).item() for name, parameter in net.named_parameters()}
        assert found == pytest.approx(speeds, rel=1e-13), f"epoch {epoch}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('optimizer.layer_overrides=[{layer="conv9", epoch=1, learning_rate=0}]', "one of conv1"),
        ('optimizer.layer_overrides=[{layer="conv1", epoch=1}]', "a table with learning_rate"),
        (
            'optimizer.layer_overrides=[{layer="conv1", epoch=3, learning_rate=1e-4}, '
            '{layer="conv1", epoch=2, learning_rate=0}]',
            "rising epochs for conv1",
        ),
        ("optimizer.bias_milestones=[3]", "none: not used by same"),
        ("optimizer.bias_schedule=steps", "for biases that never drop: constant"),
        (
            'optimizer.layer_overrides=[{layer="conv1", epoch=1, learning_rate=0, bias_learning_rate=-1}]',
            "0 or more",
        ),
        ("optimizer.milestones=[3, 2]", "rising epochs"),
        ("optimizer.patience=0", "1 or more"),
        ("optimizer.schedule=cosine", "one of steps, log_thirds, plateau"),
    ],
)
def test_mistakes_in_schedules_are_named(override: str, message: str) -> None:
    """A setting that would have no effect is an error, too."""
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_config(None, [override])


def test_plateau_needs_evaluations_and_no_steps() -> None:
    """Two settings that contradict each other."""
    with pytest.raises(RecipeError, match="plateau looks at the evaluations"):
        load_config(None, ["optimizer.schedule=plateau", "train.evaluate_every_epochs=0"])
    with pytest.raises(RecipeError, match="none: not used by plateau"):
        load_config(None, ["optimizer.schedule=plateau", "optimizer.milestones=[30]"])
