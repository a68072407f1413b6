"""A run's steps for the report: read once, as they come, and kept in bounded memory however many they are."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.training.rows import iterate_rows, last_rows

MOST_POINTS = 10_000  # up to so many steps each is a point of its own
FIGURES = ("loss", "images_per_s", "data_wait_share", "learning_rate")
TOWERS = ("a", "b")


@dataclasses.dataclass(frozen=True)
class StepSeries:
    """The steps of a run, ascending; of a long run, so many neighbors together that ``MOST_POINTS`` are enough.

    Attributes:
        num: steps.
        last: the last step's row; {} without one.
        at: number of each point's last step, shape (points,).
        columns: by name, shape (points, 3): median, least and greatest value of a point's steps; NaN where none was
            written.
    """

    num: int
    last: Mapping[str, Any]
    at: NDArray[np.float64]
    columns: Mapping[str, NDArray[np.float64]]

    def column(self, name: str) -> NDArray[np.float64]:
        """A figure of ``FIGURES``, or ``gradient_norm_TOWER``."""
        return self.columns[name]


def read_series(run: Path) -> tuple[StepSeries, list[dict[str, Any]]]:
    """The steps of a run, and its evaluations: ascending, one a step; center crop only, as ten views score higher."""
    newest = max((row["step"] for row in last_rows(run) if row.get("kind") == "step"), default=0)
    points = _Points(-(-int(newest) // MOST_POINTS) or 1)
    evaluations: dict[int, dict[str, Any]] = {}
    for _, row in iterate_rows(run):
        if row.get("kind") == "step":
            points.add(row)
        elif row.get("kind") == "evaluation" and row.get("views", "center") == "center":
            evaluations[row["step"]] = row
    return points.series(), [evaluations[step] for step in sorted(evaluations)]


class _Points:
    """Puts rows of steps together, ``size`` neighbors to a point."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._names = [*FIGURES, *(f"gradient_norm_{tower}" for tower in TOWERS)]
        self._open: list[tuple[int, list[float]]] = []  # step and its figures, of the point at hand
        self._closed: list[tuple[int, int, NDArray[np.float64]]] = []  # last step, steps, (figures, 3)
        self._last: dict[str, Any] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Takes the next step; one that was made again replaces the first time, and all that came after."""
        step = row["step"]
        if self._last and step <= self._last["step"]:
            self._closed = [point for point in self._closed if point[0] < step]
            self._open = [each for each in self._open if each[0] < step]
        self._open.append((step, list(_figures(row))))
        self._last = row
        if len(self._open) == self._size:
            self._close()

    def series(self) -> StepSeries:
        """All of them."""
        if self._open:
            self._close()
        points = np.array([values for _, _, values in self._closed]).reshape(-1, len(self._names), 3)
        return StepSeries(
            num=sum(count for _, count, _ in self._closed),
            last=self._last,
            at=np.array([step for step, _, _ in self._closed], dtype=float),
            columns={name: points[:, number] for number, name in enumerate(self._names)},
        )

    def _close(self) -> None:
        values = np.array([figures for _, figures in self._open])  # (steps, figures)
        if len(values) == 1:
            found = np.repeat(values.T, 3, axis=1)
        elif np.isfinite(values).all():
            found = np.stack([np.median(values, axis=0), values.min(axis=0), values.max(axis=0)], axis=1)
        else:
            found = np.array([_summary(column[np.isfinite(column)]) for column in values.T])
        self._closed.append((self._open[-1][0], len(self._open), found))
        self._open = []


def _summary(known: NDArray[np.float64]) -> tuple[float, float, float]:
    """Median, least and greatest of the finite values."""
    return (float(np.median(known)), known.min(), known.max()) if len(known) else (np.nan, np.nan, np.nan)


def _figures(row: dict[str, Any]) -> Iterator[float]:
    """A step's figures in the order of the names; NaN for what it lacks."""
    norms = row.get("gradient_norm")
    values = [row.get(name) for name in FIGURES]
    values += [norms.get(tower) if isinstance(norms, dict) else None for tower in TOWERS]
    yield from (np.nan if value is None else float(value) for value in values)
