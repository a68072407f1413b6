"""What must be the same in all processes of a run before its first step."""

import platform
from pathlib import Path

import torch

from pipeline.manifest import read_manifest
from trainer.config import Config, to_toml
from trainer.model import kernels
from trainer.parallel.status import Fact


def facts_of_start(config: Config, data: Path, step: int, device: str) -> dict[str, Fact]:
    """By what a message calls them.

    Args:
        config: the recipe.
        data: data set folder.
        step: to start from.
        device: ``cpu`` or ``cuda:N``.
    """
    return {
        "train.precision (auto is what a machine is fast in: name one, with --set train.precision=fp32)": Fact(
            config.train.precision
        ),
        "the recipe": Fact(tuple(to_toml(config).splitlines())),
        "the data set": Fact(read_manifest(data).fingerprint, shown=f"{data} on {platform.node()}"),
        "torch version": Fact(torch.__version__),
        "step to start from": Fact(step),
        "kernels (see TWOTOWER_KERNELS in docs/commands.md)": Fact(kernels.describe(device)),
    }
