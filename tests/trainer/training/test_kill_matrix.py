"""Whatever ends a run, at whatever stage: it is as before or at a whole checkpoint, and the next command goes on.

Real processes, which stop themselves at a stage (``tests.helpers.held``), so that nothing here hits a moment by luck.
``make test-kills`` tries all combinations; ``make test-slow`` each pair of fault and stage, and each of both with one
and two processes.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import held
from tests.helpers.frozen import has_pending, release, signal_all
from tests.helpers.small_disk import small_disk
from tests.helpers.training_commands import ROOT, command, environment, run, train_words
from trainer.training.checkpoint import checkpoints, folder_of, read_record

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
FAULTS = (*SIGNALS, "SIGKILL", "closed stdout", "full disk", "read-only disk")
STEPS, BEGIN = 22, 4  # two epochs; where the disturbed command goes on from
OVERRIDES = (  # checkpoints at 4, 8, 11 ... 22, evaluations at 11 and 22
    "train.epochs=2",
    "train.evaluate_every_epochs=1",
    "train.checkpoint_every_epochs=1",
)
WAIT_S = 100
LEAST = {"start": BEGIN, "step": held.STEP + 1, "evaluation": 11, "checkpoint": 8, "end": STEPS}  # steps of a stage
CELLS = [(fault, stage, processes) for fault in FAULTS for stage in held.STAGES for processes in (1, 2)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All cells, or every second one like the black fields of a chessboard."""
    if "cell" in metafunc.fixturenames:
        whole = metafunc.config.getoption("all_cells")
        rows = {name: number for number, name in enumerate((*FAULTS, *held.STAGES))}
        chosen = [cell for cell in CELLS if whole or (rows[cell[0]] + rows[cell[1]] + cell[2]) % 2]
        metafunc.parametrize("cell", chosen, ids=[f"{fault}-{stage}-{count}" for fault, stage, count in chosen])


@dataclasses.dataclass
class Disturbed:
    """A command under way.

    Attributes:
        top: the process that was started.
        disk: where the run folder is.
    """

    top: "subprocess.Popen[str]"
    disk: Path


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run with one process and with two."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for processes in (1, 2):
        run(*train_words(digits, folder / str(processes), "--processes", processes, overrides=OVERRIDES))
    return {processes: folder / str(processes) for processes in (1, 2)}


@contextlib.contextmanager
def a_disk(folder: Path, fault: str) -> Iterator[Path]:
    """Where the run is: a real file system of its own where that is what fails."""
    if "disk" in fault:
        with small_disk(folder, "64m") as disk:
            yield disk
    else:
        folder.mkdir()
        yield folder


def begin_again(undisturbed: Path, folder: Path) -> None:
    """The run as SIGKILL left it after its first checkpoint: more rows than steps that were saved, and no result."""
    shutil.copytree(undisturbed, folder)
    (folder / "result.json").unlink()
    for checkpoint in checkpoints(folder)[1:]:
        shutil.rmtree(checkpoint)
    assert checkpoints(folder) == [folder_of(folder, BEGIN)]


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every file of a run; without what a start leaves that was killed, and nobody reads."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and ".start" not in path.parts
    }


@contextlib.contextmanager
def the_fault(disturbed: Disturbed, fault: str, stopped: int) -> Iterator[None]:
    """Happens to processes one of which is stopped; inside, it goes on, with the fault as long as that lasts."""
    run_folder, top = disturbed.disk / "run", disturbed.top
    with contextlib.ExitStack() as stack:
        if fault in SIGNALS:
            top.send_signal(signal.Signals[fault])
            wait_until_pending(stopped, signal.Signals[fault])
        elif fault == "SIGKILL":
            signal_all(held.family(disturbed.top.pid), signal.SIGKILL)
        elif fault == "closed stdout":
            assert top.stdout is not None
            top.stdout.close()
        elif fault == "full disk":
            stack.callback((disturbed.disk / "filler").unlink)
            fill(disturbed.disk / "filler")
        else:  # what is open already can still be written: as much as one can do to a file system in use
            for words in (["--bind", run_folder, run_folder], ["-o", "remount,bind,ro", run_folder]):
                subprocess.run(["mount", *words], check=True)
            stack.callback(lambda: subprocess.run(["umount", run_folder], check=True))
        if fault != "SIGKILL":
            release([stopped])
        yield


