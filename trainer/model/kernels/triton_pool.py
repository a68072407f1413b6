"""Max pooling for a GPU, channels_last, in Triton: what is kept for the backward is a byte an output.

torch keeps the input and eight bytes an output. Here an output's byte says which place of its window was the largest,
counted row by row; where maxima tie, the first (torch's rule); NaN wins over all. With a ReLU before the pooling, 255
says that nothing in the window was above 0, so that no gradient passes.

Bytes, of x elements of 2 bytes (bf16) and y outputs: forward reads 2 x, writes 2 y + y; backward reads 2 y + y, writes
2 x. What windows share is read from the caches.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

NOTHING = tl.constexpr(255)  # the window has nothing above 0


@triton.jit
def pool_forward_kernel(
    x, y, place, pixels, shape_h, shape_w, out_h, out_w, CHANNELS: tl.constexpr, PX: tl.constexpr,
    STRIDE: tl.constexpr, RECTIFY: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (N, out_h, out_w, C) and places (uint8) of x (N, H, W, C): ``BLOCK`` groups of ``VEC`` channels."""
    GROUPS: tl.constexpr = CHANNELS // VEC
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pixel, group = unit // GROUPS, unit % GROUPS
    inside = pixel < pixels
    row, column = (pixel // out_w) % out_h, pixel % out_w
    image = pixel // (out_w * out_h)
    vec = tl.arange(0, VEC)[None, :]
    best = tl.full((BLOCK, VEC), float("-inf"), tl.float32)
    found = tl.zeros((BLOCK, VEC), tl.int32)
    for i in tl.static_range(PX):
        for j in tl.static_range(PX):
            h, w = row * STRIDE + i, column * STRIDE + j
            at = ((image * shape_h + h) * shape_w + w).to(tl.int64) * CHANNELS + group * VEC
            there = inside & (h < shape_h) & (w < shape_w)  # rounded up, a window hangs over the edge
            value = tl.load(x + (at[:, None] + vec), mask=there[:, None], other=float("-inf")).to(tl.float32)
            larger = (value > best) | (value != value)
            best = tl.where(larger, value, best)
            found = tl.where(larger, i * PX + j, found)
    if RECTIFY:
        found = tl.where(best <= 0, NOTHING, found)
        best = tl.where(best < 0, 0.0, best)
    to = unit.to(tl.int64)[:, None] * VEC + vec
    tl.store(y + to, best.to(y.dtype.element_ty), mask=inside[:, None])
    tl.store(place + to, found.to(tl.uint8), mask=inside[:, None])


@triton.jit
def unpooled(
    g, place, row, column, image, channel, inside, out_h, out_w, CHANNELS: tl.constexpr, PX: tl.constexpr,
    STRIDE: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The gradient of the pooling's input, (..., VEC) float32: from each window that holds a pixel and chose it.

    ``row``, ``column`` and ``image`` are those of each group's pixel, ``channel`` its first, ``inside`` whether
    there is one; g and place are (N, out_h, out_w, C).
    """
    REACH: tl.constexpr = (PX + STRIDE - 1) // STRIDE  # windows that hold a pixel, in each direction, at most
    vec = tl.arange(0, VEC)
    total = tl.expand_dims(tl.where(inside, 0.0, 0.0), -1) + tl.zeros((VEC,), tl.float32)
    for i in tl.static_range(REACH):
        for j in tl.static_range(REACH):
            to_h, to_w = row // STRIDE - i, column // STRIDE - j
            down, right = row - to_h * STRIDE, column - to_w * STRIDE
            there = inside & (to_h >= 0) & (to_w >= 0) & (to_h < out_h) & (to_w < out_w) & (down < PX) & (right < PX)
            at = ((image * out_h + to_h) * out_w + to_w).to(tl.int64) * CHANNELS + channel
            at = tl.expand_dims(at, -1) + vec
            mask = tl.expand_dims(there, -1)
            chosen = tl.load(place + at, mask=mask, other=NOTHING).to(tl.int32)
            slope = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
            total += tl.where(chosen == tl.expand_dims(down * PX + right, -1), slope, 0.0)
    return total


@triton.jit
def pool_backward_kernel(
    g, place, dx, pixels, shape_h, shape_w, out_h, out_w, CHANNELS: tl.constexpr, PX: tl.constexpr,
    STRIDE: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx (N, H, W, C): ``BLOCK`` groups of ``VEC`` channels, each written once, so nothing is added in memory."""
    GROUPS: tl.constexpr = CHANNELS // VEC
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pixel, group = unit // GROUPS, unit % GROUPS
    inside = pixel < pixels
    row, column = (pixel // shape_w) % shape_h, pixel % shape_w
    image = pixel // (shape_w * shape_h)
    total = unpooled(
        g, place, row, column, image, group * VEC, inside, out_h, out_w, CHANNELS, PX, STRIDE, VEC
    )  # fmt: skip
    to = unit.to(tl.int64)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    tl.store(dx + to, total.to(dx.dtype.element_ty), mask=inside[:, None])
