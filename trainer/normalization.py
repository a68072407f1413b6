"""Local response normalisation with an analytic backward that keeps nothing but its input.

Source: paper section 3.3; ``rnormcrossmap`` and ``rnorm`` layers of ``layers-145.cfg``. torch's
    ``nn.LocalResponseNorm`` spends half of a plain training step in ``pow`` and in its many passes; ``d^-0.75 =
    rsqrt(d) * sqrt(rsqrt(d))`` and one saved tensor do not.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _across_maps(values: Tensor, size: int) -> Tensor:
    """Sum over ``size`` neighbouring maps, the window cut off at the edges. (N, C, H, W) -> (N, C, H, W)."""
    half, maps = size // 2, values.shape[1]
    padded = functional.pad(values, (0, 0, 0, 0, half, half))
    total = padded[:, 0:maps]
    for offset in range(1, size):
        total = total + padded[:, offset : offset + maps]
    return total


def _across_pixels(values: Tensor, size: int) -> Tensor:
    """Sum over a ``size`` x ``size`` window of the same map, cut off at the edges. (N, C, H, W) -> (N, C, H, W)."""
    return functional.avg_pool2d(values, size, stride=1, padding=size // 2, divisor_override=1)


def _power(base: Tensor, beta: float) -> Tensor:
    """``base ** -beta``; the paper's 0.75 without ``pow``."""
    if beta == 0.75:
        root = base.rsqrt()
        return root * root.sqrt()
    return base.pow(-beta)


def _wide(x: Tensor) -> Tensor:
    """float32 at least: sums of squares in bfloat16 would lose three digits."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


_Sum = Callable[[Tensor, int], Tensor]


def _forward(x: Tensor, window: _Sum, size: int, constants: tuple[float, float, float]) -> Tensor:
    """y = x * (k + alpha * sum x^2)^-beta, computed in float32 at least."""
    alpha, beta, k = constants
    wide = _wide(x)
    return (wide * _power(k + alpha * window(wide * wide, size), beta)).to(x.dtype)


def _backward(x: Tensor, gradient: Tensor, window: _Sum, size: int, constants: tuple[float, float, float]) -> Tensor:
    """dx = g d^-beta - 2 alpha beta x * sum(g x d^(-beta-1)); the window is symmetric, so its transpose is itself."""
    alpha, beta, k = constants
    wide, g = _wide(x), _wide(gradient)
    denominator = k + alpha * window(wide * wide, size)
    scale = _power(denominator, beta)
    return (g * scale - (2 * alpha * beta) * wide * window(g * wide * scale / denominator, size)).to(x.dtype)


@functools.cache
def _kernels(compiled: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The forward and the backward, fused into one loop each where ``compiled``."""
    if not compiled:
        return _forward, _backward
    return torch.compile(_forward, dynamic=False), torch.compile(_backward, dynamic=False)


class _ResponseNorm(torch.autograd.Function):
    """Saves x only; the denominator is computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, window: _Sum, size: int, constants: tuple[float, float, float], compiled: bool
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.arguments = (window, size, constants)
        ctx.compiled = compiled
        return _kernels(compiled)[0](x, window, size, constants)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _kernels(ctx.compiled)[1](x, gradients[0], *ctx.arguments), None, None, None, None


def response_norm(x: Tensor, *, size: int, alpha: float, beta: float, k: float, compiled: bool = False) -> Tensor:
    """Normalises across neighbouring maps of one tower.

    Args:
        x: (N, C, H, W), float32 or bfloat16, any memory format.
        size: maps in the window, odd.
        alpha: factor on the *sum* of squares (torch's ``LocalResponseNorm(alpha=A)`` is ``alpha = A / size``).
        beta: exponent.
        k: offset.
        compiled: run the torch.compile'd kernels.

    Returns:
        (N, C, H, W), the dtype of x.
    """
    return _ResponseNorm.apply(x, _across_maps, size, (alpha, beta, k), compiled)


def spatial_norm(x: Tensor, *, size: int, alpha: float, beta: float, compiled: bool = False) -> Tensor:
    """Normalises within each map over a ``size`` x ``size`` px window: ``x * (1 + alpha * sum x^2)^-beta``.

    Source: layer ``rnorm2`` of ``layers-145.cfg``; not in the paper. Arguments as in :func:`response_norm`.
    """
    return _ResponseNorm.apply(x, _across_pixels, size, (alpha, beta, 1.0), compiled)
