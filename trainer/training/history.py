"""What a run did before this start of it, so that what it says of itself is about all its parts."""

import dataclasses
from pathlib import Path
from typing import Any

from trainer.training.metrics import read_metrics
from trainer.training.run_files import is_number, read_object


@dataclasses.dataclass(frozen=True)
class Past:
    """A run up to the step that a start goes on from.

    Attributes:
        images_per_s: of every step.
        evaluations: rows of metrics.jsonl, one a step, ascending.
        elapsed_s: wall time of all parts, also of steps that were lost and are made again.
        ledger: what crossed in one step; nothing where one process held both towers.
    """

    images_per_s: tuple[float, ...] = ()
    evaluations: tuple[dict[str, Any], ...] = ()
    elapsed_s: float = 0.0
    ledger: tuple[dict[str, Any], ...] = ()


def read_past(run: Path, step: int) -> Past:
    """Reads what was before ``step``; nothing where a run begins."""
    if not step:
        return Past()
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    evaluations = {row["step"]: row for row in rows if row["kind"] == "evaluation"}
    return Past(
        images_per_s=tuple(row["images_per_s"] for row in rows if row["kind"] == "step" and row.get("images_per_s")),
        evaluations=tuple(evaluations[at] for at in sorted(evaluations)),
        elapsed_s=read_elapsed_s(run),
        ledger=next((tuple(row["rows"]) for row in reversed(rows) if row["kind"] == "ledger"), ()),
    )


def read_elapsed_s(run: Path) -> float:
    """Wall time of a run so far, s: of its last result, its last row, or the beginning of its last part."""
    parts = read_object(run / "environment.json").get("resumed")
    rows = [*read_metrics(run), *(parts if isinstance(parts, list) else ()), read_object(run / "result.json")]
    return max(map(_seconds, rows))


def _seconds(row: object) -> float:
    """Its elapsed_s; 0 where it does not say, or was edited by hand."""
    found = row.get("elapsed_s") if isinstance(row, dict) else None
    return float(found) if is_number(found) else 0.0  # type: ignore[arg-type]
