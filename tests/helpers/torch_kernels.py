"""The GPU's kernels as torch operations: for any device and dtype, float64 too."""

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional

from trainer.model.kernels.interface import BETA, Blocks, Changes, Layout, Norm, Parts, Pool, TowerMaps
from trainer.model.response_norm import response_norm

NOTHING = 255


class TorchKernels:
    """:class:`trainer.model.kernels.interface.GpuKernels` between convolutions: each by its formula.

    Attributes:
        called: what was called for maps, in order.
    """

    def __init__(self) -> None:
        self.called: list[str] = []

    def norm_maps(self, maps: TowerMaps, norm: Norm) -> Tensor:
        self.called.append("norm_maps")
        return _dense(_normalized(_whole(maps), norm))

    def pool_forward(self, maps: TowerMaps, pool: Pool, parts: int) -> tuple[Parts, Parts]:
        self.called.append("pool_forward")
        x = _whole(maps)
        y, indices = functional.max_pool2d(x, pool.px, pool.stride, ceil_mode=pool.ceil, return_indices=True)
        place = places_of(indices, x.shape[3], pool)
        if pool.rectify:
            y, place = y.relu(), place.where(y > 0, NOTHING)
        return _cut(y, parts), _cut(place.byte(), parts)

    def pool_backward(self, gradients: Parts, places: Parts, layout: Layout, pool: Pool) -> Changes:
        self.called.append("pool_backward")
        g, place = torch.cat(gradients, 1), torch.cat(places, 1).long()
        row, column = (torch.arange(side) * pool.stride for side in g.shape[2:])
        at = (row[:, None] + place // pool.px) * layout.shape[3] + column + place % pool.px
        slopes = torch.where(place == NOTHING, 0.0, g).flatten(2)
        dx = g.new_zeros(*layout.shape[:2], math.prod(layout.shape[2:]))
        dx.scatter_add_(2, at.where(place != NOTHING, 0).flatten(2), slopes)
        return _cut_changes(dx.view(layout.shape), layout)

    def pooled_norm_backward(self, maps: TowerMaps, gradients: Parts, places: Parts, norm: Norm, pool: Pool) -> Changes:
        whole = Layout(maps.layout.shape, 1, has_bias=False)
        ((slopes,), _) = self.pool_backward(gradients, places, whole, pool)
        self.called[-1] = "pooled_norm_backward"
        with torch.enable_grad():
            x = _whole(maps).detach().requires_grad_()
            (dx,) = torch.autograd.grad(_normalized(x, norm), x, slopes)
        return _cut_changes(dx, maps.layout)

    def relu_forward(self, maps: TowerMaps, parts: int) -> Parts:
        self.called.append("relu_forward")
        return _cut(_whole(maps).relu(), parts)

    def relu_backward(self, outputs: Parts, gradients: Parts, layout: Layout) -> Changes:
        self.called.append("relu_backward")
        return _cut_changes(torch.cat(gradients, 1).where(torch.cat(outputs, 1) > 0, 0), layout)

    def to_blocks(self, x: Tensor, blocks: Blocks) -> Tensor:
        return _dense(_in_blocks(x, blocks))

    def from_blocks(self, gradient: Tensor, shape: torch.Size, blocks: Blocks) -> Tensor:
        with torch.enable_grad():
            x = gradient.new_zeros(shape).requires_grad_()
            return _dense(torch.autograd.grad(_in_blocks(x, blocks), x, gradient)[0])


def places_of(indices: Tensor, width: int, pool: Pool) -> Tensor:
    """Places in their windows, from torch's indices in the whole map."""
    row, column = (torch.arange(side, device=indices.device) * pool.stride for side in indices.shape[2:])
    return (indices // width - row[:, None]) * pool.px + indices % width - column


def _in_blocks(x: Tensor, blocks: Blocks) -> Tensor:
    side, before, rows, columns = dataclasses.astuple(blocks)
    count, channels, height, width = x.shape
    x = functional.pad(x, (before, columns * side - width - before, before, rows * side - height - before))
    cut = x.reshape(count, channels, rows, side, columns, side).permute(0, 3, 5, 1, 2, 4)
    return cut.reshape(count, side * side * channels, rows, columns)


def _whole(maps: TowerMaps) -> Tensor:
    """All maps in one tensor, their bias added."""
    x = torch.cat(maps.parts, 1)
    return x if maps.bias is None else x + maps.bias.to(x.dtype)[:, None, None]


def _normalized(x: Tensor, norm: Norm) -> Tensor:
    """By the formula, the ReLU before it where asked for."""
    x = x.contiguous()  # no kernels for this layout
    x = x.relu() if norm.rectify else x
    return response_norm(x, size=norm.size, alpha=norm.alpha, beta=BETA, k=norm.k, maps=norm.maps)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _cut(x: Tensor, parts: int) -> Parts:
    return tuple(_dense(part) for part in x.chunk(parts, 1))


def _cut_changes(dx: Tensor, layout: Layout) -> Changes:
    return _cut(dx, layout.parts), dx.sum((0, 2, 3)) if layout.has_bias else None
