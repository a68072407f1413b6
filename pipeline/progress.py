"""How far a run is: a bar on a terminal, else one plain line every few seconds, on stderr."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 5.0


class ProgressLine:
    """Counts pictures.

    Args:
        total: pictures in all.
        done: pictures that were there already; they do not count for the rate.
        verb: what happens to them.
        unit: what is counted.
    """

    def __init__(self, total: int, done: int = 0, verb: str = "prepared", unit: str = "pictures") -> None:
        self._unit = unit
        self._rate_unit = "images" if unit == "pictures" else unit
        self._verb = verb
        self._total = total
        self._start_done = self._done = done
        self._start_s = self._last_line_s = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
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

    def advance(self, pictures: int) -> None:
        """Adds finished pictures."""
        self._done += pictures
        if self._bar:
            self._bar.update(self._task, completed=self._done, rate=f"{self.rate():,.0f} {self._rate_unit}/s")
        self.tick()

    def tick(self) -> None:
        """Prints the plain line when it is time to; to be called at least every second."""
        now = time.monotonic()
        if self._bar is None and now - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = now
            rate = self.rate()
            left = f"{(self._total - self._done) / rate:,.0f} s left" if rate else "time left unknown yet"
            print(
                f"{self._verb} {self._done:,} / {self._total:,} {self._unit}, {rate:,.0f} {self._rate_unit}/s, {left}",
                file=sys.stderr,
                flush=True,
            )

    @property
    def done(self) -> int:
        """Pictures that are finished, those that were there already included."""
        return self._done

    def rate(self) -> float:
        """Pictures a second since the start of this run."""
        return (self._done - self._start_done) / max(time.monotonic() - self._start_s, 1e-9)
