"""What the page of an experiment draws: differences with their intervals, curves with bands, kernels."""

import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from trainer.errors import RunError
from trainer.experiments.summary import Compared, Summary
from trainer.experiments.variants import Variant
from trainer.report.charts import COLORS, Axis, Line, drawing, inline_svg, line_chart, plain_axes
from trainer.report.run_data import read_run

WIDTH, ROW, TOP, BOTTOM, SIDE = 460, 46, 34, 40, 14  # px


def differences(compared: Sequence[Compared]) -> Markup:
    """Every variant's difference: a dot for the mean, a bar for the 95 % interval, a tick for each seed.

    Where the interval spans zero, dot and bar are gray.
    """
    metric, height = compared[0].metric, TOP + BOTTOM + ROW * len(compared)
    scaled = [np.array(each.found.differences) * metric.scale for each in compared]
    edges = [0.0, *(value for each in scaled for value in each.tolist())]
    for each in compared:
        if each.found.interval:
            edges += [each.found.interval.low * metric.scale, each.found.interval.high * metric.scale]
    span = max(edges) - min(edges) or 1.0
    with drawing(WIDTH, height) as figure:
        box = (SIDE / WIDTH, BOTTOM / height, 1 - 2 * SIDE / WIDTH, 1 - (TOP + BOTTOM) / height)
        axes = figure.add_axes(box)
        axes.set_xlim(min(edges) - 0.04 * span, max(edges) + 0.04 * span)
        axes.set_ylim(len(compared) - 0.5, -0.5)
        axes.axvline(0, color=COLORS["soft"], linewidth=1, clip_on=False)
        for place, (each, points) in enumerate(zip(compared, scaled, strict=True)):
            color = COLORS["a" if each.found.is_claim else "soft"]
            if each.found.interval:
                ends = [each.found.interval.low * metric.scale, each.found.interval.high * metric.scale]
                axes.plot(ends, [place + 0.2] * 2, color=color, linewidth=2.4, clip_on=False, gid="line")
            axes.plot(points, [place + 0.2] * len(points), "|", color=color, markersize=9, clip_on=False, gid="dot")
            mean = each.found.mean * metric.scale
            axes.plot(
                [mean], [place + 0.2], "o", color=color, markersize=7, markeredgewidth=0, clip_on=False, gid="dot"
            )
            top = 1 - (TOP + ROW * place + 15) / height
            axes.figure.text(SIDE / WIDTH, top, each.variant.title, size=13, color=COLORS["ink"])
        axes.set_yticks([])
        plain_axes(axes)
        figure.text(0, 1 - 14 / height, f"Difference from {against_words(compared)}", size=13.5, weight="bold")
        words = ", ".join(f"{each.variant.title} {metric.show(each.found.mean, sign=True)}" for each in compared)
        return inline_svg(figure, f"Difference in {metric.title}: {words}")


def curves(summary: Summary) -> list[tuple[Markup, str]]:
    """Error against epochs, a chart a variant, beside what it is compared with: mean and range over the seeds."""
    lines = {variant.name: _line(summary, variant) for variant in summary.experiment.variants}
    split = {row["split"] for row in summary.rows if row["status"] == "ok"}
    what = "Training error, %" if split == {"train"} else "Held-out error, %"
    charts = []
    for variant in summary.experiment.variants:
        own = lines[variant.name]
        other = lines.get(variant.against)
        if own is None or (not variant.against and any(each.against for each in summary.experiment.variants)):
            continue
        shown = [Line("this", *own, "a", summarize=True)]
        if other is not None:
            shown.insert(0, Line(_short(summary.experiment.variant(variant.against)), *other, "soft", summarize=True))
        axis = Axis(what, "{:g}".format, "{:.2f}".format)
        charts.append((line_chart(shown, axis, x_label="epoch"), f"{variant.title}. {variant.about}"))
    return charts


def _short(variant: Variant) -> str:
    return "whole" if variant.name == "baseline" else variant.title.split(",")[0]


def against_words(compared: Sequence[Compared]) -> str:
    """What variants are compared with, in words."""
    names = list(dict.fromkeys(each.against.title for each in compared))
    return names[0] if len(names) == 1 else "the one with the same rate"


Curve = tuple[list[float], list[list[float]]]  # epochs; mean, least and greatest of each


def _line(summary: Summary, variant: Variant) -> Curve | None:
    """Epochs, mean errors in percent, and their range, over the seeds of a variant that have every epoch."""
    done = {row["seed"] for row in summary.rows if row["variant"] == variant.name and row["status"] == "ok"}
    found: dict[float, list[float]] = collections.defaultdict(list)
    for task in summary.tasks:
        if task.variant == variant.name and task.seed in done:
            for epoch, error in _errors(task.run):
                found[epoch].append(error)
    epochs = [epoch for epoch in sorted(found) if len(found[epoch]) == len(done)]
    if not epochs:
        return None
    values = [found[epoch] for epoch in epochs]
    return epochs, [[sum(row) / len(row), min(row), max(row)] for row in values]


def _errors(run: Path) -> list[tuple[float, float]]:
    try:
        return [(float(row["epoch"]), 100 * (1 - float(row["top1"]))) for row in read_run(run).evaluations]
    except RunError:  # somebody removed it since
        return []
