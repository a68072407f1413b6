"""An evaluation class by class: a table, and a picture of which class was taken for which."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.manifest import write_atomic
from trainer.errors import RunError
from trainer.training.evaluate import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED_CLASSES = 50  # up to here the axes carry names
COUNTED_CLASSES = 25  # up to here the cells carry counts
TITLE_LENGTH = 24  # longer names are cut in the picture


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """How one class fared.

    Attributes:
        label: its label.
        title: its name.
        num_samples: pictures of it.
        num_correct_top1: those whose likeliest class it was.
        num_correct_top5: those with it among the five likeliest.
        taken_for: name of the class that it was mistaken for most often; empty where it never was.
        num_taken_for: how often.
    """

    label: int
    title: str
    num_samples: int
    num_correct_top1: int
    num_correct_top5: int
    taken_for: str
    num_taken_for: int

    @property
    def top1(self) -> float | None:
        """Share of its pictures whose likeliest class it was, 0..1; None without pictures."""
        return self.num_correct_top1 / self.num_samples if self.num_samples else None

    @property
    def top5(self) -> float | None:
        """Share of its pictures with it among the five likeliest, 0..1; None without pictures."""
        return self.num_correct_top5 / self.num_samples if self.num_samples else None


def count_pairs(result: Evaluation, classes: int) -> np.ndarray:
    """Pictures of class i taken for class j, shape (classes, classes), int64."""
    return np.bincount(result.labels * classes + result.predicted, minlength=classes * classes).reshape(
        classes, classes
    )


def score_classes(result: Evaluation, titles: Sequence[str]) -> list[ClassScore]:
    """Every class, in the order of labels."""
    pairs = count_pairs(result, len(titles))
    in_top5 = np.bincount(result.labels[result.in_top5], minlength=len(titles))
    scores = []
    for label, title in enumerate(titles):
        wrong = pairs[label].copy()
        wrong[label] = 0
        other = int(wrong.argmax())
        scores.append(
            ClassScore(
                label=label,
                title=title,
                num_samples=int(pairs[label].sum()),
                num_correct_top1=int(pairs[label, label]),
                num_correct_top5=int(in_top5[label]),
                taken_for=titles[other] if wrong[other] else "",
                num_taken_for=int(wrong[other]),
            )
        )
    return scores


def to_dict(result: Evaluation, titles: Sequence[str]) -> dict[str, Any]:
    """For JSON: ``per_class`` rows, and ``confusion`` as its cells above zero, ``[label, predicted, count]``."""
    pairs = count_pairs(result, len(titles))
    cells = np.argwhere(pairs)
    return {
        "per_class": [
            dataclasses.asdict(score) | {"top1": score.top1, "top5": score.top5}
            for score in score_classes(result, titles)
        ],
        "confusion": [[int(i), int(j), int(pairs[i, j])] for i, j in cells],
    }


def print_classes(result: Evaluation, titles: Sequence[str], console: Console | None = None) -> None:
    """Prints the classes, the worst first; those without pictures last."""
    scores = sorted(score_classes(result, titles), key=lambda score: (score.top1 is None, score.top1 or 0, score.label))
    table = Table(title=f"{len(titles)} classes, the worst first", title_justify="left")
    for heading in ("class", "taken most often for"):
        table.add_column(heading)
    for heading in ("pictures", "top-1", "top-5"):
        table.add_column(heading, justify="right")
    for score in scores:
        mistaken = f"{score.taken_for} ({score.num_taken_for})" if score.taken_for else ""
        rates = ("" if rate is None else f"{rate:.4f}" for rate in (score.top1, score.top5))
        table.add_row(score.title, mistaken, str(score.num_samples), *rates)
    (console or Console(width=None if Console().is_terminal else 100)).print(table, markup=False)


def check_name(path: Path) -> None:
    """Raises RunError where a picture cannot get this name; called before the evaluation, which may take long."""
    if path.suffix.lower() != ".png":
        raise RunError(f"--confusion {path}: expected a name that ends in .png")


def draw(path: Path, result: Evaluation, titles: Sequence[str]) -> None:
    """Writes the confusion matrix as a PNG: rows are the true classes, columns the predicted ones.

    A cell's colour is its share of the row, on a square-root scale, so that single mistakes can be seen.

    Raises:
        RunError: the file cannot be written.
    """
    import matplotlib.figure
    from matplotlib.colors import PowerNorm

    pairs = count_pairs(result, len(titles))
    shares = pairs / np.maximum(1, pairs.sum(axis=1, keepdims=True))
    side = min(16.0, max(5.0, 2.5 + 0.36 * len(titles)))
    figure = matplotlib.figure.Figure(figsize=(side + 1, side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the class", shrink=0.7, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    views = "ten views" if result.views == "ten" else "centre crop"
    axes.set_title(f"top-1 {result.top1:.4f} on {result.num_samples:,} pictures, {views}", fontsize=10)
    axes.set_ylabel("class")
    axes.set_xlabel("predicted")
    if len(titles) <= NAMED_CLASSES:
        names = [title if len(title) <= TITLE_LENGTH else title[: TITLE_LENGTH - 1] + "\u2026" for title in titles]
        slanted = max(map(len, names)) > 3
        axes.set_xticks(range(len(names)), names, rotation=90 if slanted else 0, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(titles) <= COUNTED_CLASSES:
        _write_counts(axes, pairs, shares)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None


def _write_counts(axes: "Axes", pairs: np.ndarray, shares: np.ndarray) -> None:
    """Counts into the cells above zero."""
    for i, j in np.argwhere(pairs):
        colour = "white" if shares[i, j] > 0.25 else "black"
        axes.text(j, i, str(pairs[i, j]), ha="center", va="center", fontsize=7, color=colour)
