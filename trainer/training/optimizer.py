"""The paper's update rule (section 5) and its learning rates.

The learning rate stands *inside* the velocity: ``v = 0.9 v - 0.0005 lr w - lr g; w = w + v``. ``torch.optim.SGD`` keeps
it outside, which is the same rule at a constant rate and another one for some steps after every drop.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    def factors(self) -> tuple[Factors, ...]:
        """Of every group, as :func:`set_rates` has left them; those of rate 0 are not updated."""
        return tuple(
            (group["momentum"], group["rate"] * group["weight_decay"], group["rate"]) for group in self.param_groups
        )

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Any = None, *, guard: Tensor | None = None, captured: bool = False
    ) -> None:
        """Applies the rule to every parameter; gradients must be there.

        Args:
            closure: not used; torch's interface has it.
            guard: a scalar on the parameters' device; where it is 0, nothing changes. A GPU looks at it itself, so that
                nobody waits for it.
            captured: this is captured in a CUDA graph, which needs :meth:`is_one_launch`; addresses and rates are then
                sent by :meth:`send`, before the graph runs.
        """
        assert not captured or self.is_one_launch()
        members: list[tuple[Tensor, Factors]] = []
        for weights, factors in self._moving():
            launched = [parameter for parameter in weights if self._is_launched(parameter)]
            members += [(parameter, factors) for parameter in launched]
            left = weights if not launched else [parameter for parameter in weights if not self._is_launched(parameter)]
            rest = [parameter for parameter in left if not self._fused(parameter, factors, guard)]
            if rest and guard is None:
                self._foreach(rest, factors)
            elif rest:
                self._guarded_foreach(rest, factors, cast(Tensor, guard))
        if members:
            self._update_all(members, guard, captured=captured)

    def is_one_launch(self) -> bool:
        """Whether :meth:`step` is one launch, of a kernel that reads the rates on the device; gradients must be there.

        What is not, has its rates in what is launched: a graph would repeat them for good.
        """
        return all(self._is_launched(parameter) for weights, _ in self._moving() for parameter in weights)

    def send(self) -> None:
        """Tells a captured launch where gradients lie now, and the rates of the next step."""
        if self._launch is not None:
            members = [(parameter, factors) for weights, factors in self._moving() for parameter in weights]
            self._launch.send(self._rows(members))

    def _moving(self) -> Iterator[tuple[list[Tensor], Factors]]:
        """The parameters that are updated, by group."""
        for group, factors in zip(self.param_groups, self.factors(), strict=True):
            if group["params"] and group["rate"]:
                yield group["params"], factors

    def _is_launched(self, parameter: Tensor) -> bool:
        """Whether the one launch updates it."""
        return kernels.on_gpu(parameter) is not None and self._fits(parameter)

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

    def _rows(self, members: list[tuple[Tensor, Factors]]) -> list[Member]:
        """The members of the one launch, each with its bfloat16 copy where that is of its weights as they are."""
        rows = []
        for parameter, factors in members:
            copy, velocity, gradient = low_copy(parameter), self.velocity(parameter), cast(Tensor, parameter.grad)
            current = copy is not None and copy.version == parameter._version
            rows.append(Member(parameter, velocity, gradient, copy.tensor if copy and current else None, factors))
        return rows

    def _update_all(self, members: list[tuple[Tensor, Factors]], guard: Tensor | None, *, captured: bool) -> None:
        """The rule for all parameters on a GPU in one launch, which writes their bfloat16 copies too."""
        if self._launch is None:
            functions = kernels.on_gpu(members[0][0])
            assert functions is not None
            self._launch = functions.make_update(members[0][0].device)
        rows = self._rows(members)
        if not captured:
            self._launch.send(rows)
        self._launch(rows, guard)
        changed = [tensor for row in rows for tensor in (row.w, row.v)]
        torch.autograd.graph.increment_version(changed)
        for (parameter, _), row in zip(members, rows, strict=True):
            copy = low_copy(parameter)
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

    def _guarded_foreach(self, weights: list[Tensor], factors: Factors, guard: Tensor) -> None:
        """The same bits, unless the guard is 0; nobody waits for it."""
        momentum, decay, rate = factors
        velocities = [self.velocity(parameter) for parameter in weights]
        found = torch._foreach_mul(velocities, momentum)
        if decay:
            torch._foreach_add_(found, weights, alpha=-decay)
        gradients = [cast(Tensor, parameter.grad) for parameter in weights]
        torch._foreach_add_(found, gradients, alpha=-rate)
        moved = torch._foreach_add(weights, found)
        is_open = guard != 0
        for old, new in zip((*velocities, *weights), (*found, *moved), strict=True):
            old.copy_(torch.where(is_open, new, old))


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
