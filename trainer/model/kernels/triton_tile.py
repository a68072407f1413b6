"""How the GPU kernels hold maps: a thread has ``VEC`` neighboring channels of a pixel, 16 bytes of bfloat16.

A tile has the shape (P, VEC), P = W L: L groups of channels lie in a warp's lanes, so whole rows of maps lie in one
warp, and W such pieces make a program. (As (W, L, VEC), Triton 3.6 spread a piece over warps, and moved every channel
through shared memory.) :func:`unpack` gives the channels of a group a name each, without moving anything; a neighbor in
the same group is then another register, and one in the group beside it comes by one shuffle, not from
memory. 4 shuffles per 8 channels make a window of five.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005 - a star in a tuple is nothing that Triton compiles
import triton
import triton.language as tl


@triton.jit
def unpack(tile, VEC: tl.constexpr):
    """(P, VEC) -> VEC tensors (P,), one per channel of a group."""
    P: tl.constexpr = tile.shape[0]
    if VEC == 1:
        return (tl.reshape(tile, (P,)),)
    elif VEC == 2:
        even, odd = tl.split(tile)
        return (even, odd)
    elif VEC == 4:
        even, odd = tl.split(tl.reshape(tile, (P, 2, 2)))
        a0, a2 = tl.split(even)
        a1, a3 = tl.split(odd)
        return (a0, a1, a2, a3)
    else:
        even, odd = tl.split(tl.reshape(tile, (P, 4, 2)))
        even0, even2 = tl.split(tl.reshape(even, (P, 2, 2)))
        odd0, odd2 = tl.split(tl.reshape(odd, (P, 2, 2)))
        a0, a4 = tl.split(even0)
        a2, a6 = tl.split(even2)
        a1, a5 = tl.split(odd0)
        a3, a7 = tl.split(odd2)
        return (a0, a1, a2, a3, a4, a5, a6, a7)


@triton.jit
def pack(parts, VEC: tl.constexpr):
    """The inverse of :func:`unpack`."""
    P: tl.constexpr = parts[0].shape[0]
    if VEC == 1:
        return tl.reshape(parts[0], (P, 1))
    elif VEC == 2:
        return tl.join(parts[0], parts[1])
    elif VEC == 4:
        both = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        return tl.reshape(both, (P, 4))
    else:
        even = tl.reshape(tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6])), (P, 4))
        odd = tl.reshape(tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7])), (P, 4))
        return tl.reshape(tl.join(even, odd), (P, 8))


@triton.jit
def _beside(parts, channel: tl.constexpr, group, GROUPS: tl.constexpr, VEC: tl.constexpr, L: tl.constexpr):
    """Channel ``channel`` counted from a group's first: of this group, or of one beside it; 0 outside the row."""
    P: tl.constexpr = parts[0].shape[0]
    shift: tl.constexpr = (channel + 8 * VEC) // VEC - 8
    value = parts[channel - shift * VEC]
    if shift == 0:
        return value
    else:
        lane = tl.broadcast_to(tl.arange(0, L)[None, :], (P // L, L)) + shift
        near = tl.gather(tl.reshape(value, (P // L, L)), tl.minimum(tl.maximum(lane, 0), L - 1), 1)
        return tl.where((group + shift >= 0) & (group + shift < GROUPS), tl.reshape(near, (P,)), 0.0)


@triton.jit
def window(parts, group, HALF: tl.constexpr, GROUPS: tl.constexpr, VEC: tl.constexpr, L: tl.constexpr):
    """Sums over ``2 HALF + 1`` neighboring channels of a row, as ``parts``: VEC tensors (P,).

    Args:
        parts: the channels of each group.
        group: (P,) place of a group in its row, 0..GROUPS - 1.
        HALF: neighbors on each side.
        GROUPS: groups in a row.
        VEC: channels in a group.
        L: lanes of a piece.
    """
    sums = ()
    for j in tl.static_range(VEC):
        total = _beside(parts, j - HALF, group, GROUPS, VEC, L)
        for offset in tl.static_range(1 - HALF, HALF + 1):
            total += _beside(parts, j + offset, group, GROUPS, VEC, L)
        sums = sums + (total,)
    return sums


@triton.jit
def locate(tile, pixels, GROUPS: tl.constexpr, W: tl.constexpr, L: tl.constexpr):
    """Where the groups of a tower's tile lie: (P,) pixel, group in its row, and whether there is one.

    A warp's lanes have whole rows only; what is left of 32 lanes is idle (2 of 32 for 48 maps, none for 128).

    Args:
        tile: its number among those of its tower.
        pixels: rows in all.
        GROUPS: groups in a row.
        W: pieces of a tile.
        L: lanes of a piece.
    """
    ROWS: tl.constexpr = L // GROUPS
    place = tl.arange(0, W * L)
    lane = place % L
    pixel = (tile * W + place // L) * ROWS + lane // GROUPS
    inside = (lane < ROWS * GROUPS) & (pixel < pixels)
    return pixel, lane % GROUPS, inside


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
    """(P, VEC) where the channels of a group lie, from a tower's begin; ``pixel`` and ``group`` are (P,)."""
    return tl.expand_dims(pixel.to(tl.int64) * PITCH + group * VEC, -1) + tl.arange(0, VEC)


@triton.jit
def read(maps, pixel, group, inside, PITCH: tl.constexpr, VEC: tl.constexpr):
    """(P, VEC) float32: a tile of a tower's maps; 0 where nothing is inside."""
    return tl.load(maps + spots(pixel, group, PITCH, VEC), mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def write(maps, value, pixel, group, inside, PITCH: tl.constexpr, VEC: tl.constexpr):
    """The inverse of :func:`read`, in the maps' dtype."""
    tl.store(maps + spots(pixel, group, PITCH, VEC), value.to(maps.dtype.element_ty), mask=inside[:, None])


@triton.jit
def bias_of(bias, tower, group, MAPS: tl.constexpr, VEC: tl.constexpr):
    """(P, VEC) float32: the biases of a tower's groups."""
    at = tl.expand_dims(tower * MAPS + group * VEC, -1) + tl.arange(0, VEC)
    return tl.load(bias + at).to(tl.float32)


@triton.jit
def store_sums(sums, total, GROUPS: tl.constexpr, VEC: tl.constexpr, L: tl.constexpr):
    """Writes a program's row of ``sums``: what it has added up, by lane: (programs, L // GROUPS rows, maps) float32."""
    LANES: tl.constexpr = L // GROUPS * GROUPS
    lane = tl.arange(0, L)[:, None]
    at = tl.program_id(0).to(tl.int64) * (LANES * VEC) + lane * VEC + tl.arange(0, VEC)[None, :]
    pieces = tl.reshape(total, (total.shape[0] // L, L, VEC))
    tl.store(sums + at, tl.sum(pieces, 0), mask=lane < LANES)
