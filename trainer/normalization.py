"""Local response normalisation with an analytic backward that keeps nothing but its input.

Source: paper section 3.3; layers ``rnorm1`` and ``rnorm2`` of ``layers-145.cfg``. torch's ``nn.LocalResponseNorm``
takes half of a plain training step, in ``pow`` and in many passes over memory. Here ``d^-0.75`` is
``rsqrt(d) * sqrt(rsqrt(d))``, one tensor is saved, and on a CPU the passes run over blocks that stay in the cache.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BLOCK_ELEMENTS = 1 << 17  # elements a pass on a CPU: 512 KiB, so that the few scratch tensors stay in a core's cache


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
_Constants = tuple[float, float, float]  # alpha, beta, k


def _forward(x: Tensor, window: _Sum, size: int, constants: _Constants) -> Tensor:
    """y = x * (k + alpha * sum x^2)^-beta."""
    alpha, beta, k = constants
    wide = _wide(x)
    return (wide * _power(k + alpha * window(wide * wide, size), beta)).to(x.dtype)


def _backward(x: Tensor, gradient: Tensor, window: _Sum, size: int, constants: _Constants) -> Tensor:
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
    """The formulas above as they stand. Saves x only; the denominator is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: _Sum, size: int, constants: _Constants, compiled: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.arguments = (window, size, constants)
        ctx.compiled = compiled
        return _kernels(compiled)[0](x, window, size, constants)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _kernels(ctx.compiled)[1](x, gradients[0], *ctx.arguments), None, None, None, None


class _Scratch:
    """Memory for one block of pictures, used by all blocks in turn.

    Attributes:
        padded: (B, C + size - 1, H, W), maps with a border above and below.
        pairs: (B, C + size - 2, H, W), sums of two neighbours.
        sums: (B, C, H, W).
        x, g, power: (B, C, H, W).
    """

    def __init__(self, like: Tensor, block: int, size: int) -> None:
        _, maps, height, width = like.shape
        dtype = torch.promote_types(like.dtype, torch.float32)

        def make(extra: int) -> Tensor:
            return torch.empty(block, maps + extra, height, width, dtype=dtype)

        self.size, self.half, self.maps = size, size // 2, maps
        self.padded, self.pairs, self.sums = make(size - 1), make(size - 2), make(0)
        self.x, self.g, self.power = make(0), make(0), make(0)

    def middle(self, count: int) -> Tensor:
        """The maps of ``padded`` without their border, (count, C, H, W)."""
        return self.padded[:count, self.half : self.half + self.maps]

    def fill_border(self, value: float) -> None:
        """Sets what the window finds beyond the first and the last map."""
        self.padded[:, : self.half].fill_(value)
        self.padded[:, self.half + self.maps :].fill_(value)

    def window(self, count: int) -> Tensor:
        """Sum of ``size`` neighbouring maps of ``padded``, two at a time: (count, C, H, W)."""
        padded, pairs, sums, maps = self.padded[:count], self.pairs[:count], self.sums[:count], self.maps
        if self.size == 1:
            return sums.copy_(padded)
        torch.add(padded[:, :-1], padded[:, 1:], out=pairs)
        torch.add(pairs[:, :maps], padded[:, self.size - 1 :], out=sums)
        for offset in range(2, self.size - 1, 2):
            sums.add_(pairs[:, offset : offset + maps])
        return sums

    def wide(self, narrow: Tensor, into: Tensor) -> Tensor:
        """The block in float32; without a copy where it is already."""
        return narrow if narrow.dtype == into.dtype else into[: len(narrow)].copy_(narrow)

    def inverse_root_and_power(self, x: Tensor, constants: _Constants) -> tuple[Tensor, Tensor]:
        """``d^-0.5`` and ``d^-beta`` of ``d = k + alpha * sum x^2``; k is spread over the window."""
        alpha, beta, k = constants
        share = k / self.size
        self.fill_border(share)
        torch.addcmul(x.new_tensor(share), x, x, value=alpha, out=self.middle(len(x)))
        sums, power = self.window(len(x)), self.power[: len(x)]
        if beta != 0.75:
            torch.pow(sums, -beta, out=power)
            return sums.rsqrt_(), power
        torch.sqrt(sums.rsqrt_(), out=power)
        return sums, power.mul_(sums)


class _BlockedResponseNorm(torch.autograd.Function):
    """The same across maps, on a CPU, a block of pictures at a time. Saves x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, constants: _Constants) -> Tensor:
        ctx.save_for_backward(x)
        ctx.size, ctx.constants = size, constants
        y = torch.empty_like(x)
        block = _block(x)
        scratch = _Scratch(x, block, size)
        for part, out in zip(x.split(block), y.split(block), strict=True):
            wide = scratch.wide(part, scratch.x)
            _, power = scratch.inverse_root_and_power(wide, constants)
            torch.mul(wide, power, out=out if out.dtype == wide.dtype else power)
            if out.dtype != wide.dtype:
                out.copy_(power)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        alpha, beta, _ = ctx.constants
        gradient = gradients[0].contiguous()
        dx = torch.empty_like(x)
        block = _block(x)
        scratch = _Scratch(x, block, ctx.size)
        for part, g_part, out in zip(x.split(block), gradient.split(block), dx.split(block), strict=True):
            wide, g = scratch.wide(part, scratch.x), scratch.wide(g_part, scratch.g)
            root, power = scratch.inverse_root_and_power(wide, ctx.constants)
            scaled = power.mul_(g)  # g d^-beta
            inner = torch.mul(root.square_(), wide, out=scratch.middle(len(wide)))  # x / d
            inner.mul_(scaled)
            scratch.fill_border(0.0)
            window = scratch.window(len(wide))
            if out.dtype == wide.dtype:
                torch.addcmul(scaled, wide, window, value=-2 * alpha * beta, out=out)
            else:
                out.copy_(scaled.addcmul_(wide, window, value=-2 * alpha * beta))
        return dx, None, None


def _block(x: Tensor) -> int:
    """Pictures a block."""
    return max(1, min(len(x), BLOCK_ELEMENTS // max(1, x[0].numel())))


def response_norm(x: Tensor, *, size: int, alpha: float, beta: float, k: float, compiled: bool = False) -> Tensor:
    """Normalises across neighbouring maps of one tower.

    Args:
        x: (N, C, H, W), floating, any memory format; bfloat16 is computed in float32.
        size: maps in the window, odd.
        alpha: factor on the *sum* of squares (torch's ``LocalResponseNorm(alpha=A)`` is ``alpha = A / size``).
        beta: exponent.
        k: offset.
        compiled: run torch.compile'd kernels; without, the blocked ones on a CPU and plain ones on a GPU.

    Returns:
        (N, C, H, W), the dtype of x.
    """
    if x.device.type == "cpu" and x.is_contiguous() and not compiled and len(x):
        return _BlockedResponseNorm.apply(x, size, (alpha, beta, k))
    return _ResponseNorm.apply(x, _across_maps, size, (alpha, beta, k), compiled)


def spatial_norm(x: Tensor, *, size: int, alpha: float, beta: float, compiled: bool = False) -> Tensor:
    """Normalises within each map over a ``size`` x ``size`` px window: ``x * (1 + alpha * sum x^2)^-beta``.

    Source: layer ``rnorm2`` of ``layers-145.cfg``; not in the paper. Arguments as in :func:`response_norm`.
    """
    return _ResponseNorm.apply(x, _across_pixels, size, (alpha, beta, 1.0), compiled)
