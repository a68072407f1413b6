"""What the report draws of a run: curves over the steps, what crosses between the towers, and conv1's kernels."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from trainer.planning.describe import CrossingCount, count_crossings
from trainer.report.charts import Axis, Line, line_chart
from trainer.report.net_drawing import draw_towers, layer_rows
from trainer.report.run_data import RunRecord
from twotower.words import pluralize


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What crosses between the towers.

    Attributes:
        drawing: the net, with the crossings as ribbons: an ``<svg>`` element.
        head: headings of the ledger.
        ledger: rows of the ledger of one step as text, the totals last; empty where there is none.
        sums: indices of the totals.
        batch: images a pair of towers takes in a step.
        pairs: pairs of towers; the ledger is that of the first.
        step_bytes: bytes that cross in a step of a pair, forward and backward.
        parameters: of the whole net.
    """

    drawing: Markup
    head: Sequence[str]
    ledger: Sequence[Sequence[str]]
    sums: Sequence[int]
    batch: int
    pairs: int
    step_bytes: int
    parameters: int


def curves(run: RunRecord) -> list[tuple[Markup, str, str]]:
    """Loss, accuracy, throughput, waiting, gradients and learning rate over the steps.

    Returns:
        Chart (empty where there is nothing to draw), caption, and what to say in its place; [] before the first step.
    """
    if not run.steps.num:
        return []
    charts = [*_curves_of_learning(run), *_curves_of_steps(run)]
    return [(line_chart(lines, axis), caption, empty) for caption, empty, axis, lines in charts]


def _curves_of_learning(run: RunRecord) -> list[tuple[str, str, Axis, list[Line]]]:
    """Loss and accuracy: caption, what to say where there is nothing, axis, lines."""
    evaluations = run.evaluations
    at = [row["step"] for row in evaluations]
    top5 = [100 * row["top5"] for row in evaluations if row.get("top5") is not None]  # none with fewer than six classes
    split = evaluations[-1].get("split", "held-out") if evaluations else ""
    images = pluralize(evaluations[-1]["num_samples"], "image") if evaluations else ""
    return [
        (
            "Loss. Cross entropy; training as the median and the range of neighboring steps, with dropout on.",
            "No loss.",
            Axis("Loss, nats", "{:.3g}".format, "{:.2g}".format, log=True),
            [
                Line("training", run.steps.at, run.steps.column("loss"), "soft", summarize=True),
                Line("held out", at, [row["loss"] for row in evaluations]),
            ],
        ),
        (
            f"Accuracy. Split {split}, {images}, center crop.",
            "No accuracy curve: the run has not been evaluated yet.",
            Axis("Held-out accuracy, %", "{:g}".format, "{:.2f}".format, high=100),
            [
                Line("top-1", at, [100 * row["top1"] for row in evaluations]),
                *([Line("top-5", at, top5, "soft")] if top5 else []),
            ],
        ),
    ]


