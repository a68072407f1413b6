"""Max pooling, on a GPU by kernels of our own, with the ReLU or the normalization before it in the same pass.

What that saves, in bytes moved for conv1 of the paper (bfloat16; x: bytes of conv1's output): torch's normalization,
ReLU and pooling would read and write 2 x each, and keep x, the normalized x and 8 bytes an output. Here the forward
moves 2 x for the normalization and 1.4 x for the pooling, and the normalized x is not kept; the backward moves 2.4 x
where two passes would move 4.4 x. The two forward passes stay two: windows overlap, so a pooled pixel needs nine
normalized ones, and in one pass each root would be taken 2.25 times.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.model import kernels
from trainer.model.kernels.interface import MOST_POOL_PX, GpuKernels, Norm, Pool
from trainer.model.response_norm import LocalResponseNorm


class PostOps(nn.Sequential):
    """What follows a convolution. On a GPU pooling and what is before it are one operation where there is a kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        modules = list(self)
        functions = kernels.on_gpu(x) if _fits(modules[-1:], x) else None
        if functions is None:
            return super().forward(x)
        for module in modules[:-2]:
            x = module(x)
        return pool_after(modules[-2] if len(modules) > 1 else None, modules[-1], x, functions)


def _fits(last: list[nn.Module], x: Tensor) -> bool:
    """Whether the last operation is a pooling that the kernels know."""
    known = bool(last) and isinstance(last[0], nn.MaxPool2d) and cast(int, last[0].kernel_size) <= MOST_POOL_PX
    return known and x.is_contiguous(memory_format=torch.channels_last)


def pool_after(before: nn.Module | None, module: nn.Module, x: Tensor, functions: GpuKernels) -> Tensor:
    """x after ``before`` and the pooling ``module``, by kernels; channels_last (N, C, H, W) -> (N, C, H', W').

    Args:
        before: what is done first; a ReLU or a normalization in the same pass.
        module: an ``nn.MaxPool2d``.
        x: the maps.
        functions: the kernels.
    """
    assert isinstance(module, nn.MaxPool2d)
    rectify = isinstance(before, nn.ReLU)
    pool = Pool(cast(int, module.kernel_size), cast(int, module.stride), module.ceil_mode, rectify)
    norm = before.as_norm(x) if isinstance(before, LocalResponseNorm) else None
    if norm is not None:
        return _NormMaxPool.apply(x, norm, pool, functions)
    if before is not None and not rectify:
        x = before(x).contiguous(memory_format=torch.channels_last)
    return _MaxPool.apply(x, pool, functions)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


class _MaxPool(torch.autograd.Function):
    """Keeps a byte an output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Pool, functions: GpuKernels) -> Tensor:
        y, place = functions.pool_forward(x, pool)
        ctx.save_for_backward(place)
        ctx.arguments = (x.shape, pool, functions)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (place,), (shape, pool, functions) = ctx.saved_tensors, ctx.arguments
        return functions.pool_backward(_dense(gradients[0]), place, shape, pool), None, None


class _NormMaxPool(torch.autograd.Function):
    """Normalization (with its ReLU) and pooling; keeps x and a byte an output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, pool: Pool, functions: GpuKernels) -> Tensor:
        y, place = functions.pool_forward(functions.norm_forward(x, norm), pool)
        ctx.save_for_backward(x, place)
        ctx.arguments = (norm, pool, functions)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, place), (norm, pool, functions) = ctx.saved_tensors, ctx.arguments
        return functions.pooled_norm_backward(x, _dense(gradients[0]), place, norm, pool), None, None, None
