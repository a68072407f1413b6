"""ReLU of a convolution's output for a GPU, in Triton, with its bias, and written as the next convolution reads it.

Bytes an element of bfloat16: forward reads 2 and writes 2, backward reads 4 and writes 2. The bias and the cutting
apart of both towers' maps move nothing of their own.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from trainer.model.kernels.triton_tile import bias_of, locate, read, store_sums, tower_of, write


@triton.jit
def relu_forward_kernel(
    x, x_b, bias, y, y_b, pixels, BIAS: tl.constexpr, MAPS: tl.constexpr, TOWERS: tl.constexpr,
    X_PITCH: tl.constexpr, Y_PITCH: tl.constexpr, VEC: tl.constexpr, W: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """y = ReLU(x + bias) of one tile."""
    tower = tl.program_id(0) % TOWERS
    pixel, group, inside = locate(tl.program_id(0) // TOWERS, pixels, MAPS // VEC, W, L)
    value = read(tower_of(x, x_b, tower, MAPS, X_PITCH), pixel, group, inside, X_PITCH, VEC)
    if BIAS:
        value += bias_of(bias, tower, group, MAPS, VEC)
    value = tl.where(value < 0, 0.0, value)
    write(tower_of(y, y_b, tower, MAPS, Y_PITCH), value, pixel, group, inside, Y_PITCH, VEC)


@triton.jit
def relu_backward_kernel(
    y, y_b, g, g_b, dx, dx_b, sums, pixels, TILES: tl.constexpr, BIAS: tl.constexpr, MAPS: tl.constexpr,
    TOWERS: tl.constexpr, X_PITCH: tl.constexpr, Y_PITCH: tl.constexpr, VEC: tl.constexpr, W: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """dx = g where y is above 0, of ``TILES`` tiles; ``sums`` as of the pooling."""
    tower = tl.program_id(0) % TOWERS
    y, g = tower_of(y, y_b, tower, MAPS, Y_PITCH), tower_of(g, g_b, tower, MAPS, Y_PITCH)
    dx = tower_of(dx, dx_b, tower, MAPS, X_PITCH)
    total = tl.zeros((W * L, VEC), tl.float32)
    for number in range(TILES):
        tile = tl.program_id(0) // TOWERS * TILES + number
        pixel, group, inside = locate(tile, pixels, MAPS // VEC, W, L)
        value = read(y, pixel, group, inside, Y_PITCH, VEC)
        change = tl.where(value <= 0, 0.0, read(g, pixel, group, inside, Y_PITCH, VEC))
        write(dx, change, pixel, group, inside, X_PITCH, VEC)
        if BIAS:
            total += change
    if BIAS:
        store_sums(sums, total, MAPS // VEC, VEC, L)
