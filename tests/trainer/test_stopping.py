"""What a signal does: stop at once before the first step, and after a step while there are steps."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.helpers.training_commands import ROOT
from trainer import __main__, stopping


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As before the test."""
    for name, value in (("_raised", None), ("_finished", False)):
        monkeypatch.setattr(stopping, name, value)
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_before_the_first_step(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the signal, 128 + its number; a command that does not train says what it leaves."""
    left = {"train": "before the first step; nothing was lost", "report": ": nothing half-done is left"}
    for name, words in left.items():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stopping.raise_on_stop()
        monkeypatch.setitem(__main__.HANDLERS, name, lambda arguments: signal.raise_signal(number))
        monkeypatch.setattr(sys, "argv", ["trainer", name, "--run", "x"])
        assert __main__.main() == 128 + number
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert told.startswith(f"stopped by {number.name}")
        assert words in told


def test_while_there_are_steps() -> None:
    """Noted, the first one by name; more change nothing."""
    stop = stopping.StopRequest()
    with stopping.handled_by(stop.note):
        assert stop.name is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGHUP)
    assert stop.name == "SIGTERM"


def test_a_library_that_swallows_the_exception() -> None:
    """The run stops at its first step."""
    stopping.raise_on_stop()
    with contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)
    assert stopping.StopRequest().name == "SIGTERM"


def test_nohup() -> None:
    """A SIGHUP that is ignored from the start stays so; the other signals still stop."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = stopping.StopRequest()
    stopping.raise_on_stop()
    with stopping.handled_by(stop.note):
        signal.raise_signal(signal.SIGHUP)
        assert stop.name is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.name == "SIGTERM"
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_second_signal_does_not_disturb_what_the_first_one_tidies_up() -> None:
    stopping.raise_on_stop()
    with pytest.raises(stopping.Stopped) as stop:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)
    assert stop.value.status == 130


def test_after_the_last_word() -> None:
    stopping.raise_on_stop()
    stopping.finish()
    for number in stopping.SIGNALS:
        signal.raise_signal(number)


def test_a_signal_that_is_held_back_reaches_a_process_when_it_is_ready() -> None:
    """A tower that has not yet come to its first line must neither die without a word nor miss it."""
    program = (
        "import os, signal, sys; os.kill(os.getpid(), signal.SIGTERM); from trainer import stopping\n"
        "try: stopping.raise_on_stop()\n"
        "except stopping.Stopped as stop: sys.exit(stop.status)"
    )
    with stopping.held_back():
        child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    assert child.wait(60) == 143
