"""``python -m trainer experiment``: rows, what goes on after a stop, failures, refusals; trainings in this process."""

import csv
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.experiments import tiny_words, train_here
from tests.helpers.tiny_run import other_images
from trainer.experiments import measures
from trainer.experiments.folder import RunTask

Trainer = Callable[..., tuple[int, str, str]]
ONLY = ("--variants", "no-dropout")  # and the baseline


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants of two seeds, to their end."""
    from tests.helpers.training_commands import call

    folder = tmp_path_factory.mktemp("experiment") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        train_here(monkeypatch)
        assert call(monkeypatch, *tiny_words("ablations", tiny_data, folder, *ONLY)) == 0
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_one_row_a_run_in_the_order_of_the_variants(whole: Path) -> None:
    rows = rows_of(whole)
    names = [(row["variant"], row["seed"]) for row in rows]
    assert names == [("baseline", 0), ("baseline", 1), ("no-dropout", 0), ("no-dropout", 1)]
    for row in rows:
        run = whole / "runs" / row["variant"] / f"seed-{row['seed']}"
        result = json.loads((run / "result.json").read_text())
        assert row["status"] == "ok" and row["step"] == 6 and row["num_samples"] == 10 and row["split"] == "val"
        assert row["top1_error"] == pytest.approx(1 - result["top1"]) and row["top1_error"] * 10 % 1 == 0
        assert row["parameters"] == 139_466
        assert f"seed = {row['seed']}\n" in (run / "config.toml").read_text()
    with (whole / "results.csv").open() as file:
        assert [row["loss"] for row in csv.DictReader(file)] == [str(row["loss"]) for row in rows]
    text = (whole / "runs" / "no-dropout" / "seed-0" / "config.toml").read_text()
    assert "dropout = 0.0\n" in text and "keep_checkpoints = 1\n" in text and "loggers = []\n" in text


def test_what_it_says_stands_in_all_three_forms(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    (found,) = [each for each in summary["compared"] if each["metric"] == "loss"]
    by_seed = {(row["variant"], row["seed"]): row["loss"] for row in rows_of(whole)}
    expected = [by_seed["no-dropout", seed] - by_seed["baseline", seed] for seed in (0, 1)]
    assert found["differences"] == pytest.approx(expected) and found["mean"] == pytest.approx(sum(expected) / 2)
    shown = f"{sum(expected) / 2:+.4f}"
    assert shown in (whole / "table.md").read_text() and shown in (whole / "report.html").read_text()
    assert "no color shift: this recipe has none to leave out" in (whole / "table.md").read_text()


def test_given_again_it_trains_nothing_and_changes_no_byte(
    whole: Path, tiny_data: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("results.jsonl", "results.csv", "summary.json", "table.md", "report.html", "experiment.json")
    before = {name: (whole / name).read_bytes() for name in names}
    trained = train_here(monkeypatch)
    status, out, _ = trainer(*tiny_words("ablations", tiny_data, whole, *ONLY))
    assert status == 0 and trained == [] and "runs 4/4 are done already" in out
    assert {name: (whole / name).read_bytes() for name in names} == before


def test_stopped_between_two_runs_it_ends_with_the_same_rows(
    whole: Path, tiny_data: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop_at_the_third(task: RunTask) -> int | None:
        if task.name != "baseline-seed-1":
            return None
        signal.raise_signal(signal.SIGTERM)
        return 3  # stopped, and saved

    words = tiny_words("ablations", tiny_data, tmp_path / "again", *ONLY)
    trained = train_here(monkeypatch, stop_at_the_third, copies=whole)
    status, out, _ = trainer(*words)
    assert status == 3 and "stopped by SIGTERM: 2 of 4 runs are done; the same command goes on" in out
    assert trained == ["baseline-seed-0", "no-dropout-seed-0"] and len(rows_of(tmp_path / "again")) == 2
    trained = train_here(monkeypatch, copies=whole)
    assert trainer(*words)[0] == 0 and trained == ["baseline-seed-1", "no-dropout-seed-1"]
    for name in ("results.jsonl", "results.csv", "summary.json"):
        assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_that_fails_is_told_and_in_no_average(
    whole: Path, tiny_data: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail_one(task: RunTask) -> int | None:
        if task.name != "no-dropout-seed-1":
            return None
        task.log.write_text("step 3\nerror: the loss is nan at step 4\n")
        return 2

    folder = tmp_path / "failed"
    words = tiny_words("ablations", tiny_data, folder, *ONLY)
    train_here(monkeypatch, fail_one, copies=whole)
    status, out, err = trainer(*words)
    assert status == 3 and "error: no-dropout, seed 1: the loss is nan at step 4" in err
    assert "1 run of 4 failed and count in no average" in err and "no-dropout seed 1: failed" in out
    assert rows_of(folder)[-1]["reason"] == "the loss is nan at step 4"
    (found,) = [row for row in json.loads((folder / "summary.json").read_text())["compared"] if row["metric"] == "loss"]
    assert found["seeds"] == [0] and found["unpaired"] == [1] and found["interval"] is None
    page, table = (folder / "report.html").read_text(), (folder / "table.md").read_text()
    assert "the loss is nan at step 4" in page and "the loss is nan at step 4" in table and "3 of 4" in page
    train_here(monkeypatch, copies=whole)
    assert trainer(*words)[0] == 0, "the same command tries it again"
    assert (folder / "results.jsonl").read_bytes() == (whole / "results.jsonl").read_bytes()


def test_a_run_that_trains_and_cannot_be_measured_is_a_failure_of_its_own(
    whole: Path, tiny_data: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from trainer.errors import RunError

    def refuse(*_: object) -> None:
        raise RunError("no room")

    monkeypatch.setattr(measures, "save", refuse)
    train_here(monkeypatch, copies=whole)
    words = tiny_words("figure-4", tiny_data, tmp_path / "out", seeds=1)
    status, _, err = trainer(*words)
    assert status == 3 and "baseline, seed 0: trained, but not measured: no room" in err
    assert "nothing is compared" in (tmp_path / "out" / "report.html").read_text()


def test_the_number_of_seeds_may_grow(
    whole: Path, tiny_data: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained, folder = train_here(monkeypatch, copies=whole), tmp_path / "more"
    assert trainer(*tiny_words("ablations", tiny_data, folder, *ONLY, seeds=1))[0] == 0
    assert trainer(*tiny_words("ablations", tiny_data, folder, "--variants", "baseline", seeds=2))[0] == 0
    assert trained == ["baseline-seed-0", "no-dropout-seed-0", "baseline-seed-1"]
    names = [(row["variant"], row["seed"]) for row in rows_of(folder)]
    assert names == [("baseline", 0), ("baseline", 1), ("no-dropout", 0)], "rows of variants not asked for stay"


def refused(whole: Path, tiny_data: Path, other: Path, path: Path) -> dict[str, tuple[list[object], str]]:
    (path / "full").mkdir()
    (path / "full" / "letter.txt").touch()
    return {
        "another recipe": (
            tiny_words("ablations", tiny_data, whole, "--set", "optimizer.momentum=0.8"),
            r"begun with another recipe \(.*momentum = 0.9, then momentum = 0.8\): give another folder",
        ),
        "another data set": (tiny_words("ablations", other, whole), "begun on another data set"),
        "another experiment": (
            tiny_words("views", tiny_data, whole),
            "holds experiment ablations: give another folder",
        ),
        "no experiment": (
            tiny_words("views", tiny_data, path / "full"),
            r"holds something that is no experiment \(letter.txt\)",
        ),
        "in the data set": (tiny_words("views", tiny_data, tiny_data / "out"), "lies in the data set"),
        "a file": (tiny_words("views", tiny_data, path / "full" / "letter.txt"), "Not a directory"),
        "no such variant": (
            tiny_words("ablations", tiny_data, path / "new", "--variants", "no-colour"),
            "--variants no-colour: ablations has baseline, no-normalization",
        ),
        "a recipe that does not fit": (
            tiny_words("ablations", tiny_data, path / "new", "--set", "model.classes=7"),
            "variant baseline: .*model.classes = 7",
        ),
        "gray images": (tiny_words("figure-3", tiny_data, path / "new"), "figure-3 looks at the color of two towers"),
        "no data set": (tiny_words("views", path / "none", path / "new"), "no data set"),
        "no such experiment": (["experiment", "figure-9", "--data", tiny_data, "--output", path / "new"], "figure-9"),
    }


CASES = (
    "another recipe", "another data set", "another experiment", "no experiment", "in the data set", "a file",
    "no such variant", "a recipe that does not fit", "gray images", "no data set", "no such experiment",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_is_one_line_and_changes_nothing(
    whole: Path, tiny_data: Path, trainer: Trainer, tmp_path: Path, case: str
) -> None:
    import re

    other = other_images(tiny_data, tmp_path / "other") if case == "another data set" else tiny_data
    words, said = refused(whole, tiny_data, other, tmp_path)[case]
    before = sorted(path.stat().st_mtime_ns for path in whole.iterdir())
    status, _, err = trainer(*words)
    lines = [line for line in err.splitlines() if not line.startswith("left out: ")]
    assert status == 2 and len(lines) == 1 and re.search(said, lines[0]), err
    assert not (tmp_path / "new").exists() and before == sorted(path.stat().st_mtime_ns for path in whole.iterdir())


def test_a_second_one_in_the_same_folder_is_refused(whole: Path, tiny_data: Path, trainer: Trainer) -> None:
    from trainer.experiments.folder import hold

    with hold(whole):
        status, _, err = trainer(*tiny_words("ablations", tiny_data, whole, *ONLY))
    assert status == 2 and "another process runs this experiment" in err


def test_dry_run_says_runs_hours_and_disk_and_writes_nothing(
    tiny_data: Path, trainer: Trainer, tmp_path: Path, one_thread: None
) -> None:
    status, out, _ = trainer(*tiny_words("ablations", tiny_data, tmp_path / "out", *ONLY, "--dry-run"))
    assert status == 0 and not (tmp_path / "out").exists()
    assert "4 runs, " in out and "hours of steps" in out and "GiB" in out and "no-dropout" in out


def test_a_cluster_that_is_not_there_is_one_line(tiny_data: Path, trainer: Trainer, tmp_path: Path) -> None:
    """Told before anything is written."""
    words = tiny_words("views", tiny_data, tmp_path / "out", "--address", "127.0.0.1:1", seeds=1)
    status, _, err = trainer(*words)
    assert status == 2 and err.splitlines()[-1].startswith("error: --address 127.0.0.1:1: no Ray cluster answers: ")
    assert len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_an_address_is_kept_without_what_opens_it(
    whole: Path, tiny_data: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each training is told the whole of it; nothing in the experiment's folder is."""
    told: list[str] = []
    command_of = RunTask.command

    def spy(task: RunTask, data: str, **how: Any) -> list[str]:
        told.append(data)
        return command_of(task, data, **how)

    monkeypatch.setattr(RunTask, "command", spy)
    monkeypatch.setattr("pipeline.loader.staging.stage", lambda source: tiny_data)
    train_here(monkeypatch, copies=whole)
    words = tiny_words("ablations", Path("https://user:s3cret@host/d?sig=s3cret"), tmp_path / "out", *ONLY, seeds=1)
    assert trainer(*words)[0] == 0
    assert told and all(data.count("s3cret") == 2 for data in told)
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"s3cret" not in path.read_bytes(), path
    assert json.loads((tmp_path / "out" / "experiment.json").read_text())["data"] == "https:/***@host/d?sig=***"
