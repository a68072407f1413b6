"""SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal): each asks a command to stop.

Before a run's first step, and in every command that does not train, a stop comes at once (:class:`Stopped`). While
steps are made it is only noted (:class:`StopRequest`): the step is finished and saved. SIGHUP stays ignored where it
was so from the start, under ``nohup``.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_finished = False
_raised: str | None = None
_abruptly = False
Handler = Callable[[int, FrameType | None], object]


class Stopped(BaseException):
    """A signal asked this command to end; no Exception, so that nothing takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name, self.status = signal.Signals(number).name, 128 + number


class StopRequest:
    """Whether a signal has asked this process to stop.

    Attributes:
        name: of the first signal that did; None before. More signals change nothing: the step takes what it takes.
    """

    def __init__(self) -> None:
        self.name = _raised  # a library may have swallowed the exception

    def note(self, number: int, _frame: FrameType | None = None) -> None:
        """Signal handler."""
        self.name = self.name or signal.Signals(number).name


def raise_on_stop() -> None:
    """From now on a stop raises :class:`Stopped`; a signal that was held back since this process started comes now."""
    global _finished, _raised
    _finished, _raised = False, None
    _set(_raise)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def finish() -> None:
    """From now on a stop changes nothing: all is done and told."""
    global _finished
    _finished = True


def ignore_stops() -> None:
    """The same until this process is gone, while Python takes itself down."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_abruptly() -> None:
    """From now on :func:`leave` runs no more of what Python and libraries do at their end: something there hangs."""
    global _abruptly
    _abruptly = True


def leave(status: int) -> int:
    """The last thing that a command does; returns the status unless the process must end here."""
    if not _abruptly:
        return status
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Inside, a stop calls ``handler``."""
    before = _set(handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Inside, stops wait, here and in processes that are started; there until :func:`raise_on_stop`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set(handler: Handler) -> dict[int, Any]:
    """Handles stops; returns the handlers before."""
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [number for number in SIGNALS if not (nohup and number == signal.SIGHUP)]
    return {number: signal.signal(number, handler) for number in numbers}


def _raise(number: int, _frame: FrameType | None) -> None:
    global _raised
    if _finished:
        return
    _raised = signal.Signals(number).name
    for each in SIGNALS:  # more of them must not interrupt what is being tidied up
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)
