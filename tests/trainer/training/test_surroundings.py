"""Terminals that are closed, users without a name, variables that were left in a shell: real processes."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.manifest import ClassRecord, read_manifest
from tests.helpers import held
from tests.helpers.nobody import run_as_nobody
from tests.helpers.training_commands import ROOT, command, environment, train_words
from trainer.__main__ import main
from trainer.parallel.world import NEEDED, PLACES
from trainer.training.checkpoint import checkpoints, folder_of

STEPS = 11


def result_of(folder: Path) -> tuple[str, int]:
    """How a run ended, and after how many steps; its newest checkpoint is of that step."""
    result = json.loads((folder / "result.json").read_text())
    assert checkpoints(folder)[-1] == folder_of(folder, result["step"])
    return result["exit_reason"], result["step"]


def with_terminal(words: list[object], *, controlling: bool) -> tuple["subprocess.Popen[bytes]", int]:
    """Starts a command whose output is a terminal; also the end of it that can be closed."""
    ours, theirs = os.openpty()

    def take() -> None:
        if controlling:
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command(*words),
        cwd=ROOT,
        env=environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=take,
    )
    os.close(theirs)
    return process, ours


@pytest.mark.slow
@pytest.mark.parametrize(
    ("controlling", "code", "expected"),
    [(True, 3, ("stopped", 7)), (False, 0, ("finished", STEPS))],
    ids=["a terminal of one's own", "under setsid"],
)
def test_a_terminal_that_is_closed(
    digits: Path, tmp_path: Path, controlling: bool, code: int, expected: tuple[str, int]
) -> None:
    """The kernel's SIGHUP saves and stops; where none comes, the run goes on, and draws its progress for nobody."""
    words = ["tests.helpers.held", "step", *train_words(digits, tmp_path / "run")[1:]]
    process, terminal = with_terminal(words, controlling=controlling)
    stopped = held.stopped_one(process)
    os.close(terminal)
    os.kill(stopped, signal.SIGCONT)
    told = process.communicate(timeout=100)[1].decode()
    assert process.returncode == code, told
    assert result_of(tmp_path / "run") == expected
    assert told == "" or "stdout cannot be written (Input/output error): training goes on" in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_nohup(digits: Path, tmp_path: Path) -> None:
    """SIGHUP changes nothing for one who asked for that; the towers inherit it."""
    words = ["tests.helpers.held", "start", *train_words(digits, tmp_path / "run", "--processes", 2)[1:]]
    ignore: Callable[[], object] = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process = subprocess.Popen(command(*words), cwd=ROOT, env=environment(), preexec_fn=ignore)
    stopped = held.stopped_one(process)
    for each in held.family(process.pid):
        os.kill(each, signal.SIGHUP)
    os.kill(stopped, signal.SIGCONT)
    assert process.wait(100) == 0
    assert result_of(tmp_path / "run") == ("finished", STEPS)


@pytest.fixture
def common(digits: Path, serial: Path) -> Iterator[Path]:
    """A folder that everybody may read, with the digits, a run, and a folder that everybody may write."""
    with tempfile.TemporaryDirectory(prefix="twotower-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(digits, folder / "digits")
        shutil.copytree(serial, folder / "serial")
        for own, mode in (("free", 0o777), ("shut", 0o755), ("spare", 0o755)):
            (folder / own).mkdir()
            (folder / own).chmod(mode)
        yield folder


@pytest.mark.slow
def test_a_user_without_a_name_or_a_home(common: Path) -> None:
    """Training and drawing work; a folder that is another's is one line, and stays as it is."""
    digits, serial, free, shut, spare = (common / name for name in ("digits", "serial", "free", "shut", "spare"))
    done = run_as_nobody(spare, *train_words(digits, free / "run", "--processes", 2))
    assert done.returncode == 0, done.stderr
    assert result_of(free / "run") == ("finished", STEPS)
    evaluate = ("trainer", "evaluate", "--run", serial, "--data", digits, "--confusion")
    done = run_as_nobody(spare, *evaluate, free / "confusion.png")
    assert (done.returncode, done.stderr) == (0, f"wrote {free / 'confusion.png'}\n"), done.stderr
    cases = [
        train_words(digits, shut / "run"),
        [*evaluate, shut / "confusion.png"],
        ["trainer", "export", "--run", serial, "--output", shut / "net.safetensors"],
    ]
    for words in cases:
        done = run_as_nobody(spare, *words)
        assert done.returncode == 2, done.stderr
        assert str(shut) in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(shut.iterdir())


def in_process(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: list[object]) -> int:
    for name in (*NEEDED, *PLACES, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    return main()


@pytest.mark.usefixtures("one_thread")
def test_rank_left_in_the_shell(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process means one; a world of one is none; RANK alone is refused by name, and leaves no folder behind."""
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    one_tower = train_words(digits, tmp_path / "one-tower", overrides=("model.towers=1",))
    for variables, words in (
        (whole, train_words(digits, tmp_path / "one", "--processes", 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, one_tower),
    ):
        assert in_process(monkeypatch, variables, words) == 0
    assert result_of(tmp_path / "one") == ("finished", STEPS)
    capsys.readouterr()
    for processes in ([], ["--processes", 2]):
        words = train_words(digits, tmp_path / "refused", *processes)
        assert in_process(monkeypatch, {"RANK": "0"}, words) == 2
        assert "RANK=0 is set, and WORLD_SIZE, MASTER_ADDR, MASTER_PORT not; unset RANK" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_a_switch_that_says_nothing(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = train_words(digits, tmp_path / "run")
    assert in_process(monkeypatch, {"TWOTOWER_KERNELS": "of"}, words) == 2
    assert capsys.readouterr().err == (
        "error: TWOTOWER_KERNELS=of: expected off, for torch operations only, or on, or unset it\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_locale_of_ascii(digits: Path, tmp_path: Path) -> None:
    """A class name that it lacks: written with its number; files keep it."""
    data = shutil.copytree(digits, tmp_path / "data")
    manifest = read_manifest(data)
    classes = (ClassRecord("zero", "Größe"), *manifest.classes[1:])
    renamed = dataclasses.replace(manifest, classes=classes)
    (data / "manifest.json").write_text(renamed.to_json(), encoding="utf-8")
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}

    def run(*words: object) -> str:
        variables = environment() | ascii_only
        done = subprocess.run(command(*words), cwd=ROOT, env=variables, capture_output=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode("ascii")

    run(*train_words(data, tmp_path / "run"))
    assert "Gr\\xf6\\xdfe" in run("trainer", "evaluate", "--run", tmp_path / "run", "--data", data, "--per-class")
    run("trainer", "report", "--run", tmp_path / "run", "--data", data)
    assert "Größe" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
