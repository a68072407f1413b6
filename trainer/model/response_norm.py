"""Local response normalization with an analytic backward that keeps nothing but its input.

Source: paper section 3.3; layers ``rnorm1`` and ``rnorm2`` of ``layers-145.cfg``. torch's ``nn.LocalResponseNorm``
takes half of a plain training step, in ``pow`` and in many passes over memory. Here ``d^-0.75`` is ``rsqrt(d) *
sqrt(rsqrt(d))``, one tensor is saved, and memory is passed over once: by ``kernels/kernels.cpp`` on a CPU, by
``kernels/triton_norm.py`` on a GPU. Where these cannot be had, torch operations do the same, on a CPU over blocks that
stay in the cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import LrnConfig
from trainer.model import kernels
from trainer.model.kernels.interface import BETA, SIZES, Kernels, Norm

BLOCK_ELEMENTS = 1 << 18  # elements a pass on a CPU: 1 MiB, so that the few scratch tensors stay in a core's cache


def _across_maps(values: Tensor, size: int) -> Tensor:
    """Sum over ``size`` neighboring maps, the window cut off at the edges. (N, C, H, W) -> (N, C, H, W)."""
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


class _ResponseNorm(torch.autograd.Function):
    """The formulas above as they stand. Saves x only; the denominator is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: _Sum, size: int, constants: _Constants) -> Tensor:
        ctx.save_for_backward(x)
        ctx.arguments = (window, size, constants)
        return _forward(x, window, size, constants)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _backward(x, gradients[0], *ctx.arguments), None, None, None


class _KernelResponseNorm(torch.autograd.Function):
    """The same across maps, a ReLU before it where asked for, by compiled kernels. Saves x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm, functions: Kernels) -> Tensor:
        ctx.save_for_backward(x)
        ctx.arguments = (norm, functions)
        return functions.norm_forward(x, norm)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        norm, functions = ctx.arguments
        gradient = torch.empty_like(x).copy_(gradients[0]) if gradients[0].stride() != x.stride() else gradients[0]
        return functions.norm_backward(x, gradient, norm), None, None


class _Rows:
    """Windows over the maps of a block of rows; a row is one pixel's maps of one tower.

    Rows lie in memory with a border before and after each, so that every sum of neighbors is a pass over flat memory.

    Args:
        block: rows a block, B.
        maps: C.
        size: maps in the window, odd.
        dtype: of the sums.
    """

    def __init__(self, block: int, maps: int, size: int, dtype: torch.dtype) -> None:
        self.maps, self.size, self.half = maps, size, size // 2
        self.width = maps + size - 1
        self.pairs, self.sums, self.power = (torch.zeros(block * self.width, dtype=dtype) for _ in range(3))

    def padded(self, block: int, border: float) -> Tensor:
        """Room for a block with its borders filled: (B, C + size - 1)."""
        return torch.full((block, self.width), border, dtype=self.sums.dtype)

    def middle(self, padded: Tensor) -> Tensor:
        """The maps between the borders: (B, C)."""
        return padded[:, self.half : self.half + self.maps]

    def cut(self, flat: Tensor, rows: int) -> Tensor:
        """The maps of a flat result: (rows, C)."""
        return flat[: rows * self.width].view(rows, self.width)[:, : self.maps]

    def window(self, padded: Tensor) -> Tensor:
        """Sums of ``size`` neighbors, flat; :meth:`cut` has them by map."""
        flat = padded.view(-1)
        length = len(flat) - self.size + 1
        sums, pairs = self.sums[:length], self.pairs[: len(flat) - 1]
        if self.size == 1:
            return sums.copy_(flat)
        torch.add(flat[:-1], flat[1:], out=pairs)
        torch.add(pairs[:length], flat[self.size - 1 :], out=sums)
        for offset in range(2, self.size - 1, 2):
            sums.add_(pairs[offset : offset + length])
        return sums

    def root_and_power(self, x: Tensor, squares: Tensor, constants: _Constants) -> tuple[Tensor, Tensor]:
        """``d^-0.5`` and ``d^-beta`` of ``d = k + alpha * sum x^2``, flat; k is spread over the window."""
        alpha, beta, k = constants
        torch.addcmul(squares.new_tensor(k / self.size), x, x, value=alpha, out=self.middle(squares))
        sums = self.window(squares)
        power = self.power[: len(sums)]
        if beta != 0.75:
            torch.pow(sums, -beta, out=power)
            return sums.rsqrt_(), power
        torch.sqrt(sums.rsqrt_(), out=power)
        return sums, power.mul_(sums)


class _RowsResponseNorm(torch.autograd.Function):
    """The same across maps, on a CPU, for channels_last: a block of rows at a time. Saves x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, maps: int, size: int, constants: _Constants) -> Tensor:
        ctx.save_for_backward(x)
        ctx.arguments = (maps, size, constants)
        y = torch.empty_like(x)
        block = BLOCK_ELEMENTS // maps + 1
        rows = _Rows(block, maps, size, _wide_dtype(x))
        squares = rows.padded(block, constants[2] / size)
        for part, out in zip(_rows(x, maps).split(block), _rows(y, maps).split(block), strict=True):
            wide, count = _wide(part), len(part)
            rows.root_and_power(wide, squares[:count], constants)
            if out.dtype == wide.dtype:
                torch.mul(wide, rows.cut(rows.power, count), out=out)
            else:
                out.copy_(wide.mul_(rows.cut(rows.power, count)))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        maps, size, constants = ctx.arguments
        alpha, beta, k = constants
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        block = BLOCK_ELEMENTS // maps + 1
        rows = _Rows(block, maps, size, _wide_dtype(x))
        squares, products = rows.padded(block, k / size), rows.padded(block, 0.0)
        views = (_rows(tensor, maps).split(block) for tensor in (x, gradient, dx))
        for part, g_part, out in zip(*views, strict=True):
            wide, g, count = _wide(part), _wide(g_part), len(part)
            root, _ = rows.root_and_power(wide, squares[:count], constants)
            scaled = g * rows.cut(rows.power, count)  # g d^-beta
            root.square_()  # 1 / d
            inner = rows.middle(products[:count])
            torch.mul(rows.cut(rows.sums, count), wide, out=inner)
            inner.mul_(scaled)  # g x d^(-beta-1)
            rows.window(products[:count])
            out.copy_(scaled.addcmul_(wide, rows.cut(rows.sums, count), value=-2 * alpha * beta))
        return dx, None, None, None