def _curves_of_steps(run: RunRecord) -> list[tuple[str, str, Axis, list[Line]]]:
    """Throughput, waiting, gradients and learning rate, in the same form."""
    steps, column = run.steps.at, run.steps.column
    waits = 100 * column("data_wait_share")
    measured = np.isfinite(waits[:, 0])
    wait = float(np.median(waits[measured, 0])) if measured.any() else None
    return [
        (
            "Throughput. Images of one step over its wall time; median and range of neighboring steps.",
            "No throughput was recorded.",
            Axis("Images/s", _rate, low=0),
            [Line("median", steps, column("images_per_s"), summarize=True, shown=run.images_per_s)],
        ),
        (
            "Waiting. Share of a step's time spent waiting for the next batch.",
            "No waiting times were recorded.",
            Axis("Waiting for data, %", "{:g}".format, "{:.1f}".format, low=0, high=10),
            [Line("median", steps, waits, summarize=True, shown=wait)],
        ),
        (
            "Gradients. Euclidean norm of all gradients of a tower.",
            "No gradient norms were recorded.",
            Axis("Gradient norm", "{:.3g}".format, "{:.2g}".format, log=True, low=0),
            [Line(f"tower {t}", steps, column(f"gradient_norm_{t}"), t, summarize=True) for t in "ab"],
        ),
        (
            "Learning rate. Of the weights.",
            "No learning rate was recorded.",
            Axis("Learning rate", "{:.3g}".format, "{:.2g}".format, log=True, low=0),
            [Line("weights", steps, column("learning_rate"), steps=True)],
        ),
    ]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def traffic_of(run: RunRecord) -> Traffic | None:
    """What crosses between the towers, as the run counted it where it did; None without a recipe."""
    if run.config is None:
        return None
    model, ledger = run.config.model, run.result.get("ledger") or []
    pairs = max(1, run.result.get("processes", 0) // 2)
    batch, rows, planned = run.config.train.batch_size // pairs, layer_rows(model), count_crossings(model)
    crossings = _forward_crossings(ledger, batch, planned)
    if crossings:
        note = f"Bytes an image, forward, as counted in a step of {batch}. Gradients go back the same ways, reversed."
    else:
        crossings = planned
        note = "Bytes an image, forward, in fp32, if each tower had its process. Gradients go back the same ways."
    image = f"{model.image_px}x{model.image_px}x{model.in_channels}"
    on_a_alone = {crossing.layer for crossing in crossings if not crossing.bytes_a_to_b}
    replicas = any(row["kind"] == "replica" for row in ledger)
    table, sums = _ledger_table(ledger)
    return Traffic(
        drawing=Markup(draw_towers(rows, crossings, image=image, note=note, towers=model.towers)),
        head=["what", "phase", *(("sent by a", "sent by b") if replicas else ("a \u2192 b", "b \u2192 a"))],
        ledger=table,
        sums=sums,
        batch=batch,
        pairs=pairs,
        step_bytes=2 * batch * sum(crossing.bytes_a_to_b + crossing.bytes_b_to_a for crossing in crossings),
        parameters=sum(row.parameters * (1 if row.name in on_a_alone else model.towers) for row in rows),
    )


def _forward_crossings(
    ledger: Sequence[dict[str, Any]], batch: int, planned: Sequence[CrossingCount]
) -> list[CrossingCount]:
    """The forward crossings of a ledger, an image; [] where it holds none."""
    found: dict[str, dict[str, float]] = {}
    for row in ledger:
        if row["kind"] == "crossing" and row["phase"] == "forward":
            ways = found.setdefault(row["name"], {"a->b": 0, "b->a": 0})
            ways[row["direction"]] += row["bytes"] / batch
    elements = {crossing.layer: crossing.elements for crossing in planned}
    return [
        CrossingCount(name, elements.get(name, 0), round(ways["a->b"]), round(ways["b->a"]))
        for name, ways in found.items()
    ]


def _ledger_table(ledger: Sequence[dict[str, Any]]) -> tuple[list[list[str]], range]:
    """The exchange ledger of one step as text: a row a place and phase, then totals by kind; and where those stand."""
    table: dict[tuple[str, str, str], dict[str, int]] = {}
    totals: dict[str, int] = {}
    for row in ledger:
        name, way = row["name"], row["direction"]
        if way[0] == way[-1]:  # a->a: what tower a sends to itself in other replicas
            name, way = f"{name}, between replicas", {"a": "a->b", "b": "b->a"}[way[0]]
        cell = table.setdefault((row["kind"], name, row["phase"]), {})
        cell[way] = cell.get(way, 0) + row["bytes"]
        totals[row["kind"]] = totals.get(row["kind"], 0) + row["bytes"]
    rows = [
        [name, phase, *(f"{cell[way]:,}" if way in cell else "\u2013" for way in ("a->b", "b->a"))]
        for (_, name, phase), cell in table.items()
    ]
    sums = [[f"all {kind}", "", "", f"{total:,}"] for kind, total in totals.items()]
    return rows + sums, range(len(rows), len(rows) + len(sums))


def kernel_sheet(weight: NDArray[np.float32], *, columns: int = 8, kernel_px: int = 66) -> NDArray[np.uint8]:
    """Kernels of a first layer as one image, as in figure 3 of the paper.

    Each kernel is shown on its own scale: zero is middle gray, its greatest absolute weight is black or full color.

    Args:
        weight: shape (maps, 1 or 3, k, k).
        columns: kernels per row.
        kernel_px: at most this many pixels a kernel's side; each weight is a whole number of pixels.

    Returns:
        uint8 (H, W, 4); transparent between kernels.
    """
    maps, channels, side, _ = weight.shape
    most = np.abs(weight).reshape(maps, -1).max(axis=1).reshape(-1, 1, 1, 1)
    shown = 127.5 + 127.5 * weight / np.where(most > 0, most, 1)
    shown = np.broadcast_to(shown, (maps, 3, side, side)) if channels == 1 else shown
    zoom = max(1, kernel_px // side)
    pixels = (
        shown.round().astype(np.uint8).transpose(0, 2, 3, 1).repeat(zoom, axis=1).repeat(zoom, axis=2)
    )  # (maps, S, S, 3)
    gap, cell = max(2, zoom // 2), side * zoom
    rows = -(-maps // columns)
    sheet = np.zeros((rows * (cell + gap) - gap, min(columns, maps) * (cell + gap) - gap, 4), np.uint8)
    for index, kernel in enumerate(pixels):
        top, left = (cell + gap) * (index // columns), (cell + gap) * (index % columns)
        sheet[top : top + cell, left : left + cell, :3] = kernel
        sheet[top : top + cell, left : left + cell, 3] = 255
    return sheet


def color_share(weight: NDArray[np.float32]) -> float:
    """How much of a first layer is color: the energy left without each kernel's gray part, median over kernels.

    0 where every kernel weighs red, green and blue alike, towards 1 where kernels look at color differences only.

    Args:
        weight: shape (maps, 3, k, k).
    """
    gray = weight.mean(axis=1, keepdims=True)
    energy = (weight**2).sum(axis=(1, 2, 3))
    color = ((weight - gray) ** 2).sum(axis=(1, 2, 3))
    return float(np.median(color / np.where(energy > 0, energy, 1)))
