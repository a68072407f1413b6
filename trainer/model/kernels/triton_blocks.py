"""Images cut into blocks of pixels, channels_last, and the gradient back, in Triton: one pass, zeros included.

A program of the forward has one row of blocks, one piece of memory on both sides: of the paper's image it reads 4 lines
of 224 x 3 values and writes 57 blocks of 48. A thread writes ``VEC`` values, 16 bytes where blocks allow it, so a warp
writes 512 bytes in a row; it reads as many at once as a line and a block's row have common parts, 8 bytes of the
paper's bfloat16. What is outside the image is not read.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def to_blocks_kernel(
    x, y, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SIDE: tl.constexpr, BEFORE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (N, ROWS, COLUMNS, SIDE * SIDE * C) of x (N, HEIGHT, WIDTH, C): row ``program 0`` of all, part ``program 1``.

    ``BEFORE``: px of zeros above and left of the image.
    """
    LINE: tl.constexpr = WIDTH * CHANNELS
    PIECE: tl.constexpr = SIDE * CHANNELS  # a block's row, in one piece on both sides
    GROUPS: tl.constexpr = SIDE * PIECE // VEC  # of a block
    row = tl.program_id(0)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column, group, vec = (unit // GROUPS)[:, None], unit % GROUPS, tl.arange(0, VEC)[None, :]
    value = group[:, None] * VEC + vec  # of its block
    line = row % ROWS * SIDE - BEFORE + value // PIECE
    place = column * PIECE + value % PIECE - BEFORE * CHANNELS
    inside = (unit < COLUMNS * GROUPS)[:, None]
    there = inside & (line >= 0) & (line < HEIGHT) & (place >= 0) & (place < LINE)
    image = x + (row // ROWS).to(tl.int64) * (HEIGHT * LINE)
    found = tl.load(image + (line * LINE + place), mask=there, other=0.0)
    written = y + row.to(tl.int64) * (COLUMNS * GROUPS * VEC)
    tl.store(written + (unit[:, None] * VEC + vec), found, mask=inside)


@triton.jit
def from_blocks_kernel(
    g, dx, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, SIDE: tl.constexpr, BEFORE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx (N, HEIGHT, WIDTH, C) of g, as y of :func:`to_blocks_kernel`: line ``program 0`` of all; 0 outside blocks."""
    LINE: tl.constexpr = WIDTH * CHANNELS
    PIECE: tl.constexpr = SIDE * CHANNELS
    number = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    down, place = number % HEIGHT + BEFORE, at + BEFORE * CHANNELS
    row, column = down // SIDE, place // PIECE
    there = (at < tl.where(row < ROWS, LINE, 0)) & (column < COLUMNS)
    block = (number // HEIGHT).to(tl.int64) * (ROWS * COLUMNS) + row * COLUMNS + column
    value = down % SIDE * PIECE + place % PIECE
    found = tl.load(g + (block * (SIDE * PIECE) + value), mask=there, other=0.0)
    tl.store(dx + number.to(tl.int64) * LINE + at, found, mask=at < LINE)
