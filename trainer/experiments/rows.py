"""results.jsonl and results.csv: a row a run, also of one that failed. No times: the same runs give the same bytes."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.manifest import write_atomic
from trainer.errors import RunError
from trainer.experiments.estimate import count_parameters
from trainer.experiments.folder import Row, RunTask
from trainer.experiments.variants import Experiment
from trainer.training import run_folder
from trainer.training.rows import iterate_rows

ROWS_NAME, TABLE_NAME = "results.jsonl", "results.csv"
OK, FAILED = "ok", "failed"
REASON_CHARACTERS = 300


def finished_row(task: RunTask, measured: Mapping[str, float | None]) -> Row:
    """The row of a run that has come to its end.

    Raises:
        RunError: its result is not there, or it was never evaluated.
    """
    result = run_folder.read_result(task.run)
    if result.get("exit_reason") != "finished" or result.get("top1") is None:
        raise RunError(f"{task.run}: its result.json tells of no evaluation at the end")
    *_, evaluation = (row for _, row in iterate_rows(task.run) if row.get("kind") == "evaluation")
    total, top5 = result["num_samples"], result.get("top5")
    return {
        "variant": task.variant,
        "seed": task.seed,
        "status": OK,
        "step": result["step"],
        "split": evaluation["split"],
        "num_samples": total,
        "parameters": count_parameters(task.config, four_layers=task.four_layers),
        "top1_error": _error(result["top1"], total),
        "top5_error": None if top5 is None else _error(top5, total),
        "loss": evaluation["loss"],
        **measured,
    }


def _error(share: float, total: int) -> float:
    """The share of wrong images from that of right ones, without the rounding of 1 - share."""
    return (total - round(share * total)) / total


def failed_row(task: RunTask, status: int, reason: str = "") -> Row:
    """The row of a run that did not come to its end."""
    return {
        "variant": task.variant,
        "seed": task.seed,
        "status": FAILED,
        "exit_code": status,
        "reason": reason or last_words(task.log),
    }


def last_words(log: Path) -> str:
    """Why a command failed, in its own words: the last line that says ``error:``, else the last one."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")[:REASON_CHARACTERS]


def read_rows(folder: Path) -> dict[tuple[str, int], Row]:
    """The rows so far by variant and seed; lines that are none are left out, their runs are looked at again."""
    rows: dict[tuple[str, int], Row] = {}
    try:
        lines = (folder / ROWS_NAME).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return rows
    for line in lines:
        try:
            row = json.loads(line)
            if row["status"] in (OK, FAILED):
                rows[str(row["variant"]), int(row["seed"])] = row
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    """Writes both files.

    Raises:
        RunError: they cannot be written.
    """
    found = list(rows)
    columns = list(dict.fromkeys(key for row in found for key in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    try:
        write_atomic(folder / ROWS_NAME, "".join(json.dumps(row) + "\n" for row in found).encode())
        write_atomic(folder / TABLE_NAME, table.getvalue().encode())
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}") from None


def in_order(experiment: Experiment, rows: Mapping[tuple[str, int], Row]) -> list[Row]:
    """Variant by variant, seed by seed; those of variants that are not asked for come last."""
    names = [variant.name for variant in experiment.variants]
    return sorted(rows.values(), key=lambda row: (_place(names, row["variant"]), row["variant"], row["seed"]))


def _place(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else len(names)


def values_of(rows: Iterable[Row], variant: str, key: str) -> dict[int, float]:
    """Seed -> figure of the runs that have it; failed runs and absent figures are NaN, so that they are told."""
    return {
        int(row["seed"]): math.nan if row.get(key) is None else float(row[key])
        for row in rows
        if row["variant"] == variant
    }
