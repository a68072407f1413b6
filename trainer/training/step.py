"""The gradients of one step: of the whole batch, whatever part of it this process holds, and in however many pieces."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.model.alexnet import AlexNet
from trainer.model.layers import DropoutDraws
from trainer.parallel.data_parallel import GradientSum
from trainer.parallel.mesh import Mesh, MeshCoord
from trainer.precision import allow_tf32, autocast


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
        self._net, self._config, self._device, self._timed = net, config, device, timed
        self.precision: str = config.precision  # the benchmark measures another one on the same net
        allow_tf32(self.precision, device)
        self._coord = mesh.coord if mesh else MeshCoord(0, 2)
        several = mesh.replicas if mesh else None
        self._sum = GradientSum(list(net.parameters()), several) if several else None

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> float:
        """Sets the gradient of every parameter to that of the mean loss over the whole batch.

        Args:
            images: this replica's rows of the batch, (N, C, S, S), of :func:`trainer.precision.image_dtype`.
            labels: (N,) int64.
            step: step of the run, from 0; decides the dropout masks.

        Returns:
            Mean loss of the rows here; nan on tower b, which does not know it.
        """
        with self._timed("transfer"):
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
            draws = DropoutDraws(self._config.seed, step, first=first + begin)
            with self._timed("forward"), autocast(self.precision, self._device):
                loss = self._net.loss(images[piece], labels[piece], draws)
            with self._timed("backward"):
                (loss * (size / total)).backward()  # an image's share is that in the mean over the whole batch
            losses.append(loss.detach())
        if self._sum:
            with self._timed("backward"):
                self._sum.finish()
        return float(torch.stack(losses).mean()) if "a" in self._net.towers else math.nan


def gradient_norms(net: AlexNet) -> dict[str, float]:
    """Euclidean norm of all gradients, by tower held here."""
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {
        name: float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(parts.values())))))
        for name, parts in net.split_towers(gradients).items()
    }
