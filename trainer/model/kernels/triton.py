"""The kernels of a GPU, in Triton; imported only where Triton is. Nothing here waits for the GPU.

What they do stands in ``triton_norm.py``, ``triton_pool.py``, ``triton_relu.py``, ``triton_blocks.py``,
``triton_dropout.py`` and ``triton_update.py``; here is who launches them, and in what portions.
"""

# mypy: disable-error-code="no-untyped-def"
import dataclasses
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model.kernels.interface import Blocks, Changes, Drop, Factors, Layout, Norm, Parts, Pool, TowerMaps
from trainer.model.kernels.triton_blocks import from_blocks_kernel, to_blocks_kernel
from trainer.model.kernels.triton_dropout import relu_dropout_backward_kernel, relu_dropout_kernel
from trainer.model.kernels.triton_norm import norm_backward_kernel, norm_forward_kernel
from trainer.model.kernels.triton_pool import pool_backward_kernel, pool_forward_kernel
from trainer.model.kernels.triton_relu import relu_backward_kernel, relu_forward_kernel
from trainer.model.kernels.triton_update import UpdateAll

BLOCK = 1024  # elements a program
LANES, WARPS = 32, 4
VECTOR_BYTES = 16  # the widest load of a thread
MOST_TILES, PROGRAMS = 16, 4096  # of a program that adds up; programs of a launch before any has more than one
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
        return self.norm_maps(TowerMaps((x,)), norm)

    def norm_backward(self, x: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
        """See :class:`.interface.Kernels`."""
        (dx,), _ = self._norm_backward(TowerMaps((x,)), (gradient,), (gradient,), norm, None)
        return dx

    def norm_maps(self, maps: TowerMaps, norm: Norm) -> Tensor:
        """See :class:`.interface.GpuKernels`."""
        layout = maps.layout
        (y,) = empty_parts(layout.shape, 1, maps.parts[0])
        tile = Tile.of(layout, layout.shape[1] // norm.maps, y)
        with torch.cuda.device_of(y):
            norm_forward_kernel[tile.grid](
                *two(maps.parts), bias_or(maps), y, tile.pixels, norm.alpha, norm.k, norm.size // 2, norm.rectify,
                maps.bias is not None, tile.maps, tile.towers, tile.pitch(maps.parts), *tile.shape, **FUSED,
            )  # fmt: skip
        return y

    def pooled_norm_backward(self, maps: TowerMaps, gradients: Parts, places: Parts, norm: Norm, pool: Pool) -> Changes:
        """See :class:`.interface.GpuKernels`."""
        return self._norm_backward(maps, gradients, places, norm, pool)

    def _norm_backward(
        self, maps: TowerMaps, gradients: Parts, places: Parts, norm: Norm, pool: Pool | None
    ) -> Changes:
        """``pool``: that of the gradients' maps, None where they were not pooled."""
        layout = maps.layout
        changes = empty_parts(layout.shape, layout.parts, maps.parts[0])
        tile = Tile.of(layout, layout.shape[1] // norm.maps, changes[0], adds_up=layout.has_bias)
        sums = tile.empty_sums(changes[0])
        sides = (*layout.shape[2:], *gradients[0].shape[2:])
        window = (True, pool.px, pool.stride) if pool else (False, 1, 1)
        with torch.cuda.device_of(sums):
            norm_backward_kernel[tile.grid](
                *two(maps.parts), bias_or(maps), *two(gradients), *two(places), *two(changes), sums, tile.pixels,
                norm.alpha, norm.k, *sides, tile.tiles, norm.size // 2, norm.rectify, layout.has_bias, tile.maps,
                tile.towers, tile.pitch(maps.parts), tile.pitch(gradients), *window, *tile.shape, **FUSED,
            )  # fmt: skip
        return changes, tile.add_up(sums) if layout.has_bias else None

    def pool_forward(self, maps: TowerMaps, pool: Pool, parts: int) -> tuple[Parts, Parts]:
        """See :class:`.interface.GpuKernels`."""
        images, channels, *sides = maps.layout.shape
        pooled = [pool.side(side) for side in sides]
        ys = empty_parts((images, channels, *pooled), parts, maps.parts[0])
        places = tuple(torch.empty_like(y, dtype=torch.uint8) for y in ys)
        tile = Tile.of(TowerMaps(ys).layout, max(parts, len(maps.parts)), ys[0])
        with torch.cuda.device_of(ys[0]):
            pool_forward_kernel[tile.grid](
                *two(maps.parts), bias_or(maps), *two(ys), *two(places), tile.pixels, *sides, *pooled, pool.rectify,
                maps.bias is not None, tile.maps, tile.towers, tile.pitch(maps.parts), tile.pitch(ys), pool.px,
                pool.stride, *tile.shape, **FUSED,
            )  # fmt: skip
        return ys, places

    def pool_backward(self, gradients: Parts, places: Parts, layout: Layout, pool: Pool) -> Changes:
        """See :class:`.interface.GpuKernels`."""
        changes = empty_parts(layout.shape, layout.parts, gradients[0])
        tile = Tile.of(layout, max(len(gradients), layout.parts), changes[0], adds_up=layout.has_bias)
        sums = tile.empty_sums(changes[0])
        sides = (*layout.shape[2:], *gradients[0].shape[2:])
        with torch.cuda.device_of(sums):
            pool_backward_kernel[tile.grid](
                *two(gradients), *two(places), *two(changes), sums, tile.pixels, *sides, tile.tiles,
                layout.has_bias, tile.maps, tile.towers, tile.pitch(changes), tile.pitch(gradients), pool.px,
                pool.stride, *tile.shape, **FUSED,
            )  # fmt: skip
        return changes, tile.add_up(sums) if layout.has_bias else None

    def relu_forward(self, maps: TowerMaps, parts: int) -> Parts:
        """See :class:`.interface.GpuKernels`."""
        ys = empty_parts(maps.layout.shape, parts, maps.parts[0])
        tile = Tile.of(maps.layout, max(parts, len(maps.parts)), ys[0])
        with torch.cuda.device_of(ys[0]):
            relu_forward_kernel[tile.grid](
                *two(maps.parts), bias_or(maps), *two(ys), tile.pixels, maps.bias is not None, tile.maps, tile.towers,
                tile.pitch(maps.parts), tile.pitch(ys), *tile.shape, **FUSED,
            )  # fmt: skip
        return ys

    def relu_backward(self, outputs: Parts, gradients: Parts, layout: Layout) -> Changes:
        """See :class:`.interface.GpuKernels`."""
        changes = empty_parts(layout.shape, layout.parts, gradients[0])
        tile = Tile.of(layout, max(len(outputs), layout.parts), changes[0], adds_up=layout.has_bias)
        sums = tile.empty_sums(changes[0])
        with torch.cuda.device_of(sums):
            relu_backward_kernel[tile.grid](
                *two(outputs), *two(gradients), *two(changes), sums, tile.pixels, tile.tiles, layout.has_bias,
                tile.maps, tile.towers, tile.pitch(changes), tile.pitch(outputs), *tile.shape, **FUSED,
            )  # fmt: skip
        return changes, tile.add_up(sums) if layout.has_bias else None

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


@dataclasses.dataclass(frozen=True)
class Tile:
    """How maps are given to programs: each has tiles of one tower, W pieces of L lanes of VEC channels.

    A piece is a warp's, unless a row has more groups than a warp has lanes.

    Attributes:
        pixels: of the maps, of all images.
        maps: of a tower.
        towers: as many as are told apart.
        tiles: of a program, one after the other, and it adds up over them; 1 where it does not. A power of two: a
            kernel is compiled for it.
        shape: VEC, W, L.
        grid: programs.
        adds_up: over the pixels, for the bias.
    """

    pixels: int
    maps: int
    towers: int
    tiles: int
    shape: tuple[int, int, int]
    grid: tuple[int]
    adds_up: bool

    @staticmethod
    def of(layout: Layout, towers: int, like: Tensor, *, adds_up: bool = False) -> "Tile":
        """For a pass over maps of ``towers`` towers, written like ``like``; ``adds_up``: for the bias, too."""
        channels, pixels = layout.shape[1] // towers, math.prod(layout.shape) // layout.shape[1]
        vec = math.gcd(channels, VECTOR_BYTES // like.element_size())
        groups = channels // vec
        lanes = max(LANES, triton.next_power_of_2(groups))
        pieces = max(1, WARPS * LANES // lanes)
        count = triton.cdiv(pixels, pieces * (lanes // groups))
        tiles = min(MOST_TILES, 1 << (count * towers // PROGRAMS | 1).bit_length() - 1) if adds_up else 1
        grid = (triton.cdiv(count, tiles) * towers,)
        return Tile(pixels, channels, towers, tiles, (vec, pieces, lanes), grid, adds_up)

    def pitch(self, parts: Parts) -> int:
        """Channels of a pixel in memory of such parts."""
        return self.maps if len(parts) > 1 else self.maps * self.towers

    @property
    def sums(self) -> tuple[int, int, int, int]:
        """Shape of what a launch has added up: programs of a tower, towers, rows of a piece, maps."""
        vec, _, lanes = self.shape
        return self.grid[0] // self.towers, self.towers, lanes // (self.maps // vec), self.maps

    def empty_sums(self, like: Tensor) -> Tensor:
        """Memory for it; of one number where nothing is added up."""
        return torch.empty(self.sums if self.adds_up else 1, dtype=torch.float32, device=like.device)

    def add_up(self, sums: Tensor) -> Tensor:
        """The gradient of the bias out of it, (C,), in the same order each time."""
        return sums.sum((0, 2)).flatten()


def empty_parts(shape: Sequence[int], parts: int, like: Tensor) -> Parts:
    """Memory for maps (N, C, H, W), channels_last, of the dtype of ``like``."""
    images, channels, *sides = shape
    size, dense = (images, channels // parts, *sides), torch.channels_last
    return tuple(torch.empty(size, dtype=like.dtype, device=like.device, memory_format=dense) for _ in range(parts))


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


def two(parts: Parts) -> tuple[Tensor, Tensor]:
    """A kernel takes two pointers, whether there are two parts or not."""
    return parts[0], parts[-1]


def bias_or(maps: TowerMaps) -> Tensor:
    """The bias, or another pointer where there is none."""
    return maps.parts[0] if maps.bias is None else maps.bias
