"""The net's input in one launch, in Triton; imported only where Triton is. :func:`.input_rule.by_torch` defines it.

Bytes an image of 224 px: 150,528 read (the crop), 301,056 written (bfloat16) and the mean image under it, 602,112,
which stays in the L2 cache. A program has some neighboring values of one image, so what differs between images is
scalar. A mirrored crop is read from right to left.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl

from pipeline.loader.input_rule import GEOMETRY, InputRule
from pipeline.loader.normalize import STANDARDIZE_EPSILON

# Values a program and warps: 4 values a thread let several loads be on their way at once, and one instruction of a warp
# still meets few cache lines. A standardized image needs its mean first: one program has all of it.
BLOCK, WARPS = 512, 4
WHOLE_BLOCK, WHOLE_WARPS = 4096, 16
EPSILON = tl.constexpr(STANDARDIZE_EPSILON)
NUMBERS = tl.constexpr(GEOMETRY)  # of a row before the channels'


@triton.jit
def _channel(numbers, channel, C: tl.constexpr):
    """``numbers[channel]`` of C numbers, for a block of channels, from registers."""
    found = tl.load(numbers)
    for other in tl.static_range(1, C):
        found = tl.where(channel == other, tl.load(numbers + other), found)
    return found


@triton.jit
def _values(
    crop, row, image, at, SIDE: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, CENTER: tl.constexpr
):  # fmt: skip
    """The values ``at`` of one image, in float32; 0 behind its end.

    ``CENTER``: where the mean image's piece begins; -1: under the crop; -2: there is no mean image.
    """
    LINE: tl.constexpr = SIDE * C
    inside = at < SIDE * LINE
    line, within, channel = at // LINE, at % LINE, at % C
    mirrored = tl.load(row + 2) != 0
    source = tl.where(mirrored, LINE - C - within + 2 * channel, within)  # in the crop's line
    value = tl.load(crop + line * LINE + source, mask=inside, other=0).to(tl.float32)
    if CENTER >= 0:
        value -= tl.load(image + CENTER + line * (WIDTH * C) + within, mask=inside, other=0.0)
    elif CENTER == -1:
        x, y = tl.load(row).to(tl.int32), tl.load(row + 1).to(tl.int32)
        value -= tl.load(image + ((y + line) * WIDTH + x) * C + source, mask=inside, other=0.0)
    value = (value - _channel(row + NUMBERS, channel, C)) * _channel(row + NUMBERS + C, channel, C)
    return tl.where(inside, value, 0.0)


@triton.jit
def net_input_kernel(
    crops, rows, image, out, SIDE: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, CENTER: tl.constexpr,
    STANDARDIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Image ``program 0``: block ``program 1`` of it, or all of it where it is standardized."""
    SIZE: tl.constexpr = SIDE * SIDE * C
    number = tl.program_id(0).to(tl.int64)
    crop, row, written = crops + number * SIZE, rows + number * (NUMBERS + 2 * C), out + number * SIZE
    if STANDARDIZE:
        at = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, SIZE, BLOCK):
            total += _values(crop, row, image, begin + at, SIDE, C, WIDTH, CENTER)
        mean = tl.sum(total) / SIZE
        squares = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, SIZE, BLOCK):
            difference = _values(crop, row, image, begin + at, SIDE, C, WIDTH, CENTER) - mean
            squares += tl.where(begin + at < SIZE, difference * difference, 0.0)
        factor = tl.rsqrt(tl.sum(squares) / SIZE + EPSILON)
        for begin in range(0, SIZE, BLOCK):
            value = (_values(crop, row, image, begin + at, SIDE, C, WIDTH, CENTER) - mean) * factor
            tl.store(written + begin + at, value.to(out.dtype.element_ty), mask=begin + at < SIZE)
    else:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        value = _values(crop, row, image, at, SIDE, C, WIDTH, CENTER)
        tl.store(written + at, value.to(out.dtype.element_ty), mask=at < SIZE)


def net_input(crops: torch.Tensor, rows: torch.Tensor, rule: InputRule) -> torch.Tensor:
    """See :func:`pipeline.loader.input_rule.by_torch`; rows are float32."""
    crops, (count, side, _, channels) = crops.contiguous(), crops.shape
    out = torch.empty_like(crops, dtype=rule.dtype)
    image = rule.mean_image if rule.mean_image is not None else out  # a pointer must be given
    width, center = place_of(rule, channels)
    block, warps, blocks = tile(crops.shape, standardize=rule.standardize)
    with torch.cuda.device_of(crops):
        net_input_kernel[(count, blocks)](
            crops, rows, image, out, side, channels, width, center, rule.standardize, block,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def place_of(rule: InputRule, channels: int) -> tuple[int, int]:
    """The kernel's ``WIDTH`` and ``CENTER``."""
    if rule.mean_image is None:
        return 0, -2
    width = rule.mean_image.shape[1]
    return width, -1 if rule.center is None else (rule.center[1] * width + rule.center[0]) * channels


def tile(shape: torch.Size, *, standardize: bool) -> tuple[int, int, int]:
    """Values a block, warps a program, and the programs of an image, for crops (N, S, S, C)."""
    if standardize:
        return WHOLE_BLOCK, WHOLE_WARPS, 1
    return BLOCK, WARPS, triton.cdiv(shape[1:].numel(), BLOCK)