def wait_until_pending(process: int, number: signal.Signals) -> None:
    """Until a signal has come to a process that is stopped, or its launcher has killed it, as the other tower ended."""
    deadline = time.monotonic() + WAIT_S
    with contextlib.suppress(OSError):
        while not has_pending(process, number):
            assert time.monotonic() < deadline, "the signal was not passed on"
            time.sleep(0.01)


def fill(path: Path) -> None:
    """Takes all the room there is."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
def test_a_run_survives(digits: Path, undisturbed: dict[int, Path], tmp_path: Path, cell: tuple[str, str, int]) -> None:
    """A run that goes on is disturbed at a stage; then the next command ends it, with the same bits."""
    fault, stage, processes = cell
    with a_disk(tmp_path / "disk", fault) as disk:
        folder = disk / "run"
        begin_again(undisturbed[processes], folder)
        before = files_of(folder)
        words = train_words(digits, folder, "--processes", processes, "--resume", "auto", overrides=OVERRIDES)
        disturbed = Disturbed(start_held(stage, words), disk)
        try:
            with the_fault(disturbed, fault, held.stopped_one(disturbed.top)):
                told = disturbed.top.communicate(timeout=WAIT_S)[1]
        finally:
            if disturbed.top.poll() is None:
                signal_all(held.family(disturbed.top.pid), signal.SIGKILL)
        check_end(cell, disturbed.top.returncode, told)
        check_state(cell, folder, before)
        done = run("trainer", "train", "--resume", folder)
        check_whole_run(folder, undisturbed[processes], done.stdout)


def start_held(stage: str, words: list[object]) -> "subprocess.Popen[str]":
    """The trainer, which will stop itself at a stage."""
    pipe = subprocess.PIPE
    words = ["tests.helpers.held", stage, *words[1:]]
    return subprocess.Popen(command(*words), env=environment(), cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def check_state(cell: tuple[str, str, int], folder: Path, before: dict[str, str]) -> None:
    """The run as it was, or at a whole checkpoint; of a run that could save, at the step that it says it has done."""
    fault, stage, _ = cell
    found = checkpoints(folder)
    for checkpoint in found:
        read_record(checkpoint)  # raises where a file is missing, or not what was written
    if stage == "start" and fault not in ("closed stdout", "full disk"):  # which let it go on, for a while
        assert files_of(folder) == before
    elif fault in (*SIGNALS, "closed stdout"):
        step = json.loads((folder / "result.json").read_text())["step"]
        assert step >= LEAST[stage]
        assert found[-1] == folder_of(folder, step)
    else:
        assert found[-1] <= folder_of(folder, LEAST[stage])


def check_end(cell: tuple[str, str, int], code: int, told: str) -> None:
    """Exit code, and that the message blames what was to blame."""
    fault, stage, _ = cell
    if fault in SIGNALS:
        number = signal.Signals[fault]
        assert code == {"start": 128 + number, "end": 0}.get(stage, 3), told
        assert (f"stopped by {fault} before the first step; nothing was lost" in told) == (stage == "start")
    elif fault == "SIGKILL":
        assert code == -signal.SIGKILL
    elif fault == "closed stdout":
        assert code == 0, told
        assert "stdout cannot be written (Broken pipe): training goes on" in told
    else:
        assert code == 2, told
        assert ("No space left on device" if fault == "full disk" else "Read-only file system") in told
    assert "Traceback" not in told


def check_whole_run(folder: Path, undisturbed: Path, told: str) -> None:
    """Weights and velocities bit for bit; every step once, one evaluation a step, and a result."""
    last = [folder_of(run, STEPS) for run in (folder, undisturbed)]
    for name in ("tower-a.safetensors", "tower-b.safetensors"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [11, STEPS]
    ours, theirs = (json.loads((run / "result.json").read_text()) for run in (folder, undisturbed))
    same: dict[str, Any] = {name: theirs[name] for name in ("exit_reason", "step", "epoch", "top1", "top5", "ledger")}
    assert {name: ours[name] for name in same} == same, told
    assert not (folder / ".start").exists()
    assert not (folder / ".lock").exists()
