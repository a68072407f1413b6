"""What follows a convolution; on a GPU by kernels of our own, each of which reads the maps once.

A pass is a ReLU, or a max pooling with the ReLU or the normalization before it and a ReLU behind it. The first one adds
the convolution's bias, the last one leaves the towers as the next convolution wants them, together or apart: neither is
a pass of its own (see :class:`.kernels.interface.TowerMaps`). In the backward the gradient of the bias is added up
where that of the maps is written.

What that saves, in bytes moved for conv1 of the paper (bfloat16; x: bytes of conv1's output): torch's bias,
normalization, ReLU and pooling would read and write 2 x each, and keep x, the normalized x and 8 bytes an output. Here
the forward moves 2 x for the normalization and 1.4 x for the pooling, and the normalized x is not kept; the backward
moves 2.4 x where three passes would move 5.4 x. The two forward passes stay two: windows overlap, so a pooled pixel
needs nine normalized ones, and in one pass each root would be taken 2.25 times.
"""

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.model import kernels
from trainer.model.gpu_layers import join
from trainer.model.kernels.interface import MOST_POOL_PX, Changes, GpuKernels, Norm, Parts, Pool, TowerMaps
from trainer.model.response_norm import LocalResponseNorm


class PostOps(nn.Sequential):
    """What follows a convolution, in order.

    Args:
        modules: by name.
        parts: how the next layer wants the maps on a GPU: of all towers in one tensor, or of each in one.
    """

    def __init__(self, modules: "OrderedDict[str, nn.Module]", parts: int = 1) -> None:
        super().__init__(modules)
        self.parts = parts

    def forward(self, x: Tensor | TowerMaps) -> Tensor | TowerMaps:
        """(N, C, H, W) -> (N, C, H', W'); only kernels of a GPU leave the towers apart."""
        maps = x if isinstance(x, TowerMaps) else TowerMaps((x,))
        functions = kernels.on_gpu(maps.parts[0])
        if functions is None:
            return super().forward(join(x))
        modules = list(self)
        while modules:
            step = next_pass(modules)
            modules = modules[step.modules :]
            maps = step(maps, 1 if modules else self.parts, functions)
        return maps if len(maps.parts) > 1 and maps.bias is None else join(maps)


@dataclasses.dataclass(frozen=True)
class Pass:
    """What is done of some modules in one pass over the maps.

    Attributes:
        modules: how many they are.
        plain: the module, where no kernel does it.
        norm: the normalization, before the pooling.
        pool: the pooling, with any ReLU beside it; where there is none: a ReLU.
    """

    modules: int
    plain: nn.Module | None = None
    norm: LocalResponseNorm | None = None
    pool: Pool | None = None

    def __call__(self, maps: TowerMaps, parts: int, functions: GpuKernels) -> TowerMaps:
        """(N, C, H, W) -> (N, C, H', W') in ``parts``, but for what no kernel does."""
        if self.plain is not None:
            return TowerMaps((self.plain(join(maps)),))
        given = (parts, maps.bias, *(_dense(part) for part in maps.parts))
        if self.pool is None:
            return TowerMaps(_Relu.apply(functions, *given))
        if self.norm is None:
            return TowerMaps(_MaxPool.apply(functions, self.pool, *given))
        norm = self.norm.as_norm(math.prod(maps.layout.shape))
        return TowerMaps(_NormMaxPool.apply(functions, norm, self.pool, *given))


def next_pass(modules: Sequence[nn.Module]) -> Pass:
    """What the first of some modules come to: as many as one pass does."""
    first = modules[0]
    is_norm, is_relu = isinstance(first, LocalResponseNorm) and first.is_known, isinstance(first, nn.ReLU)
    at = 1 if is_norm or is_relu else 0
    found = modules[at] if at < len(modules) else None
    if isinstance(found, nn.MaxPool2d) and cast(int, found.kernel_size) <= MOST_POOL_PX:
        count = at + 1
        is_after = count < len(modules) and isinstance(modules[count], nn.ReLU)  # the largest of what is above 0
        pool = Pool(cast(int, found.kernel_size), cast(int, found.stride), found.ceil_mode, is_relu or is_after)
        return Pass(count + is_after, norm=cast(LocalResponseNorm, first) if is_norm else None, pool=pool)
    return Pass(1) if is_relu else Pass(1, plain=first)


def _dense(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def _changes(ctx: Any, changes: Changes) -> tuple[Tensor | None, ...]:
    """The gradients to the bias, in its dtype, and to the parts."""
    parts, bias = changes
    return (None if bias is None else bias.to(ctx.bias_dtype), *parts)


class _Relu(torch.autograd.Function):
    """Bias and ReLU; keeps what comes out, which the next convolution keeps anyway."""

    @staticmethod
    def forward(ctx: Any, functions: GpuKernels, parts: int, bias: Tensor | None, *xs: Tensor) -> Parts:
        maps = TowerMaps(xs, bias)
        ys = functions.relu_forward(maps, parts)
        ctx.save_for_backward(*ys)
        ctx.functions, ctx.layout, ctx.bias_dtype = functions, maps.layout, bias.dtype if bias is not None else None
        return ys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slopes = tuple(_dense(gradient) for gradient in gradients)
        return None, None, *_changes(ctx, ctx.functions.relu_backward(ctx.saved_tensors, slopes, ctx.layout))


class _MaxPool(torch.autograd.Function):
    """Bias and pooling, with its ReLU; keeps a byte an output."""

    @staticmethod
    def forward(ctx: Any, functions: GpuKernels, pool: Pool, parts: int, bias: Tensor | None, *xs: Tensor) -> Parts:
        maps = TowerMaps(xs, bias)
        ys, places = functions.pool_forward(maps, pool, parts)
        ctx.save_for_backward(*places)
        ctx.arguments = (maps.layout, pool)
        ctx.functions, ctx.bias_dtype = functions, bias.dtype if bias is not None else None
        return ys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slopes = tuple(_dense(gradient) for gradient in gradients)
        changes = ctx.functions.pool_backward(slopes, ctx.saved_tensors, *ctx.arguments)
        return None, None, None, *_changes(ctx, changes)


class _NormMaxPool(torch.autograd.Function):
    """Bias, normalization (with its ReLU) and pooling; keeps the convolution's output and a byte an output."""

    @staticmethod
    def forward(
        ctx: Any, functions: GpuKernels, norm: Norm, pool: Pool, parts: int, bias: Tensor | None, *xs: Tensor
    ) -> Parts:
        normalized = TowerMaps((functions.norm_maps(TowerMaps(xs, bias), norm),))
        ys, places = functions.pool_forward(normalized, pool, parts)
        ctx.save_for_backward(*places, *xs, *(() if bias is None else (bias,)))
        ctx.arguments, ctx.counts = (norm, pool), (len(places), len(places) + len(xs))
        ctx.functions, ctx.bias_dtype = functions, bias.dtype if bias is not None else None
        return ys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved, (end_of_places, end_of_xs) = ctx.saved_tensors, ctx.counts
        places, xs, bias = saved[:end_of_places], saved[end_of_places:end_of_xs], saved[end_of_xs:]
        slopes = tuple(_dense(gradient) for gradient in gradients)
        maps = TowerMaps(xs, bias[0] if bias else None)
        changes = ctx.functions.pooled_norm_backward(maps, slopes, places, *ctx.arguments)
        return None, None, None, None, *_changes(ctx, changes)
