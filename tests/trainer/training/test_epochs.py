"""epochs.csv: one line per epoch, the same whether a run was interrupted or not."""

import csv
import json
import time
from pathlib import Path

import pytest

from tests.helpers.synthetic_run import digits_config, make_run
from trainer.training.epochs import NAME
from trainer.training.metrics import MOST_WAITING, MetricsLog
from trainer.training.rows import iterate_rows


def read(run: Path) -> list[dict[str, str]]:
    with (run / NAME).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_line_an_epoch(tmp_path: Path) -> None:
    """Means over the steps of the epoch, and the evaluation in the line of the epoch that it ended."""
    run = make_run(tmp_path / "run", digits_config(), steps=66)
    rows = [row for _, row in iterate_rows(run)]
    lines = read(run)
    assert [line["epoch"] for line in lines] == ["1", "2", "3"]
    assert [line["steps"] for line in lines] == ["22"] * 3
    second = [row for row in rows if row["kind"] == "step" and row["epoch"] == 1]
    assert float(lines[1]["loss"]) == float(f"{sum(row['loss'] for row in second) / 22:.6g}")
    evaluation = next(row for row in rows if row["kind"] == "evaluation")
    assert evaluation["step"] == 44
    assert [line["top1"] for line in lines] == ["", f"{evaluation['top1']:.6g}", ""]


def test_a_resumed_run_writes_the_same_table(tmp_path: Path) -> None:
    """Steps after the checkpoint are dropped and logged again; the epoch at hand counts each step once."""
    run = make_run(tmp_path / "run", digits_config(), steps=60)
    expected = (run / NAME).read_bytes()
    later = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["step"] > 50]
    log = MetricsLog(run, digits_config(), 50)
    log.flush()
    assert read(run)[2]["steps"] == "6"
    for row in later:
        log.write(row)
    log.close("finished")
    assert (run / NAME).read_bytes() == expected


def test_rows_become_visible_in_small_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast steps follow each other: a second of a GPU's steps at once would hold it up."""
    run = make_run(tmp_path / "run", digits_config(), steps=2)
    log = MetricsLog(run, digits_config(), 2)
    monkeypatch.setattr(time, "time", lambda: 1e9)  # no second goes by
    row = next(row for _, row in iterate_rows(run))
    for number in range(1, 2 * MOST_WAITING):
        log.write(row | {"step": 2 + number})
        assert len(list(iterate_rows(run))) == 2 + number // MOST_WAITING * MOST_WAITING
    log.close("finished")
