"""Progress of a job: reads it from the lines that the project's commands print, and shows it as a bar on a terminal.

The bar is drawn by hand because a log is bytes that come in pieces: rich draws text, in whole lines.
"""

import re
from dataclasses import dataclass
from typing import BinaryIO

_DONE = re.compile(r"(?<![\d./])(?P<done>\d[\d,]*)\s?/\s?(?P<total>\d[\d,]*)(?![\d/.])")
_RATE = re.compile(r"(?P<rate>\d[\d,]*(?:\.\d+)?) images/s")
_LEFT = re.compile(r"(?P<left>[\d:.]+ ?(?:s|min|h)?) left|ETA (?P<eta>[\d:.]+ ?(?:s|min|h)?)")
BAR_WIDTH = 30
CLEAR_LINE = b"\r\x1b[K"


@dataclass(frozen=True)
class Progress:
    """What one line tells.

    Attributes:
        done: finished units (images, steps, ...).
        total: all units.
        images_per_s: rate, None if the line does not say.
        left: time left as printed, "" if the line does not say.
    """

    done: int
    total: int
    images_per_s: float | None
    left: str

    def bar(self) -> str:
        """One line such as `[#####-----]  50 %  120/240  48 images/s  33 s left`."""
        share = min(1.0, self.done / self.total) if self.total else 0.0
        filled = round(share * BAR_WIDTH)
        words = [f"[{'#' * filled}{'-' * (BAR_WIDTH - filled)}]", f"{share:4.0%}", f"{self.done:,}/{self.total:,}"]
        if self.images_per_s is not None:
            words.append(f"{self.images_per_s:,.0f} images/s")
        if self.left:
            words.append(f"{self.left} left")
        return "  ".join(words)


def parse(line: str) -> Progress | None:
    """The progress that a log line tells, or None: it must have done / total."""
    done = _DONE.search(line)
    if not done:
        return None
    rate, left = _RATE.search(line), _LEFT.search(line)
    return Progress(
        done=int(done["done"].replace(",", "")),
        total=int(done["total"].replace(",", "")),
        images_per_s=float(rate["rate"].replace(",", "")) if rate else None,
        left=(left["left"] or left["eta"]).strip() if left else "",
    )


def latest(log: str) -> Progress | None:
    """The last progress in a log; a line that tells the rate goes before one that tells only how much is done."""
    found = [progress for progress in map(parse, log.splitlines()) if progress]
    with_rate = [progress for progress in found if progress.images_per_s is not None]
    best = with_rate or found
    return best[-1] if best else None


class BarStream:
    """A stream for a log's bytes: lines of progress become one bar at the bottom, all others pass.

    Args:
        terminal: where to write; it must understand ANSI codes.
    """

    def __init__(self, terminal: BinaryIO) -> None:
        self._terminal = terminal
        self._partial = b""  # a line whose end has not come yet
        self._bar = b""

    def write(self, data: bytes) -> int:
        """Take bytes; a line is shown once it is complete."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            progress = parse(line.decode(errors="replace"))
            if progress and progress.images_per_s is not None:
                self._bar = progress.bar().encode()
            else:
                self._terminal.write((CLEAR_LINE if self._bar else b"") + line + b"\n")
        if lines and self._bar:
            self._terminal.write(CLEAR_LINE + self._bar)
        return len(data)

    def flush(self) -> None:
        """Flush the terminal."""
        self._terminal.flush()

    def close(self) -> None:
        """Show what is left of an unfinished line, and leave the bar as it is."""
        if self._partial:
            self._terminal.write((CLEAR_LINE if self._bar else b"") + self._partial + b"\n")
        elif self._bar:
            self._terminal.write(b"\n")
        self._partial = self._bar = b""
        self._terminal.flush()
