"""Charts for a page: drawn by matplotlib, put inline as SVG that takes its colors and its font from the page."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The page's colors for a light screen, under the names that page.css gives them. A figure is drawn in these; on a page
# each becomes var(--NAME), so that it is dark on light and light on dark.
COLORS = {
    "ink": "#1d1c1a",
    "soft": "#6a675f",
    "hair": "#d9d5cb",
    "a": "#2b5f8f",
    "b": "#a9660a",
    "wrong": "#a3163f",
}
MOST_POINTS = 100  # a line has at most this many; more are summarized
CROWDED = 40  # more dots than this are a line without dots
WIDTH, HEIGHT = 480, 252  # px
LEFT, RIGHT, TOP, BOTTOM = 46, 84, 34, 36  # px around the plot; the right margin holds the lines' names
ROLES = ("line", "band", "dot", "count")  # groups that keep their name, as a class, on the page


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: written at the line's end.
        xs: positions, ascending, shape (n,).
        ys: values, shape (n,); or (n, 3): of neighbors that were put together, median, least and greatest. Those that
            are not finite are left out.
        css: color of the page: ``ink``, ``soft``, ``a`` or ``b``.
        summarize: draw the median of bins, and a band from their least to their greatest value (for noisy figures).
        steps: hold each value until the next (for a learning rate).
        shown: the figure written at the line's end; None for its last value.
    """

    name: str
    xs: ArrayLike
    ys: ArrayLike
    css: str = "ink"
    summarize: bool = False
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
    """A line's points as they are drawn: all of shape (n,), finite."""

    line: Line
    xs: NDArray[np.float64]
    middle: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @property
    def end(self) -> float:
        return float(self.middle[-1]) if self.line.shown is None else self.line.shown


