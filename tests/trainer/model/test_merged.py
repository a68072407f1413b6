"""Merged towers equal towers side by side: logits, loss and every gradient."""

from pathlib import Path

import pytest
import torch

from trainer.config import load_config
from trainer.model.alexnet import DropoutDraws, TwoTowerNet
from trainer.model.merged import MergedNet

pytestmark = pytest.mark.numeric

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize(
    ("name", "crossings"),
    [("digits", '["conv3", "fc6", "fc7", "fc8"]'), ("digits", '["fc8"]'), ("paper", '["conv3", "fc6", "fc7", "fc8"]')],
)
def test_merged_equals_the_towers(name: str, crossings: str) -> None:
    """float64 (in float32, rounding moves some units across the kink of ReLU), dropout on, channels_last and not."""
    config = load_config(CONFIGS / f"{name}.toml", [f"model.crossings={crossings}"])
    side = config.model.image_px
    images = torch.randn(2, config.model.channels, side, side, dtype=torch.float64) * (1 if name == "digits" else 50)
    labels = torch.tensor([1, 3])
    towers = TwoTowerNet(config.model, seed=2).double()
    merged = MergedNet(config.model, seed=2).double().to(memory_format=torch.channels_last)
    expected = towers.loss(images, labels, DropoutDraws(0, 0))
    found = merged.loss(images.contiguous(memory_format=torch.channels_last), labels, DropoutDraws(0, 0))
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    expected.backward()
    found.backward()
    gradients = {key: p.grad for key, p in towers.named_parameters()}
    for key, parameter in merged.named_parameters():
        assert parameter.grad is not None
        error = (parameter.grad - gradients[key]).norm() / gradients[key].norm().clamp_min(1e-20)
        assert error < 1e-9, key
