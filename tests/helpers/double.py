"""``python -m tests.helpers.double train ...``: the trainer's commands with all weights and sums in float64.

Other processes, other instructions and other numbers of threads add up in another order. In fp32 such a rounding moves
a unit across the kink of ReLU, or the winner of a pool, once in a few steps, and the runs part. In float64 the
roundings are half a billion times smaller: equal runs stay equal.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from trainer.__main__ import run
from trainer.model.alexnet import AlexNet
from trainer.parallel import launch


def use_float64() -> None:
    """New weights are float64; so is every image that enters the net; processes started from here do the same."""
    torch.set_default_dtype(torch.float64)
    forward, run_towers = AlexNet.forward, launch.run_towers

    def in_float64(net: AlexNet, images: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return forward(net, images.double(), *arguments)

    def start(command: Sequence[str], world: int, **more: Any) -> int:
        return run_towers([__spec__.name if word == "trainer" else word for word in command], world, **more)

    AlexNet.forward = in_float64  # type: ignore[method-assign]
    launch.run_towers = start


if __name__ == "__main__":
    use_float64()
    sys.exit(run())
