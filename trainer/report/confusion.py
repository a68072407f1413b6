"""An evaluation class by class: a table, and the confusion matrix, for ``evaluate --confusion`` and the report."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.manifest import write_atomic
from trainer.errors import RunError
from trainer.report.charts import COLORS, drawing, inline_svg
from twotower.words import one_line, pluralize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from trainer.training.evaluate import Evaluation

NAMED_CLASSES = 50  # up to here the axes carry names
COUNTED_CLASSES = 25  # up to here the cells carry counts
TITLE_LENGTH = 24  # longer names are cut in the image
MOST_CELLS = 256  # a row; with more classes, neighbors share a cell
MOST_ROWS = 100  # of the table
CELL_PX, SIDE_PX = 33, 1100  # of a cell, and of the whole matrix at most, at 72 dpi
PNG_DPI = 150


@dataclasses.dataclass(frozen=True)
class ClassScore:
    """How one class fared.

    Attributes:
        label: its label.
        title: its name.
        num_samples: images of it.
        num_correct_top1: those whose likeliest class it was.
        num_correct_top5: those with it among the five likeliest; None with fewer than six classes.
        taken_for: name of the class that it was mistaken for most often; empty where it never was.
        num_taken_for: how often.
    """

    label: int
    title: str
    num_samples: int
    num_correct_top1: int
    num_correct_top5: int | None
    taken_for: str
    num_taken_for: int

    @property
    def top1(self) -> float | None:
        """Share of its images whose likeliest class it was, 0..1; None without images."""
        return self.num_correct_top1 / self.num_samples if self.num_samples else None

    @property
    def top5(self) -> float | None:
        """Share with it among the five likeliest, 0..1; None without images, or with fewer than six classes."""
        if self.num_correct_top5 is None or not self.num_samples:
            return None
        return self.num_correct_top5 / self.num_samples


def count_pairs(result: "Evaluation", classes: int) -> NDArray[np.int64]:
    """Images of class i taken for class j, shape (classes, classes), int64; for few classes."""
    return _binned(result, classes, 1)


def _binned(result: "Evaluation", classes: int, size: int) -> NDArray[np.int64]:
    """The same of ``size`` neighboring classes together, shape (bins, bins)."""
    bins = -(-classes // size)
    places = result.labels // size * bins + result.predicted // size
    return np.bincount(places, minlength=bins * bins).reshape(bins, bins)


def _cells(result: "Evaluation", classes: int) -> NDArray[np.int64]:
    """Rows of (label, predicted, images) that hold an image, ascending: no more than images, however many classes."""
    pairs, counts = np.unique(result.labels * classes + result.predicted, return_counts=True)
    return np.stack([pairs // classes, pairs % classes, counts], axis=1)


def score_classes(result: "Evaluation", titles: Sequence[str]) -> list[ClassScore]:
    """Every class, in the order of labels."""

    def count(chosen: NDArray[np.bool_]) -> list[int]:
        found: list[int] = np.bincount(result.labels[chosen], minlength=len(titles)).tolist()
        return found

    images = count(np.ones(len(result.labels), bool))
    right, in_top5 = count(result.labels == result.predicted), count(result.in_top5)
    cells = _cells(result, len(titles))
    wrong = cells[cells[:, 0] != cells[:, 1]]
    wrong = wrong[np.lexsort((wrong[:, 1], -wrong[:, 2], wrong[:, 0]))]  # of each class the most frequent first
    _, first = np.unique(wrong[:, 0], return_index=True)
    others = {int(label): (int(other), int(number)) for label, other, number in wrong[first]}
    scores = []
    for label, title in enumerate(titles):
        other, number = others.get(label, (0, 0))
        scores.append(
            ClassScore(
                label=label,
                title=title,
                num_samples=images[label],
                num_correct_top1=right[label],
                num_correct_top5=None if result.top5 is None else in_top5[label],
                taken_for=titles[other] if number else "",
                num_taken_for=number,
            )
        )
    return scores


def to_dict(result: "Evaluation", titles: Sequence[str]) -> dict[str, Any]:
    """For JSON: ``per_class`` rows, and ``confusion`` as its cells above zero, ``[label, predicted, count]``."""
    return {
        "per_class": [
            dataclasses.asdict(score) | {"top1": score.top1, "top5": score.top5}
            for score in score_classes(result, titles)
        ],
        "confusion": _cells(result, len(titles)).tolist(),
    }


def print_classes(result: "Evaluation", titles: Sequence[str], console: Console | None = None) -> None:
    """Prints the classes, the worst first; those without images last. Of more than ``MOST_ROWS`` the worst ones."""
    scores = sorted(score_classes(result, titles), key=lambda score: (score.top1 is None, score.top1 or 0, score.label))
    title = f"{pluralize(len(titles), 'class')}, the worst first"
    if len(scores) > MOST_ROWS:
        title = f"the worst {MOST_ROWS} of {pluralize(len(titles), 'class')}; --json has all"
    table = Table(title=title, title_justify="left")
    for heading in ("class", "taken most often for"):
        table.add_column(heading)
    for heading in ("images", "top-1", "top-5")[: 2 if result.top5 is None else 3]:
        table.add_column(heading, justify="right")
    for score in scores[:MOST_ROWS]:
        mistaken = f"{score.taken_for} ({score.num_taken_for})" if score.taken_for else ""
        shares = (score.top1,) if result.top5 is None else (score.top1, score.top5)
        rates = ("" if rate is None else f"{rate:.4f}" for rate in shares)
        table.add_row(Text(one_line(score.title)), Text(one_line(mistaken)), str(score.num_samples), *rates)
    (console or Console(width=None if Console().is_terminal else 100)).print(table, markup=False)


def check_name(path: Path) -> None:
    """Raises RunError where an image cannot get this name; called before the evaluation, which may take long."""
    if path.suffix.lower() != ".png":
        raise RunError(f"--confusion {path}: expected a name that ends in .png")


def draw(path: Path, result: "Evaluation", titles: Sequence[str]) -> None:
    """Writes the confusion matrix as a PNG, on white; of more than ``MOST_CELLS`` classes, neighbors share a cell.

    Raises:
        RunError: the file cannot be written.
    """
    views = "ten views" if result.views == "ten" else "center crop"
    heading = f"top-1 {result.top1:.4f}, {pluralize(result.num_samples, 'image')}, {views}"
    buffer = io.BytesIO()
    size = -(-len(titles) // MOST_CELLS)
    with drawing(1, 1) as figure:
        _draw_matrix(figure, _binned(result, len(titles), size), titles, heading, size)
        figure.savefig(buffer, format="png", dpi=PNG_DPI, bbox_inches="tight", pad_inches=0.2)
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None


def confusion_svg(counts: NDArray[np.int64], titles: Sequence[str]) -> Markup:
    """The confusion matrix for a page.

    Args:
        counts: images of class i taken for class j, shape (C, C).
        titles: names of the classes, C of them.
    """
    with drawing(1, 1) as figure:
        _draw_matrix(figure, counts, titles, "")
        return inline_svg(figure, "which class was taken for which", tight=True)


def _draw_matrix(
    figure: "Figure", counts: NDArray[np.int64], titles: Sequence[str], heading: str, size: int = 1
) -> None:
    """Rows are the true classes, columns the predicted ones; the diagonal is right, the rest is wrong.

    With more than one class a cell, ``size`` neighbors, the diagonal is what stays among those neighbors.

    Right cells are tinted by their share of the row, wrong ones by theirs beside that of the worst: on one scale,
    single mistakes of a good net could not be seen.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba

    classes = len(counts)  # or bins of them
    unit = "class" if size == 1 else f"class, {size} neighbors a cell"
    side = min(SIDE_PX, CELL_PX * classes) / figure.dpi
    figure.set_size_inches(side, side)
    axes = figure.add_axes((0, 0, 1, 1))  # names lie outside; the cut around what is drawn makes room for them
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    worst = (share * (1 - np.eye(classes))).max() or 1.0
    cells = np.argwhere(counts)  # (n, 2): row, column
    right = cells[:, 0] == cells[:, 1]
    shares = share[cells[:, 0], cells[:, 1]]
    colors = np.where(right[:, None], to_rgba(COLORS["a"]), to_rgba(COLORS["wrong"]))
    colors[:, 3] = np.where(right, 0.08 + 0.42 * shares, 0.12 + 0.48 * shares / worst)
    if classes > COUNTED_CLASSES:  # no count has to be read on top of the tint
        colors[:, 3] *= 1.6
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
    squares = cells[:, None, ::-1] + corners  # (n, 4, 2): x, y
    axes.add_collection(PolyCollection(squares, facecolors=colors, linewidths=0, clip_on=False))
    axes.set(xlim=(-0.5, classes - 0.5), ylim=(classes - 0.5, -0.5))
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, labelsize=12, labelcolor=COLORS["soft"])
    axes.set_xlabel("predicted", color=COLORS["soft"], size=12, labelpad=8)
    axes.set_ylabel(unit, color=COLORS["soft"], size=12, labelpad=8)
    axes.set_title(heading, size=13.5, pad=14)
    axes.spines[:].set_color(COLORS["hair"])
    if len(titles) <= NAMED_CLASSES:
        shown = [one_line(title) for title in titles]
        names = [title if len(title) <= TITLE_LENGTH else title[: TITLE_LENGTH - 1] + "\u2026" for title in shown]
        axes.set_xticks(range(classes), names)
        if max(map(len, names)) > 3:  # they do not fit above their cells
            for text in axes.get_xticklabels():
                text.set(rotation=45, ha="left", rotation_mode="anchor")
        axes.set_yticks(range(classes), names)
        axes.set_xticks(np.arange(0.5, classes - 1), minor=True)
        axes.set_yticks(np.arange(0.5, classes - 1), minor=True)
        axes.tick_params(which="minor", length=0)
        axes.grid(which="minor", color=COLORS["hair"], linewidth=0.6, clip_on=False)
    if len(titles) <= COUNTED_CLASSES:
        for i, j in cells:
            axes.text(j, i, f"{counts[i, j]}", ha="center", va="center_baseline", size=12, gid="count")
