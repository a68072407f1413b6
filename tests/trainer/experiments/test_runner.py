"""Tasks as processes of this machine: some at once, each with its own status; a stop reaches all and starts no more."""

import signal
from pathlib import Path

import pytest

from trainer.config import Config
from trainer.experiments.folder import RunTask
from trainer.experiments.runner import Ending, Orders, run_here
from trainer.stopping import StopRequest

WAITS = """
import pathlib, sys, time
own, other = map(pathlib.Path, sys.argv[1:])
own.touch()
while not other.exists():
    time.sleep(0.01)
"""
SAVES = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
pathlib.Path(sys.argv[1]).touch()
while True:
    time.sleep(0.01)
"""


def make_tasks(folder: Path, count: int) -> list[RunTask]:
    (folder / "logs").mkdir()
    return [RunTask("v", seed, Config(), folder, 1) for seed in range(count)]


def statuses(endings: list[Ending]) -> dict[int, int]:
    return {ending.task.seed: ending.status for ending in endings}


def test_as_many_at_once_as_asked_for(tmp_path: Path) -> None:
    """Two that wait for each other come to their end only together."""
    marks = [str(tmp_path / name) for name in "ab"]

    def words(task: RunTask) -> list[str]:
        return ["python", "-c", WAITS, marks[task.seed], marks[1 - task.seed]]

    endings = list(run_here(make_tasks(tmp_path, 2), Orders(words, StopRequest(), lambda _: None), parallel=2))
    assert statuses(endings) == {0: 0, 1: 0}


@pytest.mark.parametrize(
    ("program", "status"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)  # fmt: skip
def test_each_with_its_own_status_and_words(program: str, status: int, tmp_path: Path) -> None:
    orders = Orders(lambda _: ["python", "-c", f"print('hello', flush=True); {program}"], StopRequest(), lambda _: None)
    (ending,) = run_here(make_tasks(tmp_path, 1), orders, parallel=1)
    assert ending.status == status and ending.task.log.read_text() == "hello\n"


def test_a_stop_reaches_those_in_work_and_starts_no_more(tmp_path: Path) -> None:
    stop, mark = StopRequest(), tmp_path / "mark"

    def stop_once_it_works(running: object) -> None:
        if mark.exists():
            stop.note(signal.SIGTERM)

    orders = Orders(lambda _: ["python", "-c", SAVES, str(mark)], stop, stop_once_it_works)
    assert statuses(list(run_here(make_tasks(tmp_path, 3), orders, parallel=1))) == {0: 3}


def test_one_that_another_process_holds_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.training import run_lock
    from twotower import locks

    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.1)
    tasks = make_tasks(tmp_path, 2)
    tasks[0].run.mkdir(parents=True)
    handle = locks.hold(tasks[0].run / run_lock.LOCK_NAME)
    assert handle is not None
    orders = Orders(lambda _: ["python", "-c", ""], StopRequest(), lambda _: None)
    endings = list(run_here(tasks, orders, parallel=1))
    assert statuses(endings) == {0: 2, 1: 0} and "seed-0" in endings[0].reason
