"""One step: the gradients of the whole batch, what all processes tell of them, the update.

On a GPU none of it makes the host wait: what the host wants to know it reads later
(:class:`trainer.parallel.status.PendingStatus`), and the update looks at a guard on the device.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.model.alexnet import AlexNet
from trainer.model.layers import DropoutDraws
from trainer.parallel.data_parallel import GradientSum
from trainer.parallel.mesh import Mesh, MeshCoord
from trainer.parallel.status import exchange_status
from trainer.precision import allow_tf32, autocast
from trainer.training.optimizer import PaperSGD


class ForwardBackward:
    """Forward and backward of a step.

    Args:
        net: the net, or this process's tower.
        config: batch size, pieces, precision, seed.
        mesh: the other processes, or None where this one is alone.
        device: ``cpu`` or ``cuda:N``.
        timed: opened around every phase, with its name; the benchmark's clock.
    """

    def __init__(
        self,
        net: AlexNet,
        config: TrainConfig,
        *,
        mesh: Mesh | None,
        device: str = "cpu",
        timed: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._net, self._config, self._device, self.timed = net, config, device, timed
        self.precision: str = config.precision  # the benchmark measures another one on the same net
        allow_tf32(self.precision, device)
        self._coord = mesh.coord if mesh else MeshCoord(0, 2)
        several = mesh.replicas if mesh else None
        self._sum = GradientSum(list(net.parameters()), several) if several else None

    def __call__(
        self, images: Tensor, labels: Tensor, step: int, starts: Mapping[tuple[str, str], Tensor] | None = None
    ) -> Tensor:
        """Sets the gradient of every parameter to that of the mean loss over the whole batch.

        Args:
            images: this replica's rows of the batch, (N, C, S, S), of :func:`trainer.precision.image_dtype`.
            labels: (N,) int64.
            step: step of the run, from 0; decides the dropout masks.
            starts: of the masks, see :class:`trainer.model.layers.DropoutDraws`; in place of ``step``.

        Returns:
            Mean loss of the rows here, a scalar on the device; nan on tower b, which does not know it.
        """
        with self.timed("transfer"):
            images = images.contiguous(memory_format=torch.channels_last)
        pieces, rows = self._config.accumulate, len(images)
        first, total = self._coord.replica * rows, self._coord.replicas * rows  # fewer in an epoch's partial last batch
        size = rows // pieces
        self._net.zero_grad(set_to_none=True)
        losses = []
        for begin in range(0, rows, size):
            if self._sum and begin + size == rows:
                self._sum.prepare_for_backward()
            piece = slice(begin, begin + size)
            draws = DropoutDraws(self._config.seed, step, first=first + begin, starts=starts)
            with self.timed("forward"), autocast(self.precision, self._device):
                loss = self._net.loss(images[piece], labels[piece], draws)
            with self.timed("backward"):
                # an image's share is that in the mean over the whole batch
                (loss if size == total else loss * (size / total)).backward()
            losses.append(loss.detach())
        if self._sum:
            with self.timed("backward"):
                self._sum.finish()
        mean = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        return mean if "a" in self._net.towers else torch.full_like(mean, torch.nan)


def gradient_norms(net: AlexNet) -> dict[str, Tensor]:
    """Euclidean norm of all gradients, by tower held here; scalars on their device."""
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    towers = net.split_towers(gradients)
    norms = torch.stack(torch._foreach_norm([part for parts in towers.values() for part in parts.values()]))
    of_towers = norms.split([len(parts) for parts in towers.values()])
    return {tower: torch.linalg.vector_norm(each) for tower, each in zip(towers, of_towers, strict=True)}


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What a step is given.

    Attributes:
        images: this replica's rows of the batch; labels: (N,) int64.
        host_words: gives :attr:`trainer.parallel.status.LocalStatus.words`; asked when they are told, so that a stop
            that comes while gradients are computed is this step's.
        step: of the run, from 0.
        words: (3,) int64, in place of what ``host_words`` gives; a step in a graph finds its numbers in tensors.
        starts: of the dropout masks, in place of ``step``.
    """

    images: Any
    labels: Tensor
    host_words: Callable[[], tuple[int, ...]]
    step: int
    words: Tensor | None = None
    starts: Mapping[tuple[str, str], Tensor] | None = None


class StepWork:
    """All that a device does in a step, in two halves; between them the host may look at the first one's outcome.

    Args:
        net: the net, or this process's tower.
        gradients: forward and backward.
        optimizer: the update.
        mesh: the other processes, or None where this one is alone.
        guarded: the update looks at a guard on the device, because the host does not look between the halves.

    Attributes:
        guard: 1 as long as all was finite in all processes and they had the same batches, then 0 for good: steps that
            were launched before the host knew change no weights. None where it is not ``guarded``.
        towers: those held here.
    """

    def __init__(
        self, net: AlexNet, gradients: ForwardBackward, optimizer: PaperSGD, *, mesh: Mesh | None, guarded: bool
    ) -> None:
        self.net, self.gradients, self.optimizer, self._mesh = net, gradients, optimizer, mesh
        self.towers = net.towers
        self.device = str(next(net.parameters()).device)
        self._words_device = "cpu" if mesh and not mesh.link.between_gpus else self.device
        self.guard = torch.ones((), device=self.device) if guarded else None

    def measure(self, inputs: StepInputs) -> Tensor:
        """Gradients, and what all processes tell of them: see :func:`trainer.parallel.status.exchange_status`."""
        loss = self.gradients(inputs.images, inputs.labels, inputs.step, inputs.starts)
        return self._tell(inputs, loss)

    def _tell(self, inputs: StepInputs, loss: Tensor) -> Tensor:
        with self.gradients.timed("check"):
            norms = gradient_norms(self.net)
            known = [*norms.values(), *([loss] if "a" in self.towers else [])]
            finite = torch.stack(known).abs().amax() < math.inf  # nan is not; fewer launches than isfinite
            words = on_host(inputs.host_words(), self._words_device) if inputs.words is None else inputs.words
            words = words.to(self._words_device, non_blocking=True)
            told, sound = exchange_status(self._mesh, words, finite, norms, loss)
            if self.guard is not None:
                self.guard.mul_(sound)
        return told

    def update(self) -> None:
        """Applies the gradients, unless the guard is shut."""
        with self.gradients.timed("optimizer"):
            self.optimizer.step(guard=self.guard)

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Inside, no clock looks at the phases: what is captured in a graph has no moment at which it runs."""
        link = self._mesh.link if self._mesh else None
        clocks = self.gradients.timed, link.timed if link else contextlib.nullcontext
        self.gradients.timed = contextlib.nullcontext
        if link:
            link.timed = contextlib.nullcontext
        try:
            yield
        finally:
            self.gradients.timed = clocks[0]
            if link:
                link.timed = clocks[1]


def on_host(words: Sequence[int], device: str) -> Tensor:
    """(N,) int64 in memory of the host from which a device can take it without a wait."""
    found = torch.tensor(words)
    return found.pin_memory() if device.startswith("cuda") else found
