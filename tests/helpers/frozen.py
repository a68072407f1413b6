"""Processes held at a point of their work, so that no test depends on how fast a machine is."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

POLL_S = 0.01  # what is waited for may be over soon: short, and without starting a process


@contextlib.contextmanager
def first_in_line() -> Iterator[None]:
    """Inside, whoever looks for a state that is soon over gets the processor before those who might end it."""
    before = os.getpriority(os.PRIO_PROCESS, 0)  # of this thread alone, as Linux has it
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def hold(find: Callable[[], list[int]], what: str, timeout_s: float = 300.0) -> list[int]:
    """Stops the processes that ``find`` gives as soon as it gives some; it must still give them once they are stopped.

    Args:
        find: the process ids, or none yet; it is asked often, so it must be cheap.
        what: for the message after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    with first_in_line():
        while True:
            begun = time.monotonic()
            found = find()
            signal_all(found, signal.SIGSTOP)
            if found and find() == found:
                return found
            signal_all(found, signal.SIGCONT)
            assert time.monotonic() < deadline, f"waited {timeout_s} s for: {what}"
            time.sleep(max(POLL_S, 3 * (time.monotonic() - begun)))  # the others must go on meanwhile


def release(pids: Iterable[int]) -> None:
    """Lets held processes go on; those that are gone are none of its business."""
    signal_all(pids, signal.SIGCONT)


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def has_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a held process has been sent this signal, which waits for it to go on."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return any(int(fields[name], 16) >> (number - 1) & 1 for name in ("SigPnd", "ShdPnd"))
