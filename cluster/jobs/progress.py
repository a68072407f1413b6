"""Reads the progress lines that the project's commands print: done / total, rate, time left."""

import re
from dataclasses import dataclass

_DONE = re.compile(r"(?<![\d./])(?P<done>\d[\d,]*)\s?/\s?(?P<total>\d[\d,]*)(?![\d/.])")
_RATE = re.compile(r"(?P<rate>\d[\d,]*(?:\.\d+)?) images/s")
_LEFT = re.compile(r"(?P<left>[\d:.]+ ?(?:s|min|h)?) left|ETA (?P<eta>[\d:.]+ ?(?:s|min|h)?)")


@dataclass(frozen=True)
class Progress:
    """What one line tells.

    Attributes:
        done: finished units (pictures, steps, ...).
        total: all units.
        images_per_s: rate, None if the line does not say.
        left: time left as printed, "" if the line does not say.
    """

    done: int
    total: int
    images_per_s: float | None
    left: str


def parse(line: str) -> Progress | None:
    """The progress that a log line tells, or None if it tells none (it must have done / total)."""
    done = _DONE.search(line)
    if not done:
        return None
    rate, left = _RATE.search(line), _LEFT.search(line)
    return Progress(
        done=_number(done["done"]),
        total=_number(done["total"]),
        images_per_s=float(rate["rate"].replace(",", "")) if rate else None,
        left=(left["left"] or left["eta"]).strip() if left else "",
    )


def latest(log: str) -> Progress | None:
    """The last progress in a log; a line that tells the rate goes before one that tells only how much is done."""
    found = [progress for progress in map(parse, log.splitlines()) if progress]
    with_rate = [progress for progress in found if progress.images_per_s is not None]
    best = with_rate or found
    return best[-1] if best else None


def _number(text: str) -> int:
    return int(text.replace(",", ""))
