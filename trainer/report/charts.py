"""Charts as inline SVG: hairline axes, lines named at their ends, colours from the page, for light and dark alike."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray

_WIDTH, _HEIGHT = 480, 252  # of the view box
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 84, 34, 36  # margins around the plot
_MOST_POINTS = 100  # a line has at most this many; more are summarised
_CROWDED = 40  # more dots than this are a line without dots
_CELL = 33  # side of a cell of the confusion table


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: written at the line's end.
        xs: positions, ascending, shape (n,).
        ys: values, shape (n,); not-finite ones are left out.
        css: colour class of the page: ``ink``, ``soft``, ``a`` or ``b``.
        summarise: draw the median of bins, and a band from their least to their greatest value (for noisy figures).
        steps: hold each value until the next (for a learning rate).
        shown: the figure written at the line's end; None for its last value.
    """

    name: str
    xs: ArrayLike
    ys: ArrayLike
    css: str = "ink"
    summarise: bool = False
    steps: bool = False
    shown: float | None = None


@dataclasses.dataclass(frozen=True)
class Axis:
    """How values are shown.

    Attributes:
        label: quantity and unit, the chart's title.
        form: value -> text, for ticks.
        exact: value -> text, for the figure at a line's end; None for the same as ticks.
        log: logarithmic; ignored where a value is not positive or all are within a factor of 20.
        low: the axis reaches down to this at least, if given.
        high: the axis reaches up to this at least, if given.
    """

    label: str
    form: Callable[[float], str] = "{:g}".format
    exact: Callable[[float], str] | None = None
    log: bool = False
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class _Curve:
    line: Line
    end: float
    xs: NDArray[np.float64]
    middle: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        return self.start + (self.end - self.start) * ((math.log(value) if self.log else value) - low) / (high - low)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside ``low``..``high``, about ``count`` of them."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next((m for m in (1, 2, 5) if m * power >= rough * 0.8), 10)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside ``low``..``high``, with their doubles and fivefolds where the range is short."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 300 else (1,)
    return [m * 10.0**k for k in decades for m in factors if low * 0.999 <= m * 10.0**k <= high * 1.001]


def line_chart(lines: Sequence[Line], axis: Axis, *, x_label: str = "step") -> str:
    """A line chart.

    Args:
        lines: at least one line; those without a finite value are left out.
        axis: the values' axis.
        x_label: quantity of ``xs``.

    Returns:
        ``<svg class="chart">``; an empty string where there is nothing to draw.
    """
    curves = [curve for line in lines if (curve := _curve(line)) is not None]
    if not curves:
        return ""
    x_scale, y_scale, exact = _x_scale(curves), _y_scale(curves, axis), axis.exact or axis.form
    parts = [_frame(x_scale, y_scale, axis, x_label)]
    parts += [_draw(curve, x_scale, y_scale) for curve in curves]
    parts.append(_end_labels(curves, x_scale, y_scale, exact))
    ends = ", ".join(f"{c.line.name} {exact(c.end)}" for c in curves)
    about = escape(f"{axis.label}; at the end: {ends}")
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{about}">{"".join(parts)}</svg>'


def _curve(line: Line) -> _Curve | None:
    """Finite points of a line, summarised to at most ``_MOST_POINTS`` bins; None where there are none."""
    xs, ys = np.asarray(line.xs, dtype=float), np.asarray(line.ys, dtype=float)
    finite = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[finite], ys[finite]
    if not len(xs):
        return None
    if line.steps:  # both ends of every level, or a drop would be drawn as a slope
        keep = np.flatnonzero(np.r_[True, ys[1:] != ys[:-1]] | np.r_[ys[1:] != ys[:-1], True])
        xs, ys = xs[keep], ys[keep]
    if not line.summarise or len(xs) <= _MOST_POINTS:
        chosen = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), 4 * _MOST_POINTS)).round().astype(int))
        xs, ys = xs[chosen], ys[chosen]
        return _Curve(line, line.shown if line.shown is not None else ys[-1], xs, ys, ys, ys)
    bins = np.array_split(np.arange(len(xs)), _MOST_POINTS)
    take = [(xs[b].mean(), np.median(ys[b]), ys[b].min(), ys[b].max()) for b in bins]
    x, middle, low, high = (np.array(column) for column in zip(*take, strict=True))
    x[0], x[-1] = xs[0], xs[-1]
    return _Curve(line, line.shown if line.shown is not None else middle[-1], x, middle, low, high)


def _x_scale(curves: Sequence[_Curve]) -> _Scale:
    low = min(0.0, *(float(curve.xs[0]) for curve in curves))  # from 0, so that charts side by side have one scale
    high = max(float(curve.xs[-1]) for curve in curves)
    return _Scale(low, high if high > low else low + 1, _LEFT, _WIDTH - _RIGHT)


def _y_scale(curves: Sequence[_Curve], axis: Axis) -> _Scale:
    low = min(float(c.low.min()) for c in curves)
    high = max(float(c.high.max()) for c in curves)
    start, end = _HEIGHT - _BOTTOM, _TOP
    if axis.log and low > 0 and high / low > 20:
        return _Scale(low / 1.15, high * 1.1, start, end, log=True)
    low = min(low, axis.low) if axis.low is not None else low
    high = max(high, axis.high) if axis.high is not None else high
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - abs(low) * 0.05 - 1e-9, high + abs(high) * 0.05 + 1e-9
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
    first, last = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return _Scale(first, last, start, end)  # the axis ends on ticks


