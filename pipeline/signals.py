"""What ends a command from outside: SIGTERM, Ctrl-C, a hang-up; and a reader of its output who has gone.

A signal ends the process where it stands: one line, no process of ours left, status 128 + N. Nothing is unwound, since
everything on disk is written so that a kill at any moment leaves what the same command continues. An exception that a
handler raises would not do: Ray's wait turns it into a SystemError, an import may swallow it, and C code that runs
leaves no place to raise it. So the command runs in a thread, and the main thread only waits, for it and for signals:
Python runs handlers in the main thread alone, and Ray, which would set its own, does so there alone.

A reader who has gone (``| head``, a closed terminal that sends no signal) costs the lines that nobody reads, never the
work: the command goes on, and its status says how the work ended. So does a full disk under ``> FILE``, but that is
said at the end, with status 2.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from twotower import terminal

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LINE = "stopped by {}: nothing half-done is left under a final name; run the same command again to go on"
SHOW_CURSOR = "\x1b[?25h"  # a bar hides it
KILL_S = 5.0  # until the system has ended killed processes; only a file system that hangs takes as long
PR_SET_CHILD_SUBREAPER = 36
_line_stream = 2


def listen() -> None:
    """From now on a signal ends this process; one that it was started to ignore (``nohup``, ``&``) stays ignored."""
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def supervise(command: Callable[[], int]) -> int:
    """Runs a command in a thread while the main thread waits for signals.

    Returns:
        The command's exit status. What it raises, this raises.
    """
    statuses: list[int] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            statuses.append(command())
        except BaseException as error:  # SystemExit of argparse too
            errors.append(error)

    terminal.protect()
    thread = threading.Thread(target=work, name="command", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1.0)
    for number in STOPS:  # the command has ended: what the interpreter still tidies up does not change its status
        signal.signal(number, signal.SIG_IGN)
    if errors:
        raise errors[0]
    return terminal.delivered(statuses[0])


temporary: set[Path] = set()  # folders that nobody else removes if this process ends where it stands


@contextlib.contextmanager
def time_limit(seconds: float, line: str) -> Iterator[None]:
    """Ends the process with ``error: LINE`` and status 2 if what is inside takes longer: it may hang in C code."""
    timer = threading.Timer(seconds, end, (f"error: {line}", 2))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What is written to stderr inside is not seen, by C code and new processes either; a line of :func:`end` is."""
    global _line_stream
    _line_stream, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(_line_stream, 2)
        os.close(_line_stream)
        _line_stream = 2


def end(line: str, status: int) -> None:
    """Ends this process where it stands, and all that it has started, with one line on stderr."""
    try:
        cursor = SHOW_CURSOR if os.isatty(_line_stream) else ""
        os.write(_line_stream, f"{cursor}{line}\n".encode())
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # what the command says of the end of its processes is of no use now
            os.dup2(nowhere, stream)
    except OSError:
        pass  # nobody reads it
    end_children()
    for folder in tuple(temporary):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(status)


def end_children() -> None:
    """Kills every process that this one has started, and theirs, and waits until they are gone."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become ours, so none gets away
    deadline_s = time.monotonic() + KILL_S
    while time.monotonic() < deadline_s:
        for pid in _descendants():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return  # none is left
        time.sleep(0.005)


def _stop(number: int, _frame: FrameType | None) -> None:
    for other in STOPS:  # a second Ctrl-C changes nothing, and nothing takes long
        signal.signal(other, signal.SIG_IGN)
    end(LINE.format(signal.Signals(number).name), 128 + number)


def _descendants() -> list[int]:
    """Process ids of all children, their children and so on."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]
