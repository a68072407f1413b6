"""The loops of ``kernels.cpp`` for a GPU, in Triton; imported only where Triton is.

One thread an element: neighbors are loaded again by each of their neighbors, from the first-level cache. Nothing here
waits for the GPU.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model.kernels.interface import Factors, Norm

BLOCK = 1024  # elements a program
FUSED = {
    "enable_fp_fusion": True
}  # multiply and add in one instruction, as kernels.cpp does; said, because Triton 3.9 asks


@triton.jit
def _square(x, at, map_, offset, maps, inside, RECTIFY: tl.constexpr):
    """Square of the neighbor ``offset`` maps further on; 0 outside the row."""
    near = map_ + offset
    value = tl.load(x + at + offset, mask=inside & (near >= 0) & (near < maps), other=0.0).to(tl.float32)
    if RECTIFY:
        value = tl.where(value < 0, 0.0, value)
    return value * value


@triton.jit
def _inverse(x, at, map_, maps, inside, alpha, k, HALF: tl.constexpr, RECTIFY: tl.constexpr):
    """1 / (k + alpha * sum of squares over the window)."""
    total = _square(x, at, map_, -HALF, maps, inside, RECTIFY)
    for offset in tl.static_range(1 - HALF, HALF + 1):
        total += _square(x, at, map_, offset, maps, inside, RECTIFY)
    return 1.0 / (k + alpha * total)


@triton.jit
def forward_kernel(x, y, count, maps, alpha, k, HALF: tl.constexpr, RECTIFY: tl.constexpr, BLOCK: tl.constexpr):
    """y = x d^-0.75 of ``BLOCK`` elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, map_ = at < count, at % maps
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RECTIFY:
        value = tl.where(value < 0, 0.0, value)
    root = tl.sqrt(_inverse(x, at, map_, maps, inside, alpha, k, HALF, RECTIFY))
    tl.store(y + at, (value * root * tl.sqrt(root)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(x, g, dx, count, maps, alpha, k, HALF: tl.constexpr, RECTIFY: tl.constexpr, BLOCK: tl.constexpr):
    """dx = g d^-0.75 - 1.5 alpha x * sum(g x d^-1.75) of ``BLOCK`` elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, map_ = at < count, at % maps
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    root = tl.sqrt(_inverse(x, at, map_, maps, inside, alpha, k, HALF, RECTIFY))
    slope = tl.load(g + at, mask=inside, other=0.0).to(tl.float32) * root * tl.sqrt(root)
    total = tl.zeros_like(slope)
    for offset in tl.static_range(-HALF, HALF + 1):
        near = map_ + offset
        there = inside & (near >= 0) & (near < maps)
        other = tl.load(x + at + offset, mask=there, other=0.0).to(tl.float32)
        if RECTIFY:
            other = tl.where(other < 0, 0.0, other)
        inverse = _inverse(x, at + offset, near, maps, there, alpha, k, HALF, RECTIFY)
        root = tl.sqrt(inverse)
        total += tl.load(g + at + offset, mask=there, other=0.0).to(tl.float32) * other * root * tl.sqrt(root) * inverse
    slope -= 1.5 * alpha * value * total
    if RECTIFY:
        slope = tl.where(value <= 0, 0.0, slope)
    tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def update_kernel(w, v, g, guard, count, momentum, decay, rate, GUARDED: tl.constexpr, BLOCK: tl.constexpr):
    """v = momentum v - decay w - rate g; w = w + v of ``BLOCK`` elements, unless the guard is 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if GUARDED:
        count = tl.where(tl.load(guard) != 0, count, 0)
    inside = at < count
    weight = tl.load(w + at, mask=inside)
    velocity = momentum * tl.load(v + at, mask=inside) - decay * weight - rate * tl.load(g + at, mask=inside)
    tl.store(v + at, velocity, mask=inside)
    tl.store(w + at, weight + velocity, mask=inside)


class TritonKernels:
    """As :class:`trainer.model.kernels.CppKernels`, on CUDA tensors."""

    def norm_forward(self, x: Tensor, norm: Norm) -> Tensor:
        """See :class:`trainer.model.kernels.Kernels`."""
        y = torch.empty_like(x)
        with torch.cuda.device_of(x):
            forward_kernel[_grid(x)](x, y, *_arguments(x, norm), **FUSED)
        return y

    def norm_backward(self, x: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
        """See :class:`trainer.model.kernels.Kernels`."""
        dx = torch.empty_like(x)
        with torch.cuda.device_of(x):
            backward_kernel[_grid(x)](x, gradient, dx, *_arguments(x, norm), **FUSED)
        return dx

    def update(self, w: Tensor, v: Tensor, g: Tensor, factors: Factors, guard: Tensor | None) -> None:
        """See :class:`trainer.model.kernels.Kernels`."""
        flag = w if guard is None else guard  # a pointer must be given
        with torch.cuda.device_of(w):
            update_kernel[_grid(w)](w, v, g, flag, w.numel(), *factors, guard is not None, BLOCK, **FUSED)


def _grid(x: Tensor) -> tuple[int]:
    """Programs for all elements."""
    return (triton.cdiv(x.numel(), BLOCK),)


def _arguments(x: Tensor, norm: Norm) -> tuple[int | float | bool, ...]:
    """What both normalization kernels take after their tensors."""
    return x.numel(), norm.maps, norm.alpha, norm.k, norm.size // 2, norm.rectify, BLOCK
