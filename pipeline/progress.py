"""How far a command is: a bar on a terminal, else one plain line every few seconds, on stderr; nothing where quiet."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from twotower import verbosity

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_EVERY_S = 5.0


class ProgressLine:
    """Counts what is done, and shows it.

    Args:
        total: how many in all.
        done: how many were there already; they do not count for the rate.
        verb: what happens to them.
        unit: what is counted.
    """

    def __init__(self, total: int, done: int = 0, verb: str = "prepared", unit: str = "images") -> None:
        self.done = self._start_done = done
        self._total, self._verb, self._unit = total, verb, unit
        self._rate_unit = "images" if unit == "images" else unit
        self._start_s = self._last_line_s = time.monotonic()
        self._quiet = verbosity.is_quiet()
        self._bar = _make_bar() if sys.stderr.isatty() and not self._quiet else None
        if self._bar:
            self._task = self._bar.add_task(verb, total=total, completed=done, rate="")

    def __enter__(self) -> "ProgressLine":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Adds what was finished."""
        self.done += count
        if self._bar:
            self._bar.update(self._task, completed=self.done, rate=f"{self.rate():,.0f} {self._rate_unit}/s")
        self.tick()

    def tick(self) -> None:
        """Prints the plain line when it is time to; to be called at least every second."""
        now = time.monotonic()
        if self._bar or self._quiet or now - self._last_line_s < LINE_EVERY_S:
            return
        self._last_line_s = now
        rate = self.rate()
        left = f"{(self._total - self.done) / rate:,.0f} s left" if rate else "time left unknown yet"
        counted = f"{self._verb} {self.done:,} / {self._total:,} {self._unit}"
        print(f"{counted}, {rate:,.0f} {self._rate_unit}/s, {left}", file=sys.stderr, flush=True)

    def rate(self) -> float:
        """How many a second since the start of this run."""
        return (self.done - self._start_done) / max(time.monotonic() - self._start_s, 1e-9)


def _make_bar() -> "Progress":
    from rich import progress  # only where there is a terminal
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