def _wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums of x are kept."""
    return torch.promote_types(x.dtype, torch.float32)


def _rows(x: Tensor, maps: int) -> Tensor:
    """channels_last (N, T C, H, W) as rows of one tower's maps: (N H W T, C), the same memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, maps)


def response_norm(
    x: Tensor, *, size: int, alpha: float, beta: float, k: float, maps: int | None = None, rectify: bool = False
) -> Tensor:
    """Normalizes across neighboring maps of one tower.

    Args:
        x: (N, C, H, W), or (N, 2 C, H, W) with tower a's maps before tower b's; any memory format, channels_last is the
            fast one; bfloat16 is computed in float32.
        size: maps in the window, odd.
        alpha: factor on the *sum* of squares (torch's ``LocalResponseNorm(alpha=A)`` is ``alpha = A / size``).
        beta: exponent; 0.75 is the fast one.
        k: offset.
        maps: C, maps of one tower; None where x has one tower's only.
        rectify: normalize ReLU(x); x may be overwritten with it.

    Returns:
        The shape, dtype and memory format of x.
    """
    maps = maps or x.shape[1]
    rows = x.is_contiguous(memory_format=torch.channels_last)
    if rows and size in SIZES and beta == BETA and (functions := kernels.of(x)):
        norm = Norm(x.numel() // maps, maps, size, alpha, k, rectify)
        return _KernelResponseNorm.apply(x, norm, functions)
    x = x.relu_() if rectify else x
    if rows and x.device.type == "cpu":
        return _RowsResponseNorm.apply(x, maps, size, (alpha, beta, k))
    towers = [_ResponseNorm.apply(part, _across_maps, size, (alpha, beta, k)) for part in x.split(maps, dim=1)]
    return towers[0] if len(towers) == 1 else torch.cat(towers, dim=1)


def lrn_within_channel(x: Tensor, *, size: int, alpha: float, beta: float) -> Tensor:
    """Normalizes within each map over a ``size`` x ``size`` px window: ``x * (1 + alpha * sum x^2)^-beta``.

    Source: layer ``rnorm2`` of ``layers-145.cfg``; not in the paper. Arguments as in :func:`response_norm`.
    """
    return _ResponseNorm.apply(x, _across_pixels, size, (alpha, beta, 1.0))


class LocalResponseNorm(nn.Module):
    """:func:`response_norm` as a layer.

    Args:
        channels: of one tower; where x holds both towers', neither sees the other.
        config: constants.
        rectify: normalize ReLU(x).
    """

    def __init__(self, channels: int, config: LrnConfig, *, rectify: bool) -> None:
        super().__init__()
        self.channels, self.rectify = channels, rectify
        self.config = config

    @property
    def is_known(self) -> bool:
        """Whether there are kernels for it."""
        return self.config.size in SIZES and self.config.beta == BETA

    def as_norm(self, values: int) -> Norm:
        """What a kernel must know of this layer on ``values`` values of all maps."""
        c = self.config
        return Norm(values // self.channels, self.channels, c.size, c.alpha, c.k, self.rectify)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        c = self.config
        return response_norm(
            x, size=c.size, alpha=c.alpha, beta=c.beta, k=c.k, maps=self.channels, rectify=self.rectify
        )


class WithinChannelNorm(nn.Module):
    """:func:`lrn_within_channel` as a layer."""

    def __init__(self, config: LrnConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        c = self.config
        return lrn_within_channel(x, size=c.within_channel_size, alpha=c.within_channel_alpha, beta=c.beta)
