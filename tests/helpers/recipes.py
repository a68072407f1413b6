"""The recipes of configs/, at their own size and at a size for tests."""

from pathlib import Path

import torch

from trainer.config import Config, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# The recipe's structure at a size for tests: 67 px give maps of 15, 7, 3 and 1 px; louder weights, no decay.
SMALL = (
    "model.image_px=67",
    "model.classes=10",
    "model.channels=[6, 8, 8, 8, 8]",
    "model.hidden=[16, 16]",
    "model.init_std=[0.05, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2]",
    "optimizer.weight_decay=0",
)


def recipe(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.toml", overrides)


def a_batch(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight mean-subtracted images of noise that differ in contrast, and labels."""
    generator = torch.Generator().manual_seed(1)
    side = config.model.image_px
    images = torch.randn(8, config.model.in_channels, side, side, generator=generator)
    return images * torch.linspace(20, 80, 8).view(8, 1, 1, 1), torch.arange(8) % config.model.classes
