"""Whatever becomes of who reads our output: the command goes on, and nothing is written where it should not be."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.training_commands import CONFIG, ROOT, command
from trainer import __main__
from twotower import terminal

WRITES = """
import sys
from twotower import terminal
terminal.protect()
terminal.warn_of_loss("it goes on")
for number in range(3):
    print("x" * 70000, flush=True)
print("last", end="")
lost = terminal.lost_output()
print("lost:", lost and lost.strerror, file=sys.stderr)
"""


def start(program: str, **more: object) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", program]
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload]


def test_a_reader_that_goes_away() -> None:
    """As ``| head``: said once, on stderr; no traceback, also not when Python flushes at its end."""
    process = start(WRITES, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert told == "warning: stdout cannot be written (Broken pipe): it goes on\nlost: Broken pipe\n"


def test_a_disk_that_is_full_under_stdout() -> None:
    with Path("/dev/full").open("w") as full:
        process = start(WRITES, stdout=full)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert "stdout cannot be written (No space left on device)" in told


def test_a_terminal_that_is_closed() -> None:
    """Without a SIGHUP, as under setsid: writing is an input/output error."""
    ours, theirs = os.openpty()
    process = start(WRITES, stdout=theirs, start_new_session=True)
    os.close(theirs)
    os.read(ours, 100)
    os.close(ours)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert "stdout cannot be written (Input/output error)" in told


def test_a_reader_that_is_slow_and_does_not_block() -> None:
    """A pipe that another program made non-blocking: everything arrives."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    process = start(WRITES, stdout=theirs)
    os.close(theirs)
    with os.fdopen(ours) as reader:
        assert len(reader.read()) == 3 * 70001 + len("last")
    assert process.communicate(timeout=60)[1] == "lost: None\n"
    assert process.returncode == 0


def test_descriptors_that_were_closed_from_the_start(tmp_path: Path) -> None:
    """``>&- 2>&-``: a file that is opened afterwards must not get what is printed."""
    program = (
        "import os; from twotower import terminal; terminal.protect()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print('to nobody', flush=True); os.write(1, b'nor this')\n"
        "file.write(str(file.fileno()))"
    )
    words = ["bash", "-c", 'exec "$0" -c "$1" >&- 2>&- <&-', sys.executable, program]
    assert subprocess.run(words, cwd=ROOT, check=False).returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


def test_letters_that_the_terminal_lacks() -> None:
    """Class names in a locale of ASCII: a number instead of an error."""
    program = "from twotower import terminal; terminal.protect(); print('M\\u00fcller')"
    process = start(program, stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    output, told = process.communicate(timeout=60)
    assert (output, told) == ("M\\xfcller\n", "")


@pytest.mark.parametrize(
    ("number", "status"), [(errno.EPIPE, 0), (errno.EIO, 0), (errno.ENOSPC, 2)], ids=["head", "terminal", "disk"]
)
def test_lost_output_of_a_command_that_answers(
    number: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """head has seen enough; a full disk loses what somebody wanted."""
    monkeypatch.setattr(terminal, "lost_output", lambda: OSError(number, os.strerror(number)))
    monkeypatch.setattr(sys, "argv", ["trainer", "describe", "--config", str(CONFIG)])
    assert __main__.main() == status
    assert ("error: the output cannot be written (No space" in capsys.readouterr().err) == (status == 2)


def test_a_real_command_into_head() -> None:
    """One line of many; the exit code is that of the work, and stderr is empty."""
    words = command("trainer", "describe", "--config", CONFIG)
    line = "set -o pipefail; " + " ".join(words) + " | head -1"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, len(done.stdout.splitlines()), done.stderr) == (0, 1, "")
