"""The paper's update rule (section 5) and its learning rates.

The learning rate stands *inside* the velocity: ``v = 0.9 v - 0.0005 lr w - lr g; w = w + v``. ``torch.optim.SGD`` keeps
it outside, which is the same rule at a constant rate and another one for some steps after every drop.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.config import OptimizerConfig


class PaperSGD(torch.optim.Optimizer):
    """Momentum SGD as in 2012.

    Args:
        parameters: ``(name, parameter)`` pairs; names that end in ``bias`` get the bias rate.
        config: rates, momentum, decay.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> None:
        named = list(parameters)
        biases = [parameter for name, parameter in named if name.endswith("bias")]
        weights = [parameter for name, parameter in named if not name.endswith("bias")]
        decay = config.weight_decay
        groups = [
            {"params": weights, "base_rate": config.learning_rate, "weight_decay": decay},
            {
                "params": biases,
                "base_rate": config.bias_learning_rate,
                "weight_decay": decay if config.decay_biases else 0.0,
            },
        ]
        super().__init__(groups, {"momentum": config.momentum, "rate_factor": 1.0})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["velocity"] = torch.zeros_like(parameter)

    def set_rate_factor(self, factor: float) -> None:
        """Multiplies every base rate from now on (see :func:`rate_factor`)."""
        for group in self.param_groups:
            group["rate_factor"] = factor

    def velocity(self, parameter: nn.Parameter) -> Tensor:
        """The velocity of a parameter, same shape and dtype."""
        return self.state[parameter]["velocity"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Applies the rule to every parameter; gradients must be there."""
        for group in self.param_groups:
            weights: list[Tensor] = group["params"]
            if not weights:
                continue
            gradients = [cast(Tensor, parameter.grad) for parameter in weights]
            velocities = [self.state[parameter]["velocity"] for parameter in weights]
            rate = group["base_rate"] * group["rate_factor"]
            torch._foreach_mul_(velocities, group["momentum"])
            if group["weight_decay"]:
                torch._foreach_add_(velocities, weights, alpha=-rate * group["weight_decay"])
            torch._foreach_add_(velocities, gradients, alpha=-rate)
            torch._foreach_add_(weights, velocities)


def rate_factor(config: OptimizerConfig, epoch: float) -> float:
    """Factor on both learning rates at a point of training.

    Args:
        config: the schedule.
        epoch: passes over the training split so far, with fraction: step / steps per epoch.
    """
    drops = sum(epoch >= at for at in config.drop_epochs)
    warm = min(1.0, epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
    return warm * config.drop_factor**drops
