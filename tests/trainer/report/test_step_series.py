"""A long run's steps: read once, in bounded memory, and a resumed run parses each row once."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.synthetic_run import digits_config
from trainer.report import step_series
from trainer.report.charts import Line, _curve
from trainer.report.step_series import read_series
from trainer.training import history, rows
from trainer.training.history import read_past
from trainer.training.metrics import MetricsLog
from trainer.training.rows import NAME, Thinned, iterate_rows


def step_row(step: int, **more: object) -> dict[str, Any]:
    value = random.Random(step).random()
    figures = {"loss": value, "images_per_s": 100 + value, "data_wait_share": value / 2, "learning_rate": 0.01}
    norms = {"gradient_norm": {"a": value, "b": 2 * value}}
    return (
        {"kind": "step", "step": step, "epoch": (step - 1) // 10} | figures | norms | {"elapsed_s": 1.0 * step} | more
    )


def evaluation_row(step: int) -> dict[str, Any]:
    rates = {"top1": 0.5, "top5": None, "loss": 1.0, "num_samples": 10}  # of fewer than six classes
    return {"kind": "evaluation", "step": step, "epoch": step / 10} | rates


def write(run: Path, found: list[dict[str, Any]]) -> None:
    run.mkdir(exist_ok=True)
    (run / NAME).write_text("".join(json.dumps(row) + "\n" for row in found))


def test_a_short_run_keeps_every_step(tmp_path: Path) -> None:
    write(tmp_path, [step_row(step) for step in range(1, 31)] + [evaluation_row(30)])
    steps, evaluations = read_series(tmp_path)
    assert (steps.num, steps.last["step"], steps.at.tolist()) == (30, 30, list(range(1, 31)))
    losses = [step_row(step)["loss"] for step in range(1, 31)]
    assert steps.column("loss").tolist() == [[loss] * 3 for loss in losses]
    assert [row["step"] for row in evaluations] == [30]


def test_a_long_run_has_no_more_points_and_tells_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Median, range and what is written at a line's end follow from neighbors put together."""
    write(tmp_path, [step_row(step) for step in range(1, 1001)])
    whole, _ = read_series(tmp_path)
    monkeypatch.setattr(step_series, "MOST_POINTS", 300)
    steps, _ = read_series(tmp_path)
    assert (steps.num, len(steps.at), steps.at[-1]) == (1000, 250, 1000)
    losses = whole.column("loss")[:, 0].reshape(250, 4)
    expected = np.stack([np.median(losses, axis=1), losses.min(axis=1), losses.max(axis=1)], axis=1)
    assert np.array_equal(steps.column("loss"), expected)
    line = _curve(Line("loss", steps.at, steps.column("loss"), summarize=True))
    exact = _curve(Line("loss", whole.at, whole.column("loss"), summarize=True))
    assert line is not None and exact is not None
    assert (line.low.min(), line.high.max()) == (exact.low.min(), exact.high.max())


def test_figures_that_a_row_lacks_and_rows_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_series, "MOST_POINTS", 2)
    bare = {"kind": "step", "step": 1, "epoch": 0, "loss": 1.0}
    write(tmp_path, [bare, step_row(2), step_row(3, images_per_s=None), step_row(4, gradient_norm=None)])
    with (tmp_path / NAME).open("a") as file:
        file.write('[1]\n{"step": "x"}\nnot json\n{"kind": "step", "st')
    steps, _ = read_series(tmp_path)
    assert (steps.num, steps.at.tolist()) == (4, [2, 4])
    rates = [step_row(2)["images_per_s"], step_row(4)["images_per_s"]]
    assert steps.column("images_per_s")[:, 0].tolist() == rates
    assert np.isnan(read_series(tmp_path / "no run")[0].column("loss")).all()


def test_steps_that_were_made_again_count_once(tmp_path: Path) -> None:
    write(tmp_path, [step_row(step) for step in (1, 2, 3, 4)] + [step_row(3, loss=9.0)])
    steps, _ = read_series(tmp_path)
    assert (steps.num, steps.at.tolist(), steps.column("loss")[-1, 0]) == (3, [1, 2, 3], 9.0)


def test_a_resumed_run_parses_each_row_once_and_cuts_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Any]] = []
    for step in range(1, 3001):
        found += [step_row(step)] if step % 1000 else [step_row(step), evaluation_row(step)]
    write(tmp_path, found)
    before = (tmp_path / NAME).read_bytes().splitlines(keepends=True)
    inode = (tmp_path / NAME).stat().st_ino
    parsed = []
    monkeypatch.setattr(rows, "_parsed", lambda line, real=rows._parsed: parsed.append(line) or real(line))
    past = read_past(tmp_path, 2000)
    log = MetricsLog(tmp_path, digits_config(), 2000, past)
    log.close("finished")
    assert (tmp_path / NAME).read_bytes().splitlines(keepends=True) == before[:2002]
    assert (tmp_path / NAME).stat().st_ino == inode, "cut in place, not written anew"
    tail = rows.TAIL_BYTES // min(map(len, before)) + 2  # looked at for the time of the steps that are lost
    assert parsed.count(before[17]) == 1 and len(parsed) <= 2003 + tail
    assert (len(past.images_per_s), past.last["step"], past.evaluations[-1]["step"]) == (2000, 2000, 2000)
    assert past.elapsed_s == 3000.0, "steps that are lost took their time too"


def test_only_the_last_rows_are_looked_at_for_the_time_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [step_row(step) for step in range(1, 20_001)])
    parsed = []
    monkeypatch.setattr(rows, "_parsed", lambda line, real=rows._parsed: parsed.append(line) or real(line))
    assert history.read_elapsed_s(tmp_path) == 20_000.0
    assert len(parsed) < 2000
    assert next(iterate_rows(tmp_path))[1]["step"] == 1 and len(parsed) < 2001, "whether there is a step takes one row"


def test_a_last_line_without_its_end_is_completed(tmp_path: Path) -> None:
    write(tmp_path, [step_row(1), step_row(2)])
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[:-1])
    MetricsLog(tmp_path, digits_config(), 2).close("finished")
    assert (tmp_path / NAME).read_bytes() == whole


def test_a_thinned_series_keeps_its_median_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_KEPT", 64)
    short, long = Thinned(), Thinned()
    for value in range(50):
        short.append(value)
    for value in range(100_000):
        long.append(value)
    assert (len(short), short.median(), Thinned().median()) == (50, 24.5, 0.0)
    assert len(long) == 100_000 and len(long._kept) <= 65
    assert abs(long.median() - 50_000) < 100_000 / 32
