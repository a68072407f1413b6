"""The two towers as an image: layers as two columns, image at the top, loss at the bottom, crossings between them.

:func:`draw_net` draws a recipe's net, for the README and ``describe --svg``; the report gives :func:`draw_towers` the
bytes that a run counted. The SVG is written here, as no chart library draws ribbons between boxes; it needs no torch.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pipeline.manifest import write_atomic
from trainer.config import ModelConfig
from trainer.errors import RecipeError
from trainer.planning.describe import CrossingCount, count_crossings, count_layers

NOTES = {"lrn": "LRN", "lrn_within_channel": "spatial norm", "batch_norm": "batch norm"}

_WIDTH = 628  # of the view box; every length below is in its units
_BOX = 206  # width of a layer's box
_LEFT = 8  # left edge of tower a; tower b mirrors it
_TALL, _SLIM = 56, 28  # height of a box with parameters, and of one without (pooling)
_GAP, _CROSSING_GAP = 32, 52  # below a box, and above a box that sees both towers
_HEAD, _FOOT = 132, 92  # room for the image, and for the loss and the note
_WIDEST = 18.0  # the crossing with the most bytes; the others in proportion
_ENTER, _LEAVE = 13, 43  # where crossings enter and leave a tall box, from its top

STYLE = """
.towers{--paper:#fcfbf8;--ink:#1d1c1a;--soft:#6a675f;--hair:#d9d5cb;--a:#2b5f8f;--b:#a9660a;
 font-family:"Helvetica Neue",Helvetica,Arial,"Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
@media (prefers-color-scheme:dark){.towers{
 --paper:#15161a;--ink:#e8e5de;--soft:#9b978d;--hair:#37383d;--a:#7db4e6;--b:#e3ae5a}}
.towers text{fill:var(--ink);font-size:13.5px}.towers .soft{fill:var(--soft);font-size:12.5px}
.towers .name{font-weight:600;font-size:15px}.towers .head{font-size:15px;font-weight:600}
.towers .a{--c:var(--a)}.towers .b{--c:var(--b)}.towers .tint{fill:var(--c)}
.towers .box{fill:var(--c);fill-opacity:.07;stroke:var(--c);stroke-opacity:.75}
.towers .flow{fill:none;stroke:var(--soft);stroke-width:1.2}.towers .tip{fill:var(--soft)}
.towers .ribbon{fill:none;stroke:var(--c);stroke-opacity:.5}.towers .point{fill:var(--c)}
.towers .halo{paint-order:stroke;stroke:var(--paper);stroke-width:4px;stroke-linejoin:round;font-weight:600}
""".strip()


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One layer, as one tower holds it.

    Attributes:
        name: ``conv1``, ``pool1``, ``fc6``...
        detail: what it is, for example ``11x11, stride 4, 48 maps``.
        output: shape of what it hands on, for example ``27x27x48``.
        parameters: weights and biases of one tower; 0 draws a slim row.
    """

    name: str
    detail: str
    output: str
    parameters: int


@dataclasses.dataclass(frozen=True)
class _Placed:
    row: LayerRow
    crossing: CrossingCount | None
    top: float
    height: float

    @property
    def on_a_alone(self) -> bool:
        return self.crossing is not None and not self.crossing.bytes_a_to_b and self.crossing.bytes_b_to_a > 0


def draw_net(model: ModelConfig) -> str:
    """The net of a recipe as an SVG document; bytes on the crossings are an image's, forward, float32."""
    image = f"{model.image_px}x{model.image_px}x{model.in_channels}"
    return draw_towers(layer_rows(model), count_crossings(model), image=image, towers=model.towers)


def write_drawing(path: Path, model: ModelConfig) -> None:
    """Writes :func:`draw_net` to a file.

    Raises:
        RecipeError: the file cannot be written.
    """
    try:
        write_atomic(path, draw_net(model).encode())
    except OSError as error:
        raise RecipeError(
            f"--svg {path} cannot be written ({error.strerror}): give a file in a folder of yours"
        ) from None


def layer_rows(model: ModelConfig) -> list[LayerRow]:
    """The layers of tower a, each pooling as a row of its own."""
    sizes, rows = model.map_sizes(), []
    for count in count_layers(model):
        name = count.layer
        if name.startswith("fc"):
            inputs, units = count.kernel.split(" -> ")
            dropout = ", dropout" if name != "fc8" and model.dropout else ""
            rows.append(LayerRow(name, f"{inputs} to {units}{dropout}", units, count.parameters_a))
            continue
        index = int(name[-1]) - 1
        maps, side, kernel = model.channels[index], sizes[name], model.kernel_sizes[index]
        stride = f", stride {model.strides[index]}" if model.strides[index] > 1 else ""
        then = [NOTES[word] for word in model.post_ops[index] if word in NOTES]
        detail = ", ".join([f"{kernel}x{kernel}{stride}", f"{maps} maps", *then])
        rows.append(LayerRow(name, detail, f"{side}x{side}x{maps}", count.parameters_a))
        pooled = sizes.get(f"pool{index + 1}")
        if pooled:
            window = f"{model.pool_px}x{model.pool_px}, stride {model.pool_stride}"
            rows.append(LayerRow(f"pool{index + 1}", window, f"{pooled}x{pooled}x{maps}", 0))
    return rows


def format_bytes(count: float) -> str:
    """``86528`` -> ``86.5 kB``: decimal units, three digits."""
    if count < 1000:
        return f"{count:.0f} B"
    power = min(4, max(1, math.floor(math.log10(count * 1.0005) / 3)))
    count, unit = count / 1000**power, ("kB", "MB", "GB", "TB")[power - 1]
    digits = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:.{digits}f} {unit}"


def draw_towers(
    rows: Sequence[LayerRow],
    crossings: Sequence[CrossingCount],
    *,
    image: str = "image",
    note: str = "Bytes an image, forward. Gradients go back the same ways, reversed.",
    towers: int = 2,
) -> str:
    """Draws the two towers.

    Args:
        rows: the layers of one tower from the image to the classes.
        crossings: what crosses, each naming its layer in ``rows``; line width is in proportion to bytes. A layer that
            nothing crosses to from a to b lives on tower a alone.
        image: text under the image at the top, for example ``224x224x3``.
        note: what the bytes on the crossings mean; the last line of the drawing of two towers.
        towers: 2, or 1 for a net of one tower, which has no crossings.

    Returns:
        A whole SVG document that brings its own colors for light and dark, and may be put inline into HTML.

    Raises:
        ValueError: a crossing names a layer that is not in ``rows``, or there are no rows.
    """
    placed = _place(rows, crossings)
    two = towers == 2
    width = _WIDTH if two else 2 * _LEFT + _BOX
    most = max((max(c.bytes_a_to_b, c.bytes_b_to_a) for c in crossings), default=1)
    height = placed[-1].top + placed[-1].height + _FOOT
    parts = [_image(image, placed[0].top) if two else _image_over_one(image, placed[0].top)]
    for above, here in itertools.pairwise(placed):  # ribbons first: boxes and labels lie on top
        parts += _ribbons(above, here, most)
    for index, here in enumerate(placed):
        before = placed[index - 1] if index else None
        parts += [_layer("a", before, here)] + ([_layer("b", before, here)] if two and not here.on_a_alone else [])
    if any(row.parameters for row in rows):
        for tower in "ab"[:towers]:
            parts.append(_text(_left(tower) + _BOX - 12, placed[0].top - 8, "parameters", "soft", anchor="end"))
    parts.append(_loss(placed[-1], height, note if two else ""))
    label = f"{'Two towers' if two else 'One tower'} of layers; what crosses: " + (
        ", ".join(f"{c.layer} {c.bytes_a_to_b} B a to b, {c.bytes_b_to_a} B b to a" for c in crossings) or "nothing"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="towers" viewBox="0 0 {width} {height:.0f}" role="img"'
        f' aria-label="{escape(label)}"><style>{STYLE}</style>'
        f'<rect width="{width}" height="{height:.0f}" fill="var(--paper)"/>{"".join(parts)}</svg>\n'
    )


def _place(rows: Sequence[LayerRow], crossings: Sequence[CrossingCount]) -> list[_Placed]:
    if not rows:
        raise ValueError("no layers to draw")
    by_layer = {crossing.layer: crossing for crossing in crossings}
    unknown = set(by_layer) - {row.name for row in rows}
    if unknown:
        raise ValueError(f"crossings into layers that are not drawn: {', '.join(sorted(unknown))}")
    placed: list[_Placed] = []
    bottom: float = _HEAD
    for row in rows:
        crossing = by_layer.get(row.name)
        height = _TALL if row.parameters or crossing else _SLIM
        top = bottom + ((_CROSSING_GAP if crossing else _GAP) if placed else 0)
        placed.append(_Placed(row, crossing, top, height))
        bottom = top + height
    return placed


def _left(tower: str) -> float:
    return _LEFT if tower == "a" else _WIDTH - _LEFT - _BOX


def _text(x: float, y: float, text: str, css: str = "", *, anchor: str = "start", room: float = 0.0) -> str:
    """Text; with ``room`` it is squeezed where it would be wider than that (a glyph counts 6.2 of them)."""
    wide = bool(room) and len(text) * 6.2 > room
    squeeze = f' textLength="{room:.0f}" lengthAdjust="spacingAndGlyphs"' if wide else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}"{squeeze}>{escape(text)}</text>'


def _arrow(x: float, top: float, bottom: float) -> str:
    return (
        f'<path class="flow" d="M{x:.1f} {top:.1f}V{bottom - 5:.1f}"/>'
        f'<path class="tip" d="M{x - 4:.1f} {bottom - 7:.1f}h8l-4 7z"/>'
    )


def _times(text: str) -> str:
    """``27x27x48`` -> ``27 × 27 × 48``, for reading; other text stays."""
    pieces = text.split("x")
    return " × ".join(pieces) if len(pieces) > 1 and all(piece.strip().isdigit() for piece in pieces) else text


def _frame(middle: float) -> str:
    """The sign for an image."""
    hills = f"M{middle - 25} 66l17-20 12 13 9-9 12 16z"
    return (
        f'<rect x="{middle - 30}" y="22" width="60" height="50" rx="2" fill="none" stroke="var(--soft)"/>'
        f'<path d="{hills}" fill="var(--soft)" fill-opacity=".45"/>'
        f'<circle cx="{middle + 13}" cy="36" r="4.5" fill="var(--soft)" fill-opacity=".45"/>'
    )


def _image_over_one(text: str, top: float) -> str:
    middle = _left("a") + _BOX / 2
    return _frame(middle) + _text(middle + 10, 96, _times(text)) + _arrow(middle, 72, top)


def _image(text: str, top: float) -> str:
    middle = _WIDTH / 2
    a, b = _left("a") + _BOX / 2, _left("b") + _BOX / 2
    wires = "".join(
        f'<path class="flow" d="M{middle + side * 30} 47H{x - side * 8}q{side * 8} 0 {side * 8} 8V{top - 5}"/>'
        f'<path class="tip" d="M{x - 4} {top - 7}h8l-4 7z"/>'
        for x, side in ((a, -1), (b, 1))
    )
    heads = _text(_left("a"), top - 8, "tower a", "head tint a") + _text(_left("b"), top - 8, "tower b", "head tint b")
    under = _text(middle, 90, _times(text), anchor="middle") + _text(
        middle, 106, "whole, into both", "soft", anchor="middle"
    )
    return wires + _frame(middle) + heads + under


def _layer(tower: str, above: _Placed | None, here: _Placed) -> str:
    x, y = _left(tower), here.top
    middle, row = x + _BOX / 2, here.row
    parts = [f'<rect class="box {tower}" x="{x}" y="{y:.1f}" width="{_BOX}" height="{here.height}" rx="3"/>']
    if above is not None:
        bottom = above.top + above.height
        parts.append(_arrow(middle, bottom, y))
        parts.append(_text(middle + 10, (bottom + y) / 2 + 3, _times(above.row.output), "soft"))
    line = y + (22 if here.height == _TALL else 18.5)
    parts.append(_text(x + 12, line, row.name, "name"))
    if row.parameters:
        parts.append(_text(x + _BOX - 12, line, f"{row.parameters:,}", "", anchor="end"))
    if here.height == _TALL:
        parts.append(_text(x + 12, y + 42, row.detail.replace("x", "×"), "soft", room=_BOX - 24))
    else:
        parts.append(_text(x + _BOX - 12, line, row.detail.replace("x", "×"), "soft", anchor="end", room=_BOX - 76))
    return "".join(parts)


def _ribbons(above: _Placed, here: _Placed, most: int) -> list[str]:
    if here.crossing is None:
        return []
    start = above.top + (_LEAVE if above.height == _TALL else above.height / 2)
    parts = []
    for tower, count in (("a", here.crossing.bytes_a_to_b), ("b", here.crossing.bytes_b_to_a)):
        if count:
            parts.append(_ribbon(tower, count, max(1.2, _WIDEST * count / most), start, here.top + _ENTER))
    values = f"{here.crossing.elements:,} values"
    parts.append(_text(_WIDTH / 2, start - 8, values, "soft", anchor="middle"))
    return parts


def _ribbon(tower: str, count: int, width: float, start: float, end: float) -> str:
    """One direction of one crossing, as an S from the sender's side to the receiver's, with its bytes at its start."""
    inner_a, inner_b = _LEFT + _BOX, _WIDTH - _LEFT - _BOX
    x0, x1, way = (inner_a, inner_b, 1) if tower == "a" else (inner_b, inner_a, -1)
    half, tip = width / 2 + 3.5, 9.0
    stop, middle = x1 - way * tip, (x0 + x1) / 2
    line = f"M{x0} {start:.1f}C{middle} {start:.1f} {middle} {end:.1f} {stop:.1f} {end:.1f}"
    label = _text(
        x0 + way * 8,
        start - width / 2 - 4,
        format_bytes(count),
        f"halo tint {tower}",
        anchor="start" if way > 0 else "end",
    )
    return (
        f'<g class="{tower}"><path class="ribbon" stroke-width="{width:.1f}" d="{line}"/>'
        f'<path class="point" d="M{stop:.1f} {end - half:.1f}v{2 * half:.1f}L{x1} {end:.1f}z"/>{label}</g>'
    )


def _loss(last: _Placed, height: float, note: str) -> str:
    x, y = _left("a"), last.top + last.height
    middle = x + _BOX / 2
    parts = [
        _arrow(middle, y, y + 26),
        _text(middle + 10, y + 15, _times(last.row.output), "soft"),
        _text(middle, y + 43, "softmax, loss", "name", anchor="middle"),
        _text(_WIDTH / 2, height - 12, note, "soft", anchor="middle", room=_WIDTH - 40) if note else "",
    ]
    if last.on_a_alone:
        middle_b = _left("b") + _BOX / 2
        parts.append(_text(middle_b, last.top + 22, f"no {last.row.name} here: it lives on", "soft", anchor="middle"))
        parts.append(_text(middle_b, last.top + 38, "tower a, with the loss", "soft", anchor="middle"))
    return "".join(parts)
