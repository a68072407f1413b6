"""The curves of the report: loss, accuracy, speed, gradients and rates over the steps."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.report import page as html
from trainer.report.charts import Axis, Line, line_chart
from trainer.report.run_data import RunRecord


def curves(run: RunRecord) -> str:
    """Loss, accuracy, throughput, waiting, gradients and learning rate over the steps."""
    if not run.steps:
        return html.section("Training", html.missing("No curves: no step has finished yet."))
    steps = run.column("step")
    parts = [
        html.figure(content, caption) if content else html.missing(empty)
        for content, caption, empty in (*_learning(run, steps), *_speed(run, steps), *_numbers(run, steps))
    ]
    return html.section("Training", f'<div class="grid">{"".join(parts)}</div>')


def _learning(run: RunRecord, steps: Any) -> list[tuple[str, str, str]]:
    at = [row["step"] for row in run.evaluations]
    loss = line_chart(
        [
            Line("training", steps, run.column("loss"), "soft", summarise=True),
            Line("held out", at, [row["loss"] for row in run.evaluations], "ink"),
        ],
        Axis("Loss, nats", "{:.2g}".format, log=True),
    )
    accuracy = line_chart(
        [
            Line("top-1", at, [100 * row["top1"] for row in run.evaluations], "ink"),
            Line("top-5", at, [100 * row["top5"] for row in run.evaluations], "soft"),
        ],
        Axis("Held-out accuracy, %", "{:g}".format, "{:.2f}".format, high=100),
    )
    split = run.evaluations[-1].get("split", "held-out") if run.evaluations else ""
    return [
        (
            loss,
            "Loss. Cross entropy; training as the median and the range of neighbouring steps, with dropout on.",
            "No loss.",
        ),
        (
            accuracy,
            f"Accuracy. Split {split}, {run.evaluations[-1]['num_samples']:,} pictures, centre crop."
            if run.evaluations
            else "",
            "No accuracy curve: the run has not been evaluated yet.",
        ),
    ]


def _speed(run: RunRecord, steps: Any) -> list[tuple[str, str, str]]:
    waits = 100 * run.column("data_wait_share")
    rate = Line("median", steps, run.column("images_per_s"), "ink", summarise=True, shown=run.images_per_s)
    wait = Line("median", steps, waits, "ink", summarise=True, shown=_median(waits))
    return [
        (
            line_chart([rate], Axis("Images/s", _rate, low=0)),
            "Throughput. Pictures of one step over its wall time; median and range of neighbouring steps.",
            "No throughput was recorded.",
        ),
        (
            line_chart([wait], Axis("Waiting for data, %", "{:g}".format, "{:.1f}".format, low=0, high=10)),
            "Waiting. Share of a step's time spent waiting for the next batch.",
            "No waiting times were recorded.",
        ),
    ]


def _numbers(run: RunRecord, steps: Any) -> list[tuple[str, str, str]]:
    norms = [Line(f"tower {t}", steps, run.column("gradient_norm", t), t, summarise=True) for t in "ab"]
    rate = Line("weights", steps, run.column("learning_rate"), "ink", steps=True)
    return [
        (
            line_chart(norms, Axis("Gradient norm", "{:.2g}".format, log=True, low=0)),
            "Gradients. Euclidean norm of all gradients of a tower.",
            "No gradient norms were recorded.",
        ),
        (
            line_chart([rate], Axis("Learning rate", "{:.2g}".format, log=True, low=0)),
            "Learning rate. Of the weights.",
            "No learning rate was recorded.",
        ),
    ]


def _median(values: NDArray[np.float64]) -> float | None:
    """Median of the finite ones; None without any."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"
