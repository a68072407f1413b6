"""How the GPU kernels hold maps: a thread has ``VEC`` neighboring channels of a pixel, 16 bytes of bfloat16.

A tile has the shape (W, L, VEC): L groups of channels lie in a warp's lanes, so whole rows of maps lie in one warp, and
W such pieces make a program. :func:`unpack` gives the channels of a group a name each, without moving anything; a
neighbor in the same group is then another register, and one in the group beside it comes by one shuffle, not from
memory. 4 shuffles per 8 channels make a window of five.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005 - a star in a tuple is nothing that Triton compiles
import triton
import triton.language as tl


@triton.jit
def unpack(tile, VEC: tl.constexpr):
    """(W, L, VEC) -> VEC tensors (W, L), one per channel of a group."""
    W: tl.constexpr = tile.shape[0]
    L: tl.constexpr = tile.shape[1]
    if VEC == 1:
        return (tl.reshape(tile, (W, L)),)
    elif VEC == 2:
        even, odd = tl.split(tile)
        return (even, odd)
    elif VEC == 4:
        even, odd = tl.split(tl.reshape(tile, (W, L, 2, 2)))
        a0, a2 = tl.split(even)
        a1, a3 = tl.split(odd)
        return (a0, a1, a2, a3)
    else:
        even, odd = tl.split(tl.reshape(tile, (W, L, 4, 2)))
        even0, even2 = tl.split(tl.reshape(even, (W, L, 2, 2)))
        odd0, odd2 = tl.split(tl.reshape(odd, (W, L, 2, 2)))
        a0, a4 = tl.split(even0)
        a2, a6 = tl.split(even2)
        a1, a5 = tl.split(odd0)
        a3, a7 = tl.split(odd2)
        return (a0, a1, a2, a3, a4, a5, a6, a7)


@triton.jit
def pack(parts, VEC: tl.constexpr):
    """The inverse of :func:`unpack`."""
    W: tl.constexpr = parts[0].shape[0]
    L: tl.constexpr = parts[0].shape[1]
    if VEC == 1:
        return tl.reshape(parts[0], (W, L, 1))
    elif VEC == 2:
        return tl.join(parts[0], parts[1])
    elif VEC == 4:
        both = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        return tl.reshape(both, (W, L, 4))
    else:
        even = tl.reshape(tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6])), (W, L, 4))
        odd = tl.reshape(tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7])), (W, L, 4))
        return tl.reshape(tl.join(even, odd), (W, L, 8))


@triton.jit
def _beside(parts, channel: tl.constexpr, group, GROUPS: tl.constexpr, VEC: tl.constexpr):
    """Channel ``channel`` counted from a group's first: of this group, or of one beside it; 0 outside the row."""
    W: tl.constexpr = parts[0].shape[0]
    L: tl.constexpr = parts[0].shape[1]
    shift: tl.constexpr = (channel + 8 * VEC) // VEC - 8
    value = parts[channel - shift * VEC]
    if shift == 0:
        return value
    else:
        lane = tl.broadcast_to(tl.arange(0, L)[None, :], (W, L)) + shift
        near = tl.gather(value, tl.minimum(tl.maximum(lane, 0), L - 1), 1)
        return tl.where((group + shift >= 0) & (group + shift < GROUPS), near, 0.0)


@triton.jit
def window(parts, group, HALF: tl.constexpr, GROUPS: tl.constexpr, VEC: tl.constexpr):
    """Sums over ``2 HALF + 1`` neighboring channels of a row, as ``parts``: VEC tensors (W, L).

    Args:
        parts: the channels of each group.
        group: (W, L) place of a group in its row, 0..GROUPS - 1.
        HALF: neighbors on each side.
        GROUPS: groups in a row.
        VEC: channels in a group.
    """
    sums = ()
    for j in tl.static_range(VEC):
        total = _beside(parts, j - HALF, group, GROUPS, VEC)
        for offset in tl.static_range(1 - HALF, HALF + 1):
            total += _beside(parts, j + offset, group, GROUPS, VEC)
        sums = sums + (total,)
    return sums


@triton.jit
def locate(tile, pixels, GROUPS: tl.constexpr, W: tl.constexpr, L: tl.constexpr):
    """Where the groups of a tower's tile lie: (W, L) pixel, group in its row, and whether there is one.

    A warp's lanes have whole rows only; what is left of 32 lanes is idle (2 of 32 for 48 maps, none for 128).

    Args:
        tile: its number among those of its tower.
        pixels: rows in all.
        GROUPS: groups in a row.
        W: pieces of a tile.
        L: lanes of a piece.
    """
    ROWS: tl.constexpr = L // GROUPS
    piece = tile * W + tl.arange(0, W)[:, None]
    lane = tl.arange(0, L)[None, :]
    pixel = piece * ROWS + lane // GROUPS
    inside = (lane < ROWS * GROUPS) & (pixel < pixels)
    return pixel, tl.broadcast_to(lane % GROUPS, (W, L)), inside


@triton.jit
def tower_of(first, second, tower, MAPS: tl.constexpr, PITCH: tl.constexpr):
    """Where a tower's maps begin.

    Args:
        first: all towers' maps, of a pixel side by side; or tower a's.
        second: tower b's; where there are no parts, it is not looked at.
        tower: 0 or 1.
        MAPS: of a tower.
        PITCH: channels of a pixel in this memory: ``MAPS`` where a tower has memory of its own.
    """
    if PITCH == MAPS:
        return tl.where(tower == 0, first, second)
    else:
        return first + tower * MAPS


@triton.jit
def spots(pixel, group, PITCH: tl.constexpr, VEC: tl.constexpr):
    """(..., VEC) where the channels of a group lie, from a tower's begin; ``pixel`` and ``group`` are (...)."""
    return tl.expand_dims(pixel.to(tl.int64) * PITCH + group * VEC, -1) + tl.arange(0, VEC)


@triton.jit
def bias_of(bias, tower, group, MAPS: tl.constexpr, VEC: tl.constexpr):
    """(W, L, VEC) float32: the biases of a tower's groups."""
    at = tl.expand_dims(tower * MAPS + group * VEC, -1) + tl.arange(0, VEC)
    return tl.load(bias + at).to(tl.float32)


@triton.jit
def store_sums(sums, total, GROUPS: tl.constexpr, VEC: tl.constexpr):
    """Writes a program's row of ``sums``: what it has added up, by lane: (programs, L // GROUPS rows, maps) float32."""
    L: tl.constexpr = total.shape[1]
    LANES: tl.constexpr = L // GROUPS * GROUPS
    lane = tl.arange(0, L)[:, None]
    at = tl.program_id(0).to(tl.int64) * (LANES * VEC) + lane * VEC + tl.arange(0, VEC)[None, :]
    tl.store(sums + at, tl.sum(total, 0), mask=lane < LANES)