def line_chart(lines: Sequence[Line], axis: Axis, *, x_label: str = "step") -> Markup:
    """A line chart.

    Args:
        lines: at least one line; those without a finite value are left out.
        axis: the values' axis.
        x_label: quantity of ``xs``.

    Returns:
        ``<svg class="chart">``; empty where there is nothing to draw.
    """
    curves = [curve for line in lines if (curve := _curve(line)) is not None]
    if not curves:
        return Markup("")
    exact = axis.exact or axis.form
    with drawing(WIDTH, HEIGHT) as figure:
        plot = (LEFT / WIDTH, BOTTOM / HEIGHT, (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT)
        axes = figure.add_axes(plot)
        _scale(axes, curves, axis)
        figure.text(0, 1 - 14 / HEIGHT, axis.label, size=13.5, weight="bold")
        figure.text(1 - RIGHT / WIDTH, 4 / HEIGHT, x_label, size=12, ha="right", color=COLORS["soft"])
        for curve in curves:
            _draw(axes, curve)
        _name_ends(axes, curves, exact)
        ends = ", ".join(f"{curve.line.name} {exact(curve.end)}" for curve in curves)
        return inline_svg(figure, f"{axis.label}; at the end: {ends}")


def _curve(line: Line) -> _Curve | None:
    """Finite points of a line, summarized to at most ``MOST_POINTS`` bins; None where there are none."""
    xs, ys = np.asarray(line.xs, dtype=float), np.asarray(line.ys, dtype=float)
    ys = ys if ys.ndim == 2 else np.repeat(ys[:, None], 3, axis=1)
    finite = np.isfinite(xs) & np.isfinite(ys[:, 0])
    xs, ys = xs[finite], ys[finite]
    if not len(xs):
        return None
    if line.steps:  # both ends of every level, or a drop would be drawn as a slope
        changes = ys[1:, 0] != ys[:-1, 0]
        keep = np.flatnonzero(np.r_[True, changes] | np.r_[changes, True])
        xs, ys = xs[keep], ys[keep]
    if not line.summarize or len(xs) <= MOST_POINTS:
        chosen = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), 4 * MOST_POINTS)).round().astype(int))
        band = ys[chosen] if line.summarize else ys[chosen][:, [0, 0, 0]]
        return _Curve(line, xs[chosen], *band.T)
    size = -(-len(xs) // MOST_POINTS)  # one size for all bins: where they were smaller, the line would look noisier
    bins = np.array_split(np.arange(len(xs)), -(-len(xs) // size))
    take = [(xs[b].mean(), np.median(ys[b, 0]), ys[b, 1].min(), ys[b, 2].max()) for b in bins]
    x, middle, low, high = (np.array(column) for column in zip(*take, strict=True))
    x[0], x[-1] = xs[0], xs[-1]
    return _Curve(line, x, middle, low, high)


def _scale(axes: "Axes", curves: Sequence[_Curve], axis: Axis) -> None:
    """Limits, ticks and grid lines."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low = min(float(curve.low.min()) for curve in curves)
    high = max(float(curve.high.max()) for curve in curves)
    if axis.log and low > 0 and high / low > 20:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        low = low if axis.low is None else min(low, axis.low)
        high = high if axis.high is None else max(high, axis.high)
        locator = MaxNLocator(nbins=6, steps=[1, 2, 5, 10])
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):  # one value only
            low, high = low - abs(low) * 0.05 - 1e-9, high + abs(high) * 0.05 + 1e-9
        ticks = locator.tick_values(low, high)
        axes.set_ylim(ticks[0], ticks[-1])  # the axis ends on ticks
        axes.yaxis.set_major_locator(locator)
    first = min(0.0, *(float(curve.xs[0]) for curve in curves))  # from 0, so that charts side by side have one scale
    last = max(float(curve.xs[-1]) for curve in curves)
    axes.set_xlim(first, last if last > first else first + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: axis.form(value)))
    axes.grid(axis="y", color=COLORS["hair"], linewidth=0.7, clip_on=False)
    plain_axes(axes)
    axes.tick_params("y", length=0, pad=7)


def plain_axes(axes: "Axes") -> None:
    """The look of all charts: a soft line below, and soft words."""
    axes.tick_params(labelsize=12, color=COLORS["soft"], labelcolor=COLORS["soft"])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(COLORS["soft"])


def _draw(axes: "Axes", curve: _Curve) -> None:
    line, color = curve.line, COLORS[curve.line.css]
    if (curve.high > curve.low).any():
        axes.fill_between(
            curve.xs, curve.low, curve.high, color=color, alpha=0.16, linewidth=0, clip_on=False, gid="band"
        )
    style = "steps-post" if line.steps else "default"
    axes.plot(curve.xs, curve.middle, color=color, linewidth=1.6, drawstyle=style, clip_on=False, gid="line")
    if len(curve.xs) == 1 or (not line.summarize and not line.steps and len(curve.xs) <= CROWDED):
        axes.plot(curve.xs, curve.middle, "o", color=color, markersize=4.8, markeredgewidth=0, clip_on=False, gid="dot")


def _name_ends(axes: "Axes", curves: Sequence[_Curve], exact: Callable[[float], str]) -> None:
    """Last value and name beside each line's end, pushed apart where they would overlap."""
    heights = [axes.transData.transform((curve.xs[-1], curve.middle[-1]))[1] for curve in curves]
    order = np.argsort(heights, kind="stable")[::-1]
    places: list[float] = []  # px above the figure's lower edge, from the top down
    for index in order:
        here = min(heights[index], HEIGHT - TOP)
        places.append(min(here, places[-1] - 28) if places else here)
    missing = max(0.0, BOTTOM + 8 - places[-1])
    for index, place in zip(order, places, strict=True):
        curve = curves[index]
        x = axes.transData.transform((curve.xs[-1], 1.0))[0] + 8
        for text, size, weight, down in ((exact(curve.end), 13.5, "bold", 1), (curve.line.name, 12, "normal", 14)):
            at = ((x / WIDTH), (place + missing - down) / HEIGHT)
            axes.figure.text(*at, text, size=size, weight=weight, color=COLORS[curve.line.css])


@contextlib.contextmanager
def drawing(width: float, height: float) -> "Iterator[Figure]":
    """Gives an empty figure, px; draw and write it inside, for matplotlib's own style to hold whatever the user's is.

    The figure belongs to no window and no backend, and becomes the same bytes from the same input.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    settings: dict[str, object] = {"svg.fonttype": "none", "svg.hashsalt": "twotower", "text.color": COLORS["ink"]}
    settings["text.parse_math"] = False  # a class may be named $x$
    with matplotlib.style.context(settings, after_reset=True):
        yield Figure(figsize=(width / 72, height / 72), dpi=72)


def inline_svg(figure: "Figure", label: str, *, tight: bool = False) -> Markup:
    """A figure as an ``<svg>`` element for a page; call it inside :func:`drawing`.

    matplotlib writes documents of their own. Inside a page its style sheet (``*{...}``) would reach everything, its ids
    would be there once a figure, and its fonts and colors would not be the page's.

    Args:
        figure: drawn in ``COLORS``, nothing clipped (clipping needs ``url()``).
        label: what it shows, for those who cannot see it.
        tight: cut it to what is drawn.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    box = "tight" if tight else None
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing, bbox_inches=box, pad_inches=0.03)
    head, _, text = buffer.getvalue().partition("<defs>")
    text = text.partition("</defs>")[2].replace("xlink:href", "href")  # without the style sheet
    text = re.sub(rf'<g id="({"|".join(ROLES)})">', r'<g class="\1">', text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'(?<= )d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", " ".join(path[0].split())), text)
    text = re.sub(r">\s+<", "><", text)
    for name, code in COLORS.items():
        text = text.replace(code, f"var(--{name})")
    (view,) = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    width, height = map(float, view)
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {:.6g} {:.6g}" style="max-width:{:.0f}px"'
        ' role="img" aria-label="{}">'
    ).format(width, height, 1.25 * width, label) + Markup(text)
