"""ReLU and dropout of a fully connected layer in one pass, in Triton; the mask is counted where it is used.

Both towers' units of a row are in one launch, each with a start of its own. A word of 64 bits is hashed once for four
units (:class:`trainer.model.layers.DropoutDraws` defines the mask) and lives in registers. The backward needs no mask:
what was kept and above 0 is above 0. Bytes an element of bfloat16: forward 2 + 2, backward 4 + 2.

A launch in a CUDA graph repeats its numbers, so a start is the sum of one of these and of one in memory; a launch by
itself finds 0 there. One compiled kernel serves both: nothing is compiled, nor loaded, while a graph is captured.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
import triton
import triton.language as tl

# of splitmix64 (Steele, Lea, Flood 2014)
STEP, FIRST = tl.constexpr(0x9E3779B97F4A7C15), tl.constexpr(0xBF58476D1CE4E5B9)
SECOND = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _word(number, start):
    """Word ``number`` of a start, uint64."""
    word = number * STEP + start
    word = (word ^ (word >> 30)) * FIRST
    word = (word ^ (word >> 27)) * SECOND
    return word ^ (word >> 31)


# None of the numbers makes another kernel of it: starts and rows are others in every step.
@triton.jit(
    do_not_specialize=["count", "first", "least", "start_a", "start_b"],
    do_not_specialize_on_alignment=["more_a", "more_b"],
)
def relu_dropout_kernel(
    x, y, more_a, more_b, start_a: tl.int64, start_b: tl.int64, count: tl.int32, first: tl.int32, least: tl.int32,
    factor, UNITS: tl.constexpr, TOWERS: tl.constexpr, WORDS: tl.constexpr, SKIPPED: tl.constexpr, VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y = ReLU(x) * mask * factor of ``count`` rows (TOWERS, UNITS): ``BLOCK`` groups of ``VEC`` units.

    A tower's row has ``WORDS`` words, and its units here are those behind ``SKIPPED`` others. A unit is kept where its
    16 bits, as a signed number, are at least ``least`` - 32768.
    """
    GROUPS: tl.constexpr = UNITS // VEC  # of a tower
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, group = index // (TOWERS * GROUPS), index % (TOWERS * GROUPS)
    inside = row < count
    unit = (group % GROUPS) * VEC + SKIPPED
    start = tl.zeros((BLOCK,), tl.int64) + start_a + tl.load(more_a)
    if TOWERS == 2:
        start = tl.where(group < GROUPS, start, start_b + tl.load(more_b))
    start = start.to(tl.uint64)
    number = ((row + first).to(tl.int64) * WORDS + unit // 4).to(tl.uint64)
    lane = tl.arange(0, VEC)[None, :]
    word = tl.broadcast_to(_word(number, start)[:, None], (BLOCK, VEC))
    if VEC == 8:  # two words
        word = tl.where(lane < 4, word, _word(number + 1, start)[:, None])
    place = ((unit[:, None] + lane) % 4 * 16).to(tl.uint64)
    bits = ((word >> place) & 0xFFFF).to(tl.int32) ^ 0x8000
    keep = tl.where(bits >= least, 1.0, 0.0)
    at = index.to(tl.int64)[:, None] * VEC + lane
    value = tl.load(x + at, mask=inside[:, None], other=0.0).to(tl.float32)
    value = tl.where(value < 0, 0.0, value) * keep * factor  # what is not finite stays so
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["count"])
def relu_dropout_backward_kernel(y, g, dx, count, factor, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """dx = g * factor where y is above 0, else 0, of ``count`` elements: ``BLOCK`` groups of ``VEC``."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (index < count // VEC)[:, None]
    at = index.to(tl.int64)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    slope = tl.where(value <= 0, 0.0, slope * factor)
    tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=inside)
