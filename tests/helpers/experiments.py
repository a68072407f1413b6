"""Experiments in this process: each training is ``python -m trainer train`` as the experiment gives it, called here."""

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.helpers.tiny_run import OVERRIDES
from tests.helpers.training_commands import CONFIG, call
from trainer.experiments import command, four_layers
from trainer.experiments.folder import RunTask
from trainer.experiments.runner import Ending, Orders

Before = Callable[[RunTask], int | None]  # a status in place of the training, or None to train


def tiny_words(
    name: str, data: Path, output: Path, *more: object, seeds: int = 2, config: Path = CONFIG
) -> list[object]:
    """The command of an experiment of runs of six steps."""
    words: list[object] = ["experiment", name, "--config", config, "--data", data, "--output", output, "--seeds", seeds]
    for text in OVERRIDES:
        words += ["--set", text]
    return [*words, *more]


def train_here(
    monkeypatch: pytest.MonkeyPatch, before: Before = lambda task: None, *, copies: Path | None = None
) -> list[str]:
    """From now on experiments train in this process; returns the list to which each training's name is added.

    With ``copies``, an experiment's folder, a training that it has is copied from there instead.
    """
    trained: list[str] = []

    def run_here(tasks: Sequence[RunTask], orders: Orders, *, parallel: int) -> Iterator[Ending]:
        for task in tasks:
            if orders.stop.name:
                return
            status = before(task)
            if status is None:
                trained.append(task.name)
                words = orders.words(task)
                assert words[:4] == ["python", "-m", "trainer", "train"] or task.four_layers
                status = _copy(copies, task) if copies else _train(task, words[3:])
            orders.tick([])
            yield Ending(task, status)

    monkeypatch.setattr(command.runner, "run_here", run_here)
    return trained


def _train(task: RunTask, words: Sequence[str]) -> int:
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        status = four_layers.main(words) if task.four_layers else call(patch, *words)
    task.log.write_text(said.getvalue())
    return status


def _copy(copies: Path, task: RunTask) -> int:
    shutil.copytree(copies / "runs" / task.variant / f"seed-{task.seed}", task.run)
    return 0
