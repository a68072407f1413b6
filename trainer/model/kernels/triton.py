"""The kernels of a GPU, in Triton; imported only where Triton is. Nothing here waits for the GPU.

What they do stands in ``triton_norm.py``, ``triton_pool.py``, ``triton_blocks.py``, ``triton_dropout.py`` and
``triton_update.py``; here is who launches them, and in what portions.
"""

# mypy: disable-error-code="no-untyped-def"
import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model.kernels.interface import Blocks, Drop, Factors, Norm, Pool
from trainer.model.kernels.triton_blocks import from_blocks_kernel, to_blocks_kernel
from trainer.model.kernels.triton_dropout import relu_dropout_backward_kernel, relu_dropout_kernel
from trainer.model.kernels.triton_norm import norm_backward_kernel, norm_forward_kernel
from trainer.model.kernels.triton_pool import pool_backward_kernel, pool_forward_kernel
from trainer.model.kernels.triton_update import UpdateAll

BLOCK = 1024  # elements a program
LANES, WARPS = 32, 4
VECTOR_BYTES = 16  # the widest load of a thread
# multiply and add in one instruction, as kernels.cpp does; said, because Triton 3.9 asks
FUSED = {"enable_fp_fusion": True}


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
    """:class:`.interface.GpuKernels` of CUDA tensors."""

    def __init__(self) -> None:
        self._zeros: dict[torch.device, Tensor] = {}  # an int64 0 on each device, which no launch changes

    def norm_forward(self, x: Tensor, norm: Norm) -> Tensor:
        """See :class:`.interface.Kernels`."""
        y = torch.empty_like(x)
        vec, pieces, lanes, grid = norm_tile(x, norm)
        with torch.cuda.device_of(x):
            norm_forward_kernel[grid](x, y, *_constants(norm), norm.maps, vec, pieces, lanes, **FUSED)
        return y

    def norm_backward(self, x: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
        """See :class:`.interface.Kernels`."""
        dx = torch.empty_like(x)
        vec, pieces, lanes, grid = norm_tile(x, norm)
        alpha, half = (norm.rows, norm.alpha, norm.k), (norm.size // 2, norm.rectify)
        with torch.cuda.device_of(x):
            norm_backward_kernel[grid](
                x, gradient, gradient, dx, *alpha, 0, 0, 0, 0, *half, norm.maps, 1, False, 1, 1, vec, pieces, lanes,
                **FUSED,
            )  # fmt: skip
        return dx

    def pooled_norm_backward(self, x: Tensor, gradient: Tensor, place: Tensor, norm: Norm, pool: Pool) -> Tensor:
        """See :class:`.interface.GpuKernels`."""
        dx, sides = torch.empty_like(x), (*x.shape[2:], *place.shape[2:])
        vec, pieces, lanes, grid = norm_tile(x, norm)
        alpha, half = (norm.rows, norm.alpha, norm.k), (norm.size // 2, norm.rectify)
        with torch.cuda.device_of(x):
            norm_backward_kernel[grid](
                x, gradient, place, dx, *alpha, *sides, *half, norm.maps, x.shape[1] // norm.maps, True, pool.px,
                pool.stride, vec, pieces, lanes, **FUSED,
            )  # fmt: skip
        return dx

    def pool_forward(self, x: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        """See :class:`.interface.GpuKernels`."""
        images, channels, height, width = x.shape
        shape = (images, channels, pool.side(height), pool.side(width))
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        place = torch.empty_like(y, dtype=torch.uint8)
        vec, block, grid = pool_tile(y)
        sides = (y.numel() // channels, *x.shape[2:], *y.shape[2:])
        with torch.cuda.device_of(x):
            pool_forward_kernel[grid](
                x, y, place, *sides, channels, pool.px, pool.stride, pool.rectify, vec, block, **FUSED
            )
        return y, place

    def pool_backward(self, gradient: Tensor, place: Tensor, shape: torch.Size, pool: Pool) -> Tensor:
        """See :class:`.interface.GpuKernels`."""
        like = gradient
        dx = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
        vec, block, grid = pool_tile(dx)
        sides = (dx.numel() // shape[1], *shape[2:], *gradient.shape[2:])
        with torch.cuda.device_of(dx):
            pool_backward_kernel[grid](gradient, place, dx, *sides, shape[1], pool.px, pool.stride, vec, block, **FUSED)
        return dx

    def to_blocks(self, x: Tensor, blocks: Blocks) -> Tensor:
        """See :class:`.interface.GpuKernels`."""
        shape = (len(x), blocks.side**2 * x.shape[1], blocks.rows, blocks.columns)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        vec, block, grid = blocks_tile(y)
        with torch.cuda.device_of(x):
            to_blocks_kernel[grid](x, y, *x.shape[2:], x.shape[1], *dataclasses.astuple(blocks), vec, block)
        return y

    def from_blocks(self, gradient: Tensor, shape: torch.Size, blocks: Blocks) -> Tensor:
        """See :class:`.interface.GpuKernels`."""
        images, channels, *sides = shape
        like, line = gradient, sides[1] * channels
        dx = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
        grid = (images * sides[0], triton.cdiv(line, WARPS * LANES))
        with torch.cuda.device_of(dx):
            from_blocks_kernel[grid](gradient, dx, *sides, channels, *dataclasses.astuple(blocks), WARPS * LANES)
        return dx

    def drop_forward(self, x: Tensor, drop: Drop) -> Tensor:
        """See :class:`.interface.GpuKernels`."""
        if x.device not in self._zeros:  # before a step is captured: it was launched by itself first
            self._zeros[x.device] = torch.zeros((), dtype=torch.int64, device=x.device)
        y, none = torch.empty_like(x), self._zeros[x.device]
        constants, grid = drop_tile(x, drop)
        starts = [(none, start) if isinstance(start, int) else (start, 0) for start in drop.starts]
        (more_a, start_a), (more_b, start_b) = starts[0], starts[-1]
        numbers = start_a, start_b, len(x), drop.first, drop.least, drop.factor
        with torch.cuda.device_of(x):
            relu_dropout_kernel[grid](x, y, more_a, more_b, *numbers, *constants, **FUSED)
        return y

    def drop_backward(self, gradient: Tensor, y: Tensor, drop: Drop) -> Tensor:
        """See :class:`.interface.GpuKernels`."""
        dx = torch.empty_like(y)
        (*_, vec, block), grid = drop_tile(y, drop)
        with torch.cuda.device_of(y):
            relu_dropout_backward_kernel[grid](y, gradient, dx, y.numel(), drop.factor, vec, block, **FUSED)
        return dx

    def update(self, w: Tensor, v: Tensor, g: Tensor, factors: Factors, guard: Tensor | None) -> None:
        """See :class:`.interface.Kernels`."""
        flag = w if guard is None else guard  # a pointer must be given
        grid = (triton.cdiv(w.numel(), BLOCK),)
        with torch.cuda.device_of(w):
            update_kernel[grid](w, v, g, flag, w.numel(), *factors, guard is not None, BLOCK, **FUSED)

    def make_update(self, device: torch.device) -> UpdateAll:
        """See :class:`.interface.GpuKernels`."""
        return UpdateAll(device)


def norm_tile(x: Tensor, norm: Norm) -> tuple[int, int, int, tuple[int]]:
    """Channels a thread, pieces a program, lanes a piece, and the programs for all rows.

    A piece is a warp's, unless a row has more groups than a warp has lanes.
    """
    vec = math.gcd(norm.maps, VECTOR_BYTES // x.element_size())
    groups = norm.maps // vec
    lanes = max(LANES, triton.next_power_of_2(groups))
    pieces = max(1, WARPS * LANES // lanes)
    return vec, pieces, lanes, (triton.cdiv(norm.rows, pieces * (lanes // groups)),)


def blocks_tile(written: Tensor) -> tuple[int, int, tuple[int, int]]:
    """Values a thread, groups of them a program, and the programs for all rows of blocks."""
    images, channels, rows, columns = written.shape
    vec = math.gcd(channels, VECTOR_BYTES // written.element_size())
    groups = columns * channels // vec
    block = min(triton.next_power_of_2(groups), 4 * WARPS * LANES)
    return vec, block, (images * rows, triton.cdiv(groups, block))


def drop_tile(x: Tensor, drop: Drop) -> tuple[tuple[int, ...], tuple[int]]:
    """Units of a tower here, towers, words of a row, units skipped, units a thread, groups a program; and programs."""
    towers, block = len(drop.starts), WARPS * LANES
    units = x.shape[1] // towers
    vec = math.gcd(units, drop.skipped, VECTOR_BYTES // x.element_size())
    return (units, towers, drop.words, drop.skipped, vec, block), (triton.cdiv(x.numel() // vec, block),)


def pool_tile(written: Tensor) -> tuple[int, int, tuple[int]]:
    """Channels a thread, groups a program, and the programs for all that is written."""
    vec = math.gcd(written.shape[1], VECTOR_BYTES // written.element_size())
    block = WARPS * LANES
    return vec, block, (triton.cdiv(written.numel() // vec, block),)


def _constants(norm: Norm) -> tuple[int | float | bool, ...]:
    """What the forward takes after its tensors, up to the maps."""
    return norm.rows, norm.alpha, norm.k, norm.size // 2, norm.rectify
