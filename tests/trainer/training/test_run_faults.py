"""Faults of whole runs in real processes: a second run, a stop after damage, another user, towers that die early."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import held
from tests.helpers.tiny_run import LAST, RECIPE, flip
from tests.helpers.training_commands import ROOT, call, command, environment, run
from tests.helpers.trees import tree
from trainer.training import checkpoint, run_folder
from trainer.training.loop import Trainer
from trainer.training.run_lock import LOCK_NAME, read_holder

LONG = ("--set", "train.epochs=100000", "--set", "train.checkpoint_every_epochs=1000")  # until it is stopped


def start(*words: object) -> subprocess.Popen[str]:
    """``python -m trainer train words...``, running."""
    return subprocess.Popen(
        command("trainer", "train", *words),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Until a checkpoint of this step or a later one is there."""
    while not any(int(path.name.removeprefix("step-")) >= step for path in checkpoint.checkpoints(folder)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def stop(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 3, said + errors
    return said + errors


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_run_into_the_same_folder(tiny_data: Path, tmp_path: Path, processes: int) -> None:
    """It is told who holds the folder, whatever it wants to do there; the first goes on and is what it would be."""
    folder = tmp_path / "run"
    words = (*RECIPE, "--data", tiny_data, "--run", folder)
    first = start(*words, *LONG, "--processes", processes)
    wait_for(first, folder, 2)
    holder = read_holder(folder)
    assert holder is not None and holder.pid == first.pid
    for more in (("--overwrite",), ("--resume", "auto"), ("--overwrite", "--dry-run"), ("--resume", "auto", *LONG)):
        said = run("trainer", "train", *words, *more, code=2).stderr
        assert f"in use by process {first.pid} on {holder.host}" in said, said
    run("trainer", "evaluate", "--run", folder)
    said = stop(first)
    assert f"go on with: python -m trainer train --resume {folder}" in said
    result = json.loads((folder / "result.json").read_text())
    assert checkpoint.latest_checkpoint(folder) == checkpoint.folder_of(folder, result["step"])
    assert not (folder / LOCK_NAME).exists()


@pytest.mark.slow
def test_a_killed_run_is_noticed_and_goes_on(tiny_data: Path, tmp_path: Path) -> None:
    """SIGKILL leaves the lock file: the next one says whose it was, and goes on from the last checkpoint."""
    folder = tmp_path / "run"
    first = start(*RECIPE, "--data", tiny_data, "--run", folder, *LONG)
    wait_for(first, folder, 2)
    first.kill()
    first.communicate()
    again = start("--resume", folder)
    wait_for(again, folder, int(checkpoint.latest_checkpoint(folder).name.removeprefix("step-")) + 1)
    said = stop(again)
    assert f"was left by process {first.pid} on" in said and "no longer runs" in said


@pytest.mark.slow
def test_stopped_after_going_back(tiny_data: Path, tmp_path: Path) -> None:
    """The newest is damaged, the run goes back, and SIGTERM comes before it has caught up: what it saves is kept."""
    folder = tmp_path / "run"
    words = (*RECIPE, "--data", tiny_data, "--run", folder, *LONG, "--set", "train.keep_checkpoints=1")
    first = start(*words, "--set", "train.checkpoint_every_steps=7")
    wait_for(first, folder, 21)
    stop(first)
    newest = checkpoint.checkpoints(folder)[-1]
    before = Path(shutil.copytree(newest, checkpoint.folder_of(folder, 1)))  # as the best one would be kept
    record = json.loads((before / checkpoint.RECORD).read_text())
    (before / checkpoint.RECORD).write_text(json.dumps(record | {"step": 1}))
    flip(newest / "tower-a.safetensors")
    again = start("--resume", folder, "--set", "train.checkpoint_every_steps=0")
    assert again.stdout is not None
    assert "from step" in again.stdout.readline()
    said = stop(again)
    step = json.loads((folder / "result.json").read_text())["step"]
    assert f"{newest.name}/tower-a.safetensors is damaged" in said
    found = checkpoint.choose(folder)
    assert found is not None and found.record.step == step
    assert (folder / "checkpoints" / f".damaged-{newest.name}").is_dir()
    third = start("--resume", folder, "--set", "train.checkpoint_every_steps=0")
    assert third.stdout is not None
    assert f"from step {step}" in third.stdout.readline()
    stop(third)


@pytest.mark.slow
def test_towers_that_die_in_start_up(tiny_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    """Real ones: an old run that was to be replaced is what it was, and a new one is not there."""
    old, new = Path(shutil.copytree(tiny_run, tmp_path / "old")), tmp_path / "new"
    before = tree(old)
    for folder, more in ((old, ("--overwrite",)), (new, ())):
        words = ("train", *RECIPE, "--data", tiny_data, "--run", folder, "--processes", 2, *more)
        variables = environment() | {held.GRACE: "1"}  # the other tower hears of nothing: it still waits to meet
        process = subprocess.Popen(command("tests.helpers.held", "start", *words), env=variables, cwd=ROOT)
        os.kill(held.stopped_one(process), signal.SIGKILL)
        assert process.wait(timeout=200) != 0
        assert tree(old) == before
        assert not new.exists()
    run("trainer", "train", *RECIPE, "--data", tiny_data, "--run", old, "--processes", 2, "--overwrite")
    assert json.loads((old / "environment.json").read_text())["processes"] == 2


def test_torchrun_that_starts_again_overwrites_nothing(
    tiny_data: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``torchrun --max-restarts`` repeats the command with its --overwrite: the run goes on."""
    seen: list[bool] = []

    def train(*_: object, is_new: bool) -> int:
        seen.append(is_new)
        return 0

    monkeypatch.setattr("trainer.train_command.join_and_train", train)
    at = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    for name, value in (at | {"MASTER_PORT": 29500}).items():
        monkeypatch.setenv(name, str(value))
    for count in (0, 1):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        words = ("train", *RECIPE, "--data", tiny_data, "--run", tiny_run, "--set", "train.epochs=3", "--overwrite")
        assert call(monkeypatch, *words) == 0
    assert seen == [True, False]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_users_run(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Readable files are used; what may not be read is called so, never damaged, and nothing is to be overwritten."""
    place = Path("/var/tmp") / f"twotower-{os.getpid()}"  # pytest's own folders are 0700
    place.mkdir(mode=0o755)
    try:
        folder, data = (Path(shutil.copytree(of, place / of.name)) for of in (tiny_run, tiny_data))
        assert as_nobody("evaluate", "--run", folder, "--data", data)[0] == 0
        code, errors = as_nobody("export", "--run", folder, "--output", place / "net.safetensors")
        assert code == 2 and "this user may not write in" in errors
        code, errors = as_nobody("train", "--resume", folder, "--data", data, "--set", "train.epochs=3")
        assert code == 2 and "this user may not write in" in errors
        newest = checkpoint.latest_checkpoint(folder)
        assert newest is not None
        for closed in (newest / "tower-b.safetensors", newest / checkpoint.RECORD, folder / run_folder.CONFIG_NAME):
            closed.chmod(0o600)
            code, errors = as_nobody("evaluate", "--run", folder, "--data", data)
            assert code == 2 and f"{closed} cannot be read: Permission denied" in errors, errors
            assert "damaged" not in errors and "overwrite" not in errors
            closed.chmod(0o644)
    finally:
        shutil.rmtree(place)


def as_nobody(*words: object) -> tuple[int, str]:
    """``python -m trainer words...`` as a user who owns nothing, in this process's child: exit code and stderr."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        sys.stderr = os.fdopen(writing, "w", buffering=1)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        os.environ["HOME"] = "/nonexistent"
        sys.argv = ["trainer", *map(str, words)]
        from trainer.__main__ import main

        os._exit(main())
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


EDITED: list[dict[str, object]] = [
    {"processes": "two", "replicas": -1, "device": 5, "skip_list": 5},
    {"processes": 7, "replicas": "x", "device": [], "skip_list": {}},
    {"resumed": 3, "elapsed_s": "long"},
    {"resumed": [{"elapsed_s": "long"}, 5]},
    {"resumed": {"a": 1}},
]


@pytest.mark.parametrize("changes", EDITED)
def test_an_edited_environment_decides_nothing(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    """What is no option is as if it were not there, and no time of a part is no time."""
    monkeypatch.delenv("RANK", raising=False)
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    path = folder / run_folder.ENVIRONMENT_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert call(monkeypatch, "train", "--resume", folder, "--set", "train.epochs=3") == 0
    assert json.loads((folder / "result.json").read_text())["exit_reason"] == "finished"
    assert json.loads(path.read_text())["resumed"][-1]["step"] == LAST


def test_a_run_that_is_moved_away_meanwhile(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is left at its old place is no run: nobody is told to go on with it, and the exit code is not 0 or 3."""
    monkeypatch.delenv("RANK", raising=False)
    train = Trainer.train

    def moved(self: Trainer) -> object:
        result = train(self)
        (tmp_path / "run").rename(tmp_path / "moved")
        return result

    monkeypatch.setattr(Trainer, "train", moved)
    assert call(monkeypatch, "train", *RECIPE, "--data", tiny_data, "--run", tmp_path / "run") == 2
    said = capsys.readouterr()
    assert "was moved or removed while it was trained" in said.err
    assert "finished at" not in said.out and "go on with" not in said.out
    assert not (tmp_path / "run").exists()
