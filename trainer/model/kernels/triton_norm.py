"""Response normalization for a GPU, in Triton: memory is read once and written once, each root is taken once.

Sums over neighboring maps come from registers (:mod:`.triton_tile`). Everything is float32 between load and store.
Bytes an element of bfloat16: forward reads 2 and writes 2, backward reads 4 and writes 2. Behind a pooling that is
done in the same pass (``POOLED``) the backward reads the pooled gradient and its places instead of the gradient:
3 bytes an *output*, a quarter as many, and the gradient between the two is never in memory.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005 - a star in a tuple is nothing that Triton compiles
import triton
import triton.language as tl

from trainer.model.kernels.triton_pool import unpooled
from trainer.model.kernels.triton_tile import locate, pack, unpack, window


@triton.jit
def norm_forward_kernel(
    x, y, rows, alpha, k, HALF: tl.constexpr, RECTIFY: tl.constexpr, MAPS: tl.constexpr, VEC: tl.constexpr,
    W: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """y = x d^-0.75, d = k + alpha * sum of x^2 over the window, of W * (L // groups) rows of ``MAPS`` maps."""
    GROUPS: tl.constexpr = MAPS // VEC
    row, group, inside = locate(rows, GROUPS, W, L)
    at = (row.to(tl.int64) * MAPS + group * VEC)[:, :, None] + tl.arange(0, VEC)[None, None, :]
    value = tl.load(x + at, mask=inside[:, :, None], other=0.0).to(tl.float32)
    if RECTIFY:
        value = tl.where(value < 0, 0.0, value)
    values = unpack(value, VEC)
    sums = window(unpack(value * value, VEC), group, HALF, GROUPS, VEC)
    out = ()
    for j in tl.static_range(VEC):
        root = tl.rsqrt(k + alpha * sums[j])
        out = out + (values[j] * (root * tl.sqrt(root)),)
    tl.store(y + at, pack(out, VEC).to(y.dtype.element_ty), mask=inside[:, :, None])


@triton.jit
def norm_backward_kernel(
    x, g, place, dx, rows, alpha, k, shape_h, shape_w, out_h, out_w, HALF: tl.constexpr, RECTIFY: tl.constexpr,
    MAPS: tl.constexpr, TOWERS: tl.constexpr, POOLED: tl.constexpr, PX: tl.constexpr, STRIDE: tl.constexpr,
    VEC: tl.constexpr, W: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """dx = g d^-0.75 - 1.5 alpha x * sum(g x d^-1.75) of as many rows; ``POOLED``: g is that of the pooled maps."""
    GROUPS: tl.constexpr = MAPS // VEC
    row, group, inside = locate(rows, GROUPS, W, L)
    at = (row.to(tl.int64) * MAPS + group * VEC)[:, :, None] + tl.arange(0, VEC)[None, None, :]
    value = tl.load(x + at, mask=inside[:, :, None], other=0.0).to(tl.float32)
    if POOLED:
        pixel, channel = row // TOWERS, (row % TOWERS) * MAPS + group * VEC
        h, w, image = (pixel // shape_w) % shape_h, pixel % shape_w, pixel // (shape_w * shape_h)
        slope = unpooled(g, place, h, w, image, channel, inside, out_h, out_w, MAPS * TOWERS, PX, STRIDE, VEC)
    else:
        slope = tl.load(g + at, mask=inside[:, :, None], other=0.0).to(tl.float32)
    if RECTIFY:
        value = tl.where(value < 0, 0.0, value)
    values, slopes = unpack(value, VEC), unpack(slope, VEC)
    sums = window(unpack(value * value, VEC), group, HALF, GROUPS, VEC)
    first, products = (), ()
    for j in tl.static_range(VEC):
        root = tl.rsqrt(k + alpha * sums[j])
        scaled = slopes[j] * (root * tl.sqrt(root))
        first = first + (scaled,)
        products = products + (scaled * values[j] * root * root,)
    totals = window(products, group, HALF, GROUPS, VEC)
    out = ()
    for j in tl.static_range(VEC):
        change = first[j] - 1.5 * alpha * values[j] * totals[j]
        if RECTIFY:
            change = tl.where(values[j] <= 0, 0.0, change)
        out = out + (change,)
    tl.store(dx + at, pack(out, VEC).to(dx.dtype.element_ty), mask=inside[:, :, None])
