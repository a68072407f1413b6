"""What ends a command from outside, on real processes: each is held where it is wanted, none is timed."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.__main__ import COMMANDS
from tests.helpers.preparing import ROOT, environment, listen_to_signals

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ARGUMENTS = {
    "prepare": ("--source", "digits", "--output", "out"),
    "verify": ("data",),
    "status": ("data",),
    "inspect": ("data",),
    "statistics": ("data",),
    "reindex": ("data",),
    "bench": ("--data", "data"),
}
SCRIPT = """
import ctypes, os, signal, subprocess, sys, time
from pipeline import signals
signals.listen()
def command():
{body}
sys.exit(signals.supervise(command))
"""


def start(words: list[str], **options: object) -> subprocess.Popen[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": listen_to_signals} | options
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, **options)  # type: ignore[call-overload]


def start_script(body: str, **options: object) -> subprocess.Popen[str]:
    """A command of these lines under :func:`pipeline.signals.supervise`."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return start(["-c", SCRIPT.format(body=lines)], **options)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s, "nothing happened"
        time.sleep(0.01)


def assert_stopped(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """128 + the signal's number, and one line that names it."""
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith(f"stopped by {number.name}: "), stderr


@pytest.mark.parametrize(
    ("command", "number"),
    [(command, SIGNALS[place % 3]) for place, command in enumerate(COMMANDS)],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_command_stops_in_one_line(command: str, number: signal.Signals, tmp_path: Path) -> None:
    marker = tmp_path / "held"
    words = ["-m", "pipeline", command, *ARGUMENTS[command]]
    process = start(words, env=environment(f"hold-command:{marker}"))
    wait_for(marker.exists, process)
    process.send_signal(number)
    assert_stopped(process, number)


@pytest.mark.parametrize("number", SIGNALS)
def test_imports_that_swallow_every_exception_are_stopped(number: signal.Signals, tmp_path: Path) -> None:
    """A module that is held while it is imported, by code that lets no exception out."""
    marker = tmp_path / "held"
    (tmp_path / "argparse.py").write_text(
        f"import time\nopen({str(marker)!r}, 'w').close()\n"
        "while True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass\n"
    )
    process = start(["-m", "pipeline", "--help"], env=environment() | {"PYTHONPATH": str(tmp_path)})
    wait_for(marker.exists, process)
    process.send_signal(number)
    assert_stopped(process, number)


TREE = """
subprocess.Popen(["setsid", "sh", "-c", "trap '' TERM INT HUP; sleep 1000 & echo $$ $!; wait"], stderr=2)
ctypes.CDLL(None).pause()  # C code, to which no exception comes
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_no_process_is_left(number: signal.Signals) -> None:
    """Children of children too, in a session of their own, deaf to signals; while the command is in C code."""
    process = start_script(TREE)
    assert process.stdout
    pids = [int(word) for word in process.stdout.readline().split()]
    process.send_signal(number)
    assert_stopped(process, number)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_second_ctrl_c_changes_nothing(tmp_path: Path) -> None:
    """The first one is held at its end: the wait for children that cannot be killed."""
    marker = tmp_path / "stopping"
    body = f"""
def hold():
    open({str(marker)!r}, "w").close()
    sys.stdin.readline()
signals.end_children = hold
print("ready", flush=True)
time.sleep(1000)
"""
    process = start_script(body, stdin=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    wait_for(marker.exists, process)
    for number in SIGNALS:
        process.send_signal(number)
    stdout, stderr = process.communicate("go on\n", timeout=60)
    assert (process.returncode, stdout, len(stderr.splitlines())) == (130, "", 1), stderr


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_the_shell_ignores_stays_ignored(number: signal.Signals) -> None:
    """As under nohup, or in the background of a script."""

    def ignore() -> None:
        signal.signal(number, signal.SIG_IGN)

    process = start_script("print('ready', flush=True)\nreturn len(sys.stdin.readline())", stdin=-1, preexec_fn=ignore)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.communicate("four\n", timeout=60)
    assert process.returncode == 5


def test_a_terminal_that_closes_is_a_hang_up() -> None:
    process = start_script(
        "print('ready', flush=True)\ntime.sleep(1000)", **on_terminal(master_and_slave := pty.openpty())
    )
    master, slave = master_and_slave
    os.close(slave)
    assert os.read(master, 100).startswith(b"ready")
    os.close(master)
    assert process.wait(60) == 129


def on_terminal(ends: tuple[int, int]) -> dict[str, object]:
    """Options of a process whose controlling terminal this is."""

    def take() -> None:
        os.setsid()
        os.close(os.open(os.ttyname(ends[1]), os.O_RDWR))  # the first terminal of a session becomes its own
        listen_to_signals()

    return dict.fromkeys(("stdin", "stdout", "stderr"), ends[1]) | {"preexec_fn": take}


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_who_has_gone_costs_lines_not_work(stream: str, tmp_path: Path) -> None:
    """``| head``: the work is done to its end, and the status is the work's."""
    body = f"""
sys.stdin.readline()
for number in range(10000):
    print("line", number, file=sys.{stream})
open({str(tmp_path / "done")!r}, "w").close()
return 3
"""
    process = start_script(body, stdin=subprocess.PIPE)
    getattr(process, stream).close()
    setattr(process, stream, None)
    stdout, stderr = process.communicate("go on\n", timeout=60)
    assert (process.returncode, stdout or stderr or "") == (3, ""), stderr
    assert (tmp_path / "done").exists()


def test_streams_that_are_missing_are_not_replaced_by_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    body = f"""
with open({str(path)!r}, "w") as file:
    print("to the reader who is not there")
    print("nor here", file=sys.stderr)
    os.system("echo nor by a child; echo error >&2")
    file.write("ours")
"""
    process = start_script(body + "return 0", preexec_fn=lambda: os.closerange(0, 3), stdout=None, stderr=None)
    assert process.wait(60) == 0
    assert path.read_text() == "ours"


def test_a_full_disk_under_stdout_is_told_after_the_work(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = start_script(f"print('lost')\nopen({str(tmp_path / 'done')!r}, 'w')\nreturn 0", stdout=full)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (tmp_path / "done").exists()
    assert stderr.startswith("error: the output cannot be written (No space left on device)")
    assert len(stderr.splitlines()) == 1


def test_what_takes_too_long_in_c_code_is_one_line() -> None:
    body = 'with signals.quiet(), signals.time_limit(0.01, "too slow"):\n    ctypes.CDLL(None).pause()'
    process = start_script(body)
    assert process.communicate(timeout=60) == ("", "error: too slow\n")
    assert process.returncode == 2


def test_a_command_that_ends_in_time_goes_on() -> None:
    body = """
with signals.quiet(), signals.time_limit(600, "too slow"):
    os.write(2, b"not seen")
os.write(2, b"seen")
return 0
"""
    process = start_script(body)
    assert process.communicate(timeout=60) == ("", "seen")
    assert process.returncode == 0


def test_a_bug_keeps_its_traceback() -> None:
    process = start_script("raise KeyError('ours')")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.splitlines()[-1] == "KeyError: 'ours'"
