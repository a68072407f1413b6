"""``epochs.csv``: the run as a table, one line per epoch, for spreadsheets and plots."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.manifest import write_atomic

NAME = "epochs.csv"
COLUMNS = (
    "epoch",  # 1 is the first
    "steps",  # of this epoch so far
    "loss",  # mean of the steps' training losses, nats
    "learning_rate",  # of the weights, at the last step
    "images_per_s",  # median of the steps
    "data_wait_share",  # mean share of a step's time spent waiting for its batch, 0..1
    "gradient_norm_a",  # mean Euclidean norm of tower a's gradients
    "gradient_norm_b",
    "top1",  # of the held-out split after the epoch, 0..1
    "top5",
    "held_out_loss",  # nats
)
FIGURES = ("loss", "learning_rate", "images_per_s", "data_wait_share")  # of a step; means become the epoch's, but for
REDUCED: Mapping[str, Callable[[list[float]], float]] = {
    "learning_rate": lambda values: values[-1],
    "images_per_s": statistics.median,
}


class EpochTable:
    """Gathers the rows of metrics.jsonl by epoch.

    Args:
        run: run folder.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / NAME
        self._lines: dict[int, dict[str, Any]] = {}
        self._epoch, self._steps = -1, 0
        self._values: dict[str, list[float]] = {}  # of the steps of the epoch at hand

    def add(self, row: dict[str, Any]) -> None:
        """Takes one row of metrics.jsonl."""
        if row["kind"] == "evaluation":
            self._reduce()
            line = self._lines.setdefault(math.ceil(row["epoch"]) - 1, {})
            line |= {"top1": row["top1"], "top5": row.get("top5"), "held_out_loss": row["loss"]}
            return
        if row["kind"] != "step":
            return
        if row["epoch"] != self._epoch:
            self._reduce()
            self._epoch, self._steps, self._values = row["epoch"], 0, {}
        self._steps += 1
        norms = row.get("gradient_norm") or {}
        figures = {name: row.get(name) for name in FIGURES}
        for name, value in (figures | {f"gradient_norm_{tower}": norm for tower, norm in norms.items()}).items():
            if value is not None:
                self._values.setdefault(name, []).append(value)

    def write(self) -> None:
        """Replaces ``epochs.csv``."""
        self._reduce()
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for epoch in sorted(self._lines):
            values = {"epoch": epoch + 1} | self._lines[epoch]
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in values.items()})
        write_atomic(self._path, text.getvalue().encode())

    def _reduce(self) -> None:
        """Turns the steps of the epoch at hand into its line."""
        if not self._steps:
            return
        line = self._lines.setdefault(self._epoch, {})
        line |= {"steps": self._steps}
        for name, values in self._values.items():
            line[name] = REDUCED.get(name, statistics.fmean)(values)