def _frame(x_scale: _Scale, y_scale: _Scale, axis: Axis, x_label: str) -> str:
    """Title, grid lines and tick labels."""
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    ticks = log_ticks(y_scale.low, y_scale.high) if y_scale.log else nice_ticks(y_scale.low, y_scale.high)
    parts = [f'<text class="title" x="0" y="14">{escape(axis.label)}</text>']
    for tick in ticks:
        y = y_scale(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(_label(_LEFT - 7, y + 4, axis.form(tick), "end"))
    for tick in nice_ticks(x_scale.low, x_scale.high):
        x = x_scale(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(_label(x, bottom + 17, f"{tick:,.6g}", "middle"))
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(_label(right, _HEIGHT - 4, x_label, "end"))
    return "".join(parts)


def _draw(curve: _Curve, x_scale: _Scale, y_scale: _Scale) -> str:
    xs = [x_scale(x) for x in curve.xs]
    ys = [y_scale(y) for y in curve.middle]
    join = "H{0:.1f}V{1:.1f}" if curve.line.steps else "L{0:.1f} {1:.1f}"
    path = f"M{xs[0]:.1f} {ys[0]:.1f}" + "".join(join.format(x, y) for x, y in zip(xs[1:], ys[1:], strict=True))
    parts = [f'<path class="line" d="{path}"/>']
    if (curve.high > curve.low).any():
        upper = [f"{x:.1f} {y_scale(y):.1f}" for x, y in zip(xs, curve.high, strict=True)]
        lower = [f"{x:.1f} {y_scale(y):.1f}" for x, y in zip(xs, curve.low, strict=True)]
        parts.insert(0, f'<path class="band" d="M{"L".join(upper)}L{"L".join(reversed(lower))}z"/>')
    if not curve.line.summarise and not curve.line.steps and len(xs) <= _CROWDED:
        parts += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in zip(xs, ys, strict=True)]
    return f'<g class="{curve.line.css}">{"".join(parts)}</g>'


def _end_labels(curves: Sequence[_Curve], x_scale: _Scale, y_scale: _Scale, exact: Callable[[float], str]) -> str:
    """Name and last value beside each line's end, pushed apart where they would overlap."""
    order = sorted(curves, key=lambda c: y_scale(c.middle[-1]))
    places: list[float] = []
    for curve in order:
        y = y_scale(curve.middle[-1])
        places.append(max(y, places[-1] + 28) if places else max(y, _TOP))
    overflow = max(0.0, places[-1] - (_HEIGHT - _BOTTOM - 8))
    parts = []
    for curve, place in zip(order, places, strict=True):
        x, y = min(x_scale(curve.xs[-1]), _WIDTH - _RIGHT) + 8, place - overflow
        value, name = escape(exact(curve.end)), escape(curve.line.name)
        parts.append(
            f'<g class="{curve.line.css}"><text class="end" x="{x:.1f}" y="{y + 1:.1f}">{value}</text>'
            f'<text class="series" x="{x:.1f}" y="{y + 14:.1f}">{name}</text></g>'
        )
    return "".join(parts)


def confusion_chart(counts: NDArray[np.int64], classes: Sequence[str]) -> str:
    """A table of true class (rows) against predicted class (columns) as SVG; the diagonal is right, the rest is wrong.

    Right cells are tinted by their share of the row, wrong ones by theirs beside that of the worst.

    Args:
        counts: pictures of class i taken for class j, shape (C, C).
        classes: names, C of them.
    """
    names = [name if len(name) <= 16 else name[:15] + "\u2026" for name in classes]
    longest = max(len(name) for name in names)
    tilted = longest > 3  # long column names do not fit above their cells
    left, top = 34 + 6.6 * longest, 30 + 4.8 * longest if tilted else 44.0
    size = _CELL * len(names)
    width, height = left + size + (40 if tilted else 8), top + size + 6
    parts = [_label(left - 8, top - 10, "true \u2193", "end"), _label(left, 12, "predicted \u2192", "start")]
    for index, name in enumerate(names):
        x, y = left + index * _CELL + _CELL / 2, top + index * _CELL + _CELL / 2 + 4
        parts.append(_label(left - 8, y, name, "end"))
        parts.append(_label(x, top - 8, name, "start" if tilted else "middle", turn=-35 if tilted else 0))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    worst = (share * (1 - np.eye(len(names)))).max() or 1.0
    for (i, j), count in np.ndenumerate(counts):
        tint = 0.08 + 0.42 * share[i, j] if i == j else 0.12 + 0.48 * share[i, j] / worst
        parts.append(_cell(left + j * _CELL, top + i * _CELL, int(count), tint if count else 0.0, right=i == j))
    return (
        f'<svg class="chart confusion" viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{1.25 * width:.0f}px"'
        f' role="img" aria-label="which class was taken for which">{"".join(parts)}</svg>'
    )


def _label(x: float, y: float, text: str, anchor: str, *, turn: int = 0) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(text)}</text>'


def _cell(x: float, y: float, count: int, tint: float, *, right: bool) -> str:
    middle, line = x + _CELL / 2, y + _CELL / 2 + 4
    number = f'<text class="count" x="{middle:.1f}" y="{line:.1f}" text-anchor="middle">{count}</text>'
    return (
        f'<g class="{"right" if right else "wrong"}"><rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{_CELL - 1}"'
        f' height="{_CELL - 1}" style="fill-opacity:{tint:.2f}"/>{number if count else ""}</g>'
    )
