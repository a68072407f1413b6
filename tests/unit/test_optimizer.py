"""The paper's rule by hand, across a rate drop."""

import pytest
import torch
from torch import nn

from trainer.config import OptimizerConfig
from trainer.optimizer import PaperSGD, rate_factor


class OneLayer(nn.Module):
    """A weight and a bias, each one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))


def test_five_steps_by_hand() -> None:
    """v = 0.9 v - 0.0005 lr w - lr g, lr divided by 10 after step 3; biases at twice the rate, without decay."""
    config = OptimizerConfig(learning_rate=0.01, bias_learning_rate=0.02, momentum=0.9, weight_decay=0.0005)
    layer = OneLayer()
    optimizer = PaperSGD(layer.named_parameters(), config)
    w, vw, b, vb = 1.0, 0.0, 0.5, 0.0
    for step, (gw, gb) in enumerate([(0.3, -1.0), (0.1, 0.2), (-0.5, 0.7), (0.4, 0.0), (0.25, -0.125)]):
        factor = 1.0 if step < 3 else 0.1
        layer.weight.grad = torch.tensor([gw], dtype=torch.float64)
        layer.bias.grad = torch.tensor([gb], dtype=torch.float64)
        optimizer.set_rate_factor(factor)
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
            paper.set_rate_factor(0.1)
            sgd.param_groups[0]["lr"] = 0.01
        paper.step()
        sgd.step()
        if step < 5:
            torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=0)
    assert abs(ours.weight.item() - theirs.weight.item()) > 0.05


def test_schedule() -> None:
    """Drops multiply; the warm-up is linear."""
    config = OptimizerConfig(drop_epochs=(25.0, 51.0, 79.0), drop_factor=0.1, warmup_epochs=2.0)
    assert rate_factor(config, 0.5) == pytest.approx(0.25)
    assert rate_factor(config, 24.999) == 1.0
    assert rate_factor(config, 25.0) == pytest.approx(0.1)
    assert rate_factor(config, 60.0) == pytest.approx(0.01)
    assert rate_factor(config, 90.0) == pytest.approx(0.001)
