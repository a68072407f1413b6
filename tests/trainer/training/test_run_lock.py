"""One writer of a run: who holds it is named, who was killed is noticed, here, on other hosts, and without locks."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.config import load_config
from trainer.errors import CheckpointError, RunError
from trainer.model.alexnet import AlexNet
from trainer.training import checkpoint, run_lock
from trainer.training.async_checkpoint import AsyncCheckpointer, PendingCheckpoint
from trainer.training.optimizer import PaperSGD
from trainer.training.run_lock import Holder, hold_run, read_holder, refuse_held
from twotower import locks

ELSEWHERE = Holder("node7", "another boot", 4711, "2026-01-02T03:04:05Z")
CONFIG = load_config(Path(__file__).resolve().parents[3] / "configs" / "digits.toml")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody watches for long, and nobody touches unless a test does."""
    monkeypatch.setattr(run_lock, "WATCH_S", 0.02)
    monkeypatch.setattr(run_lock, "BEAT_S", 1e6)
    monkeypatch.delenv("RANK", raising=False)


def leave(run: Path, holder: Holder) -> None:
    """A lock file as a holder that was killed leaves it."""
    run.mkdir()
    (run / run_lock.LOCK_NAME).write_text(json.dumps(dataclasses.asdict(holder)))


def myself() -> Holder:
    return run_lock._myself()


def touch_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever watches sees a beat each time."""
    beats = itertools.count()
    monkeypatch.setattr(run_lock, "_touched", lambda path: next(beats))


@contextlib.contextmanager
def without_locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file system that knows no locks."""

    def refuse(path: Path) -> int:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(locks, "hold", refuse)
        yield


def test_the_second_is_told_who_holds_it(tmp_path: Path) -> None:
    """Host, process and time; whether it only looks or wants to write. Afterwards nothing is left."""
    run = tmp_path / "some" / "run"
    with hold_run(run):
        holder = read_holder(run)
        assert holder is not None and holder.pid == os.getpid()
        for attempt in (lambda: refuse_held(run), lambda: hold_run(run).__enter__()):
            with pytest.raises(RunError, match=rf"in use by process {os.getpid()} on {holder.host}, since 20\d\d-"):
                attempt()
    assert not (tmp_path / "some").exists(), "folders that the start made and left empty"
    run.mkdir(parents=True)
    with hold_run(run):
        (run / "config.toml").touch()
    assert [path.name for path in run.iterdir()] == ["config.toml"]


def test_a_rank_that_is_started_again_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its predecessor on another node may still hold an NFS lock; somebody at a terminal is told at once."""
    asked: list[bool] = []

    def is_held(path: Path) -> bool:
        asked.append(len(asked) < 3)
        return asked[-1]

    monkeypatch.setattr(locks, "is_held", is_held)
    with pytest.raises(RunError, match="in use by another process"):
        refuse_held(tmp_path)
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: None)
    refuse_held(tmp_path, patience_s=run_lock.PATIENCE_S)
    assert asked == [True, True, True, False]


def test_a_killed_holder_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel let go of the lock: one line, and it is ours."""
    leave(tmp_path / "run", dataclasses.replace(myself(), pid=4711))
    refuse_held(tmp_path / "run")
    with hold_run(tmp_path / "run"):
        assert read_holder(tmp_path / "run") == dataclasses.replace(myself(), since=read_holder(tmp_path / "run").since)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "was left by process 4711" in said and "no longer runs" in said


@pytest.mark.parametrize("locking", [True, False], ids=["own locks", "no locks"])
@pytest.mark.parametrize("holder", [ELSEWHERE, None], ids=["another host", "this host"])
def test_without_a_common_kernel_the_beat_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: Holder | None, locking: bool
) -> None:
    """A record that is touched is held; one that is not, is taken. With locks of its own, this host needs no beat."""
    left = holder or myself()
    leave(tmp_path / "run", left)
    with contextlib.ExitStack() as stack:
        if not locking:
            stack.enter_context(without_locks(monkeypatch))
        with monkeypatch.context() as patch:
            touch_always(patch)
            if holder or not locking:
                before = (tmp_path / "run" / run_lock.LOCK_NAME).read_bytes()
                with pytest.raises(RunError, match=f"in use by process {left.pid} on {left.host}"):
                    hold_run(tmp_path / "run").__enter__()
                assert (tmp_path / "run" / run_lock.LOCK_NAME).read_bytes() == before
            else:
                with hold_run(tmp_path / "run"):
                    pass
        with hold_run(tmp_path / "run"):
            assert read_holder(tmp_path / "run").pid == os.getpid()


def test_the_beat_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder touches its file without being asked."""
    monkeypatch.setattr(run_lock, "BEAT_S", 0.01)
    with hold_run(tmp_path / "run"):
        path = tmp_path / "run" / run_lock.LOCK_NAME
        first = run_lock._touched(path)
        for _ in range(10_000):
            if run_lock._touched(path) != first:
                return
            run_lock.time.sleep(0.01)
    pytest.fail("nobody touched the lock")


def test_towers_hold_it_while_they_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The launcher is killed: as long as a tower runs, nobody else writes; then the next one does."""
    run = tmp_path / "run"
    holding = hold_run(run)
    handle = holding.__enter__()
    leave_text = json.dumps(dataclasses.asdict(dataclasses.replace(myself(), pid=2**22 + 1)))
    (run / run_lock.LOCK_NAME).write_text(leave_text)
    tower = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(handle,))
    os.close(handle)
    with pytest.raises(RunError, match="has ended, and its towers still save"):
        refuse_held(run)
    tower.communicate(b"\n")
    refuse_held(run)
    with hold_run(run):
        pass
    assert "no longer runs" in capsys.readouterr().err
    with contextlib.suppress(OSError):  # the handle is closed: only the thread is to end
        holding.__exit__(None, None, None)


def test_who_was_taken_for_dead_writes_no_more(tmp_path: Path) -> None:
    """Halted for long on a disk without locks, then woken: its checkpoint does not get into the other's run."""
    net = AlexNet(CONFIG.model)
    with hold_run(tmp_path):
        saver = AsyncCheckpointer(tmp_path, net, PaperSGD(net.named_parameters(), CONFIG.optimizer), mesh=None, keep=2)
        (tmp_path / run_lock.LOCK_NAME).write_text(json.dumps(dataclasses.asdict(ELSEWHERE)))
        saver.begin(PendingCheckpoint(3, "c", None, None))
        with pytest.raises(CheckpointError, match="is now held by process 4711 on node7"):
            saver.finish()
    assert checkpoint.checkpoints(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """One line, and no part of the path is left."""
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot be written: Not a directory"):
        hold_run(tmp_path / "file" / "run").__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
