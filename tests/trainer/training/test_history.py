"""A run that was stopped and went on tells of all its parts: rows, table, result, environment, report."""

import csv
import json
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.training_commands import train_words
from trainer.__main__ import main
from trainer.report.run_data import facts, headline, read_run
from trainer.training.checkpoint import checkpoints, folder_of, read_record
from trainer.training.history import read_elapsed_s, read_past
from trainer.training.loop import Trainer

STEPS = 11
pytestmark = pytest.mark.usefixtures("one_thread")


def train(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    return main()


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


@pytest.fixture(scope="module")
def parts(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """A run after each of its three parts: stopped in its only evaluation, stopped there again, ended."""
    folder, copies = tmp_path_factory.mktemp("parts"), []
    inner = Trainer._until_stopped

    def stop_at_the_second(trainer: Trainer, batches: Iterable[Any], most: int) -> Iterator[Any]:
        for number, batch in enumerate(inner(trainer, batches, most)):
            if number == 1:
                trainer.stop.note(signal.SIGTERM)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_until_stopped", stop_at_the_second)
        first = train_words(digits, folder / "run", "--processes", 1)
        again = ["trainer", "train", "--resume", folder / "run", "--set", "train.keep_checkpoints=8"]
        for number, words in enumerate((first, again, again[:4])):
            if number == 2:
                patch.setattr(Trainer, "_until_stopped", inner)
            assert train(patch, *words) == (3, 3, 0)[number]
            copies.append(shutil.copytree(folder / "run", folder / str(number)))
    yield copies


def test_an_evaluation_that_was_given_up_is_made_up(parts: list[Path]) -> None:
    """No half an evaluation is written, none is lost, and the checkpoint learns how good it is: it may be the best."""
    for stopped in parts[:2]:
        assert (read(stopped / "result.json")["exit_reason"], rows(stopped, "evaluation")) == ("stopped", [])
        assert read(stopped / "result.json")["reason"] == "asked to by SIGTERM"
        assert read_record(folder_of(stopped, STEPS)).top1 is None
    evaluations = rows(parts[2], "evaluation")
    assert [row["step"] for row in evaluations] == [STEPS]
    assert read_record(folder_of(parts[2], STEPS)).top1 == evaluations[0]["top1"] > 0
    assert read(parts[2] / "result.json")["top1"] == evaluations[0]["top1"]


def test_the_steps_are_those_of_the_first_part(parts: list[Path]) -> None:
    """Each once; the speed is that of steps, although the last part made none."""
    first, last = (read(part / "result.json") for part in (parts[0], parts[2]))
    assert rows(parts[0], "step") == rows(parts[2], "step")
    assert [row["step"] for row in rows(parts[2], "step")] == list(range(1, STEPS + 1))
    assert first["images_per_s"] == last["images_per_s"] > 0
    assert (first["step"], last["step"]) == (STEPS, STEPS)


def test_wall_time_is_that_of_all_parts(parts: list[Path]) -> None:
    """It grows from step to step, and from part to part by at least what the result of the part before says."""
    steps = [row["elapsed_s"] for row in rows(parts[2], "step")]
    assert steps == sorted(steps) and steps[0] > 0
    ends = [read(part / "result.json")["elapsed_s"] for part in parts]
    begins = [part["elapsed_s"] for part in read(parts[2] / "environment.json")["resumed"]]
    assert begins == ends[:2]
    assert steps[-1] < ends[0] < ends[1] < ends[2]
    assert rows(parts[2], "evaluation")[0]["elapsed_s"] > ends[1]


def test_the_first_command_and_each_later_one(parts: list[Path]) -> None:
    """With step and time, and what was changed."""
    environment = read(parts[2] / "environment.json")
    assert "--config" in environment["command"]
    commands = [(part["step"], part["command"].partition(" train ")[2].split()[0]) for part in environment["resumed"]]
    assert commands == [(STEPS, "--resume")] * 2
    assert all(part["started"] >= environment["started"] for part in environment["resumed"])
    shown = facts(read_run(parts[2]), "")
    assert "--config" in dict(shown)["Command"]
    later = [text for name, text in shown if name == f"Resumed at step {STEPS}"]
    assert [text.split("; ")[1:] for text in later] == [["train.keep_checkpoints 9 \u2192 8"], []]


def test_what_the_report_and_the_table_say(parts: list[Path]) -> None:
    """The wall time of all three starts, one accuracy, one line an epoch."""
    shown = {what: (figure, small) for what, figure, small in headline(read_run(parts[2]))}
    assert shown["wall time"][1] == "minutes, evaluation included; 3 starts"
    assert shown["wall time"][0] == f"{read(parts[2] / 'result.json')['elapsed_s'] / 60:.1f}"
    with (parts[2] / "epochs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["epoch"], line["steps"], bool(line["top1"])) for line in lines] == [("1", str(STEPS), True)]


def test_a_killed_run_has_spent_what_its_last_row_says(serial: Path, tmp_path: Path) -> None:
    """Also the time of steps that it loses; nothing but rows is left of them."""
    run = tmp_path / "run"
    shutil.copytree(serial, run)
    (run / "result.json").unlink()
    last = rows(run, "evaluation")[-1]["elapsed_s"]
    assert read_elapsed_s(run) == last
    past = read_past(run, 8)
    assert (len(past.images_per_s), past.evaluations, past.elapsed_s) == (8, (), last)
    assert len(read_past(run, 0).images_per_s) == read_past(run, 0).elapsed_s == 0  # a run that replaces another one


def test_a_part_that_was_killed_at_once_does_not_lose_the_time_before(serial: Path, tmp_path: Path) -> None:
    """Its start has cut the rows of the steps to repeat, and written how long the run had taken by then."""
    run = tmp_path / "run"
    shutil.copytree(serial, run)
    (run / "result.json").unlink()
    (run / "metrics.jsonl").write_text("")
    environment = read(run / "environment.json")
    (run / "environment.json").write_text(json.dumps(environment | {"resumed": [{"step": 4, "elapsed_s": 1234.5}]}))
    assert read_elapsed_s(run) == 1234.5


def test_rows_of_steps_that_are_repeated_are_cut(
    digits: Path, serial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed after its evaluation, its last checkpoint lost: one row a step, one evaluation."""
    run = tmp_path / "run"
    shutil.copytree(serial, run)
    shutil.rmtree(folder_of(run, STEPS))
    (run / "result.json").unlink()
    assert train(monkeypatch, *train_words(digits, run, "--processes", 1, "--resume", "auto")) == 0
    assert [row["step"] for row in rows(run, "step")] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows(run, "evaluation")] == [STEPS]
    assert checkpoints(run)[-1] == folder_of(run, STEPS)
    begun = read(run / "environment.json")["resumed"][0]
    assert begun["elapsed_s"] == rows(serial, "evaluation")[-1]["elapsed_s"]
    assert rows(run, "step")[8]["elapsed_s"] > begun["elapsed_s"]
