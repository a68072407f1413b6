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
from trainer.model.kernels.triton_tile import bias_of, locate, pack, read, store_sums, tower_of, unpack, window, write


@triton.jit
def norm_forward_kernel(
    x, x_b, bias, y, pixels, alpha, k, HALF: tl.constexpr, RECTIFY: tl.constexpr, BIAS: tl.constexpr,
    MAPS: tl.constexpr, TOWERS: tl.constexpr, X_PITCH: tl.constexpr, VEC: tl.constexpr, W: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """y = x d^-0.75, d = k + alpha * sum of x^2 over the window, of one tile; y has all towers' maps side by side."""
    GROUPS: tl.constexpr = MAPS // VEC
    tower = tl.program_id(0) % TOWERS
    pixel, group, inside = locate(tl.program_id(0) // TOWERS, pixels, GROUPS, W, L)
    value = read(tower_of(x, x_b, tower, MAPS, X_PITCH), pixel, group, inside, X_PITCH, VEC)
    if BIAS:
        value += bias_of(bias, tower, group, MAPS, VEC)
    if RECTIFY:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    values = unpack(value, VEC)
    sums = window(unpack(value * value, VEC), group, HALF, GROUPS, VEC, L)
    out = ()
    for j in tl.static_range(VEC):
        root = tl.rsqrt(k + alpha * sums[j])
        out = out + (values[j] * (root * tl.sqrt(root)),)
    write(y + tower * MAPS, pack(out, VEC), pixel, group, inside, MAPS * TOWERS, VEC)


@triton.jit
def norm_backward_kernel(
    x, x_b, bias, g, g_b, place, place_b, dx, dx_b, sums, pixels, alpha, k, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, TILES: tl.constexpr, HALF: tl.constexpr, RECTIFY: tl.constexpr,
    BIAS: tl.constexpr, MAPS: tl.constexpr, TOWERS: tl.constexpr, X_PITCH: tl.constexpr, G_PITCH: tl.constexpr,
    POOLED: tl.constexpr, PX: tl.constexpr, STRIDE: tl.constexpr, VEC: tl.constexpr, W: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """dx = g d^-0.75 - 1.5 alpha x * sum(g x d^-1.75) of ``TILES`` tiles; ``POOLED``: g is that of the pooled maps.

    ``BIAS``: it is added to x, and ``sums`` gets what this program has to give to its gradient.
    """
    GROUPS: tl.constexpr = MAPS // VEC
    tower = tl.program_id(0) % TOWERS
    x, dx = tower_of(x, x_b, tower, MAPS, X_PITCH), tower_of(dx, dx_b, tower, MAPS, X_PITCH)
    g, place = tower_of(g, g_b, tower, MAPS, G_PITCH), tower_of(place, place_b, tower, MAPS, G_PITCH)
    total = tl.zeros((W * L, VEC), tl.float32)
    if BIAS:  # read once: a lane's channels are the same in every tile
        more = bias_of(bias, tower, locate(0, pixels, GROUPS, W, L)[1], MAPS, VEC)
    for number in range(TILES):
        tile = tl.program_id(0) // TOWERS * TILES + number
        pixel, group, inside = locate(tile, pixels, GROUPS, W, L)
        value = read(x, pixel, group, inside, X_PITCH, VEC)
        if BIAS:
            value += more
        if POOLED:
            slope = unpooled(g, place, pixel, group, inside, HEIGHT, WIDTH, OUT_H, OUT_W, G_PITCH, PX, STRIDE, VEC)
        else:
            slope = read(g, pixel, group, inside, G_PITCH, VEC)
        if RECTIFY:
            value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        values, slopes = unpack(value, VEC), unpack(slope, VEC)
        squares = window(unpack(value * value, VEC), group, HALF, GROUPS, VEC, L)
        first, products = (), ()
        for j in tl.static_range(VEC):
            root = tl.rsqrt(k + alpha * squares[j])
            scaled = slopes[j] * (root * tl.sqrt(root))
            first = first + (scaled,)
            products = products + (scaled * values[j] * root * root,)
        totals = window(products, group, HALF, GROUPS, VEC, L)
        out = ()
        for j in tl.static_range(VEC):
            change = first[j] - 1.5 * alpha * values[j] * totals[j]
            if RECTIFY:
                change = tl.where(values[j] <= 0, 0.0, change)
            out = out + (change,)
        change = pack(out, VEC)
        write(dx, change, pixel, group, inside, X_PITCH, VEC)
        if BIAS:
            total += change  # 0 where nothing is inside: the gradient there is
    if BIAS:
        store_sums(sums, total, GROUPS, VEC, L)
