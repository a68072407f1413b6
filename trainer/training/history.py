"""What a run did before this start of it, so that what it says of itself is about all its parts."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from trainer.training.epochs import EpochTable
from trainer.training.rows import Thinned, iterate_rows, last_rows
from trainer.training.run_files import is_number, read_object


@dataclasses.dataclass(frozen=True)
class Past:
    """A run up to the step that a start goes on from.

    Attributes:
        images_per_s: of every step.
        evaluations: rows of metrics.jsonl, one a step, ascending.
        elapsed_s: wall time of all parts, also of steps that were lost and are made again.
        ledger: what crossed in one step; nothing where one process held both towers.
        last: the last step's row; {} without one.
        epochs: the run as a table; goes on with what is added.
        kept_bytes: length of metrics.jsonl without the rows that will be repeated.
    """

    epochs: EpochTable
    images_per_s: Thinned = dataclasses.field(default_factory=Thinned)
    evaluations: tuple[dict[str, Any], ...] = ()
    elapsed_s: float = 0.0
    ledger: tuple[dict[str, Any], ...] = ()
    last: dict[str, Any] = dataclasses.field(default_factory=dict)
    kept_bytes: int = 0


def read_past(run: Path, step: float = math.inf) -> Past:
    """Reads what was up to ``step``, in one go; nothing where a run begins."""
    past = Past(EpochTable(run), elapsed_s=read_elapsed_s(run) if step else 0.0)
    evaluations: dict[int, dict[str, Any]] = {}
    ledger: list[dict[str, Any]] = []
    last: dict[str, Any] = {}
    kept_bytes = 0
    for end, row in iterate_rows(run) if step else ():
        if row["step"] > step:  # a run writes its rows in order: all that follows will be repeated
            break
        kept_bytes = end
        past.epochs.add(row)
        if row["kind"] == "step":
            last = row
            if row.get("images_per_s"):
                past.images_per_s.append(row["images_per_s"])
        elif row["kind"] == "evaluation":
            evaluations[row["step"]] = row
        elif row["kind"] == "ledger":
            ledger = row["rows"]
    ordered = tuple(evaluations[at] for at in sorted(evaluations))
    return dataclasses.replace(past, evaluations=ordered, ledger=tuple(ledger), last=last, kept_bytes=kept_bytes)


def read_elapsed_s(run: Path) -> float:
    """Wall time of a run so far, s: of its last result, its last rows, or the beginning of its last part."""
    parts = read_object(run / "environment.json").get("resumed")
    rows = [*last_rows(run), *(parts if isinstance(parts, list) else ()), read_object(run / "result.json")]
    return max(map(_seconds, rows))


def _seconds(row: object) -> float:
    """Its elapsed_s; 0 where it does not say, or was edited by hand."""
    found = row.get("elapsed_s") if isinstance(row, dict) else None
    return float(found) if is_number(found) else 0.0  # type: ignore[arg-type]
