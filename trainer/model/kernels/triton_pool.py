"""Max pooling for a GPU, channels_last, in Triton: what is kept for the backward is a byte an output.

torch keeps the input and eight bytes an output. Here an output's byte says which place of its window was the largest,
counted row by row; where maxima tie, the first (torch's rule); NaN wins over all. With a ReLU before the pooling, 255
says that nothing in the window was above 0, so that no gradient passes. A bias is added to the maximum.

Bytes, of x elements of 2 bytes (bf16) and y outputs: forward reads 2 x, writes 2 y + y; backward reads 2 y + y, writes
2 x. What windows share is read from the caches.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from trainer.model.kernels.triton_tile import bias_of, locate, spots, store_sums, tower_of, write

NOTHING = tl.constexpr(255)  # the window has nothing above 0


@triton.jit
def pool_forward_kernel(
    x, x_b, bias, y, y_b, place, place_b, pixels, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_H: tl.constexpr,
    OUT_W: tl.constexpr, RECTIFY: tl.constexpr, BIAS: tl.constexpr, MAPS: tl.constexpr, TOWERS: tl.constexpr,
    X_PITCH: tl.constexpr, Y_PITCH: tl.constexpr, PX: tl.constexpr, STRIDE: tl.constexpr, VEC: tl.constexpr,
    W: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One tile of y (N, OUT_H, OUT_W, C) and of places (uint8), of x (N, H, W, C)."""
    tower = tl.program_id(0) % TOWERS
    x = tower_of(x, x_b, tower, MAPS, X_PITCH)
    pixel, group, inside = locate(tl.program_id(0) // TOWERS, pixels, MAPS // VEC, W, L)
    row, column, image = (pixel // OUT_W) % OUT_H, pixel % OUT_W, pixel // (OUT_W * OUT_H)
    best = tl.full((W * L, VEC), float("-inf"), tl.float32)
    found = tl.zeros((W * L, VEC), tl.int32)
    for i in tl.static_range(PX):
        for j in tl.static_range(PX):
            h, w = row * STRIDE + i, column * STRIDE + j
            at = spots((image * HEIGHT + h) * WIDTH + w, group, X_PITCH, VEC)
            there = inside & (h < HEIGHT) & (w < WIDTH)  # rounded up, a window hangs over the edge
            value = tl.load(x + at, mask=there[:, None], other=float("-inf")).to(tl.float32)
            found = tl.where(value > best, i * PX + j, found)
            found = tl.where(value != value, i * PX + j, found)  # apart: one condition of two costs three times as much
            best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    if BIAS:
        best += bias_of(bias, tower, group, MAPS, VEC)
    if RECTIFY:
        found = tl.where(best <= 0, NOTHING, found)
        best = tl.where(best < 0, 0.0, best)
    write(tower_of(y, y_b, tower, MAPS, Y_PITCH), best, pixel, group, inside, Y_PITCH, VEC)
    write(tower_of(place, place_b, tower, MAPS, Y_PITCH), found, pixel, group, inside, Y_PITCH, VEC)


@triton.jit
def _holds(last, place, i: tl.constexpr, SIDE: tl.constexpr, OUT: tl.constexpr, PX: tl.constexpr, STRIDE: tl.constexpr):
    """Whether window ``last - i`` is there and holds the pixel, which is at ``place`` of window ``last``."""
    found = last >= i
    if OUT + i <= (SIDE - 1) // STRIDE:  # else there are as many
        found = found & (last < OUT + i)
    if (i + 1) * STRIDE > PX:  # else it is large enough
        found = found & (place < PX - i * STRIDE)
    return found


@triton.jit
def unpooled(
    g, place, pixel, group, inside, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_H: tl.constexpr,
    OUT_W: tl.constexpr, PITCH: tl.constexpr, PX: tl.constexpr, STRIDE: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The gradient of the pooling's input, (P, VEC) float32: from each window that holds a pixel and chose it.

    ``pixel`` and ``group`` are those of each group, ``inside`` whether there is one; g and place are a tower's
    (N, OUT_H, OUT_W, ``PITCH``).
    """
    REACH: tl.constexpr = (PX + STRIDE - 1) // STRIDE  # windows that hold a pixel, in each direction, at most
    row, column, image = (pixel // WIDTH) % HEIGHT, pixel % WIDTH, pixel // (WIDTH * HEIGHT)
    up, left = row // STRIDE, column // STRIDE  # the last of them; ``down`` and ``right``: where the pixel is in it
    down, right = row - up * STRIDE, column - left * STRIDE
    at = spots((image * OUT_H + up) * OUT_W + left, group, PITCH, VEC)
    from_g, from_place = g + at, place + at  # the others lie a constant before it
    total = tl.zeros((inside.shape[0], VEC), tl.float32)
    for i in tl.static_range(REACH):
        for j in tl.static_range(REACH):
            before = (i * OUT_W + j) * PITCH
            there = _holds(up, down, i, HEIGHT, OUT_H, PX, STRIDE) & _holds(left, right, j, WIDTH, OUT_W, PX, STRIDE)
            mask = tl.expand_dims(inside & there, -1)
            chosen = tl.load(from_place - before, mask=mask, other=NOTHING).to(tl.int32)
            slope = tl.load(from_g - before, mask=mask, other=0.0).to(tl.float32)
            number = (down + i * STRIDE) * PX + right + j * STRIDE
            total = tl.where(chosen == tl.expand_dims(number, -1), total + slope, total)
    return total


@triton.jit
def pool_backward_kernel(
    g, g_b, place, place_b, dx, dx_b, sums, pixels, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_H: tl.constexpr,
    OUT_W: tl.constexpr, TILES: tl.constexpr, BIAS: tl.constexpr, MAPS: tl.constexpr, TOWERS: tl.constexpr,
    X_PITCH: tl.constexpr, G_PITCH: tl.constexpr, PX: tl.constexpr, STRIDE: tl.constexpr, VEC: tl.constexpr,
    W: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """``TILES`` tiles of dx (N, H, W, C), each element written once, so nothing is added in memory.

    ``BIAS``: ``sums`` gets what this program has to give to its gradient.
    """
    tower = tl.program_id(0) % TOWERS
    g, place = tower_of(g, g_b, tower, MAPS, G_PITCH), tower_of(place, place_b, tower, MAPS, G_PITCH)
    dx = tower_of(dx, dx_b, tower, MAPS, X_PITCH)
    total = tl.zeros((W * L, VEC), tl.float32)
    for number in range(TILES):
        tile = tl.program_id(0) // TOWERS * TILES + number
        pixel, group, inside = locate(tile, pixels, MAPS // VEC, W, L)
        change = unpooled(g, place, pixel, group, inside, HEIGHT, WIDTH, OUT_H, OUT_W, G_PITCH, PX, STRIDE, VEC)
        write(dx, change, pixel, group, inside, X_PITCH, VEC)
        if BIAS:
            total += change
    if BIAS:
        store_sums(sums, total, MAPS // VEC, VEC, L)
