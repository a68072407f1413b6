"""The paper's update rule (section 5) and its learning rates.

The learning rate stands *inside* the velocity: ``v = 0.9 v - 0.0005 lr w - lr g; w = w + v``. ``torch.optim.SGD`` keeps
it outside, which is the same rule at a constant rate and another one for some steps after every drop.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.config import OptimizerConfig
from trainer.model import kernels
from trainer.model.alexnet import layer_of
from trainer.model.gpu_layers import low_copy
from trainer.model.kernels.interface import Factors, Member, UpdateAll


@dataclasses.dataclass(frozen=True)
class Rates:
    """Learning rates of one step.

    Attributes:
        weights: of the weights.
        biases: of the biases, and of a batch normalization's scale and shift.
        layers: weights' and biases' rate of layers that have their own (conv1 ...); 0 leaves parameters and their
            velocities as they are.
    """

    weights: float
    biases: float
    layers: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


class PaperSGD(torch.optim.Optimizer):
    """Momentum SGD as in 2012.

    Args:
        parameters: ``(name, parameter)`` pairs of the net. Biases, and a batch normalization's scale and shift, get
            the bias rate and no decay: all that has one dimension.
        config: rates, momentum, decay.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> None:
        own = {override.layer for override in config.layer_overrides}
        members: dict[tuple[str, bool], list[nn.Parameter]] = {("", True): [], ("", False): []}
        for name, parameter in parameters:
            layer = layer_of(name)
            key = (layer if layer in own else "", parameter.dim() > 1)
            members.setdefault(key, []).append(parameter)
        groups = [
            {
                "params": listed,
                "layer": layer,
                "are_weights": are_weights,
                "weight_decay": config.weight_decay if are_weights or config.decay_biases else 0.0,
            }
            for (layer, are_weights), listed in members.items()
        ]
        super().__init__(groups, {"momentum": config.momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["velocity"] = torch.zeros_like(parameter)
        self.set_rates(Rates(config.learning_rate, config.bias_learning_rate))
        self._launch: UpdateAll | None = None  # of all parameters on a GPU, made at the first step

    def set_rates(self, rates: Rates) -> None:
        """Sets every learning rate from now on (see :func:`rates_at`)."""
        for group in self.param_groups:
            weights, biases = rates.layers.get(group["layer"], (rates.weights, rates.biases))
            group["rate"] = weights if group["are_weights"] else biases

    def velocity(self, parameter: Tensor) -> Tensor:
        """The velocity of a parameter, same shape and dtype."""
        return self.state[parameter]["velocity"]

    @torch.no_grad()
    def step(self, closure: Any = None, *, guard: Tensor | None = None) -> None:  # type: ignore[override]
        """Applies the rule to every parameter; gradients must be there.

        Args:
            closure: not used; torch's interface has it.
            guard: a scalar on the parameters' device; where it is 0, nothing changes. A GPU looks at it itself, so that
                nobody waits for it (with Triton).
        """
        members: list[tuple[Tensor, Factors]] = []
        for group in self.param_groups:
            weights: list[Tensor] = group["params"]
            rate = group["rate"]
            if not weights or rate == 0:
                continue
            factors = (group["momentum"], rate * group["weight_decay"], rate)
            on_gpu = [parameter for parameter in weights if kernels.on_gpu(parameter) and self._fits(parameter)]
            members += [(parameter, factors) for parameter in on_gpu]
            left = weights if not on_gpu else [parameter for parameter in weights if not self._fits(parameter)]
            rest = [parameter for parameter in left if not self._fused(parameter, factors, guard)]
            if rest and (guard is None or guard):
                self._foreach(rest, factors)
        if members:
            self._update_all(members, guard)

    def _fits(self, parameter: Tensor) -> bool:
        """Whether weights, velocity and gradient lie in memory alike, without gaps, and are of one dtype."""
        velocity, gradient = self.velocity(parameter), cast(Tensor, parameter.grad)
        dense = parameter.is_contiguous() or parameter.is_contiguous(memory_format=torch.channels_last)
        alike = parameter.stride() == velocity.stride() == gradient.stride()
        return dense and alike and parameter.dtype == velocity.dtype == gradient.dtype != torch.bfloat16

    def _fused(self, parameter: Tensor, factors: Factors, guard: Tensor | None) -> bool:
        """The rule in one pass over memory, where there is a kernel for it."""
        functions = kernels.of(parameter) if self._fits(parameter) else None
        if functions is None:
            return False
        velocity, gradient = self.velocity(parameter), cast(Tensor, parameter.grad)
        functions.update(parameter, velocity, gradient, factors, guard)
        torch.autograd.graph.increment_version((parameter, velocity))
        return True

    def _update_all(self, members: list[tuple[Tensor, Factors]], guard: Tensor | None) -> None:
        """The rule for all parameters on a GPU in one launch, which writes their bfloat16 copies too."""
        if self._launch is None:
            functions = kernels.on_gpu(members[0][0])
            assert functions is not None
            self._launch = functions.make_update(members[0][0].device)
        copies = [low_copy(parameter) for parameter, _ in members]
        rows = []
        for (parameter, factors), copy in zip(members, copies, strict=True):
            velocity, gradient = self.velocity(parameter), cast(Tensor, parameter.grad)
            current = copy is not None and copy.version == parameter._version
            rows.append(Member(parameter, velocity, gradient, copy.tensor if copy and current else None, factors))
        self._launch(rows, guard)
        changed = [tensor for row in rows for tensor in (row.w, row.v)]
        torch.autograd.graph.increment_version(changed)
        for (parameter, _), copy, row in zip(members, copies, rows, strict=True):
            if copy is not None and row.low is not None:
                copy.version = parameter._version

    def _foreach(self, weights: list[Tensor], factors: Factors) -> None:
        """The rule in four passes, for any tensors."""
        momentum, decay, rate = factors
        velocities = [self.velocity(parameter) for parameter in weights]
        torch._foreach_mul_(velocities, momentum)
        if decay:
            torch._foreach_add_(velocities, weights, alpha=-decay)
        gradients = [cast(Tensor, parameter.grad) for parameter in weights]
        torch._foreach_add_(velocities, gradients, alpha=-rate)
        torch._foreach_add_(weights, velocities)


def rates_at(config: OptimizerConfig, epoch: float, *, epochs: float, plateaus: int = 0) -> Rates:
    """The learning rates at a point of training; a pure function, so that a resumed run has the same ones.

    Args:
        config: the schedule.
        epoch: passes over the training split so far, with fraction: step / steps per epoch.
        epochs: passes of the whole run.
        plateaus: drops that :func:`count_plateaus` found so far.
    """
    warm = min(1.0, epoch / config.warmup_epochs) if config.warmup_epochs else 1.0
    weights = config.learning_rate * warm * _weight_factor(config, epoch, epochs, plateaus)
    biases = config.bias_learning_rate * warm * _bias_factor(config, epoch, epochs, plateaus)
    layers = {}
    for override in config.layer_overrides:  # a later one of the same layer replaces an earlier one
        if epoch >= override.epoch:
            own = biases if override.bias_learning_rate is None else override.bias_learning_rate
            layers[override.layer] = (override.learning_rate, own)
    return Rates(weights, biases, layers)


def _weight_factor(config: OptimizerConfig, epoch: float, epochs: float, plateaus: int) -> float:
    """What the schedule multiplies the weights' rate by."""
    if config.schedule == "steps":
        return config.gamma ** _passed(config.milestones, epoch)
    if config.schedule == "plateau":
        return config.gamma**plateaus
    quarters = [epochs * quarter / 4 for quarter in (1, 2, 3)]
    return config.final_lr_ratio ** (_passed(quarters, epoch) / 3)


def _bias_factor(config: OptimizerConfig, epoch: float, epochs: float, plateaus: int) -> float:
    """What the schedule multiplies the biases' rate by."""
    if config.bias_schedule == "same":
        return _weight_factor(config, epoch, epochs, plateaus)
    drops = {"constant": (), "halfway": (epochs / 2,), "steps": config.bias_milestones}[config.bias_schedule]
    return config.bias_gamma ** _passed(drops, epoch)


def _passed(marks: Sequence[float], epoch: float) -> int:
    """How many of the marks lie at or before ``epoch``."""
    return sum(epoch >= mark for mark in marks)


def count_plateaus(errors: Sequence[float], config: OptimizerConfig) -> int:
    """How often the held-out error has stopped falling, each time with the learning rate of then.

    Paper, section 5: "divide the learning rate by 10 when the validation error rate stopped improving with the current
    learning rate"; how long to wait is not said there, and is ``patience`` here.

    Args:
        errors: top-1 errors (0..1) of every evaluation so far, oldest first.
        config: patience, threshold and the most drops.
    """
    plateaus, best, waited = 0, float("inf"), 0
    for error in errors:
        if error <= best - config.threshold:
            best, waited = error, 0
            continue
        waited += 1
        if waited == config.patience:
            plateaus, waited = plateaus + 1, 0
    return min(plateaus, config.max_drops)
