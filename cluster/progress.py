"""Reads the progress lines that the project's commands print: stage, done / total, rate, time left."""

import re
from dataclasses import dataclass

_DONE = re.compile(r"(?P<done>\d[\d,]*)\s*(?:/|of)\s*(?P<total>\d[\d,]*)\s*(?P<unit>[a-z]+)?")
_RATE = re.compile(r"(?P<rate>\d[\d,]*(?:\.\d+)?)\s*(?:images|pictures|img)/s")
_LEFT = re.compile(r"(?P<left>[\d:.]+\s*(?:s|min|h)?)\s+left|(?:left|ETA)\s+(?P<eta>[\d:.]+\s*(?:s|min|h)?)")
_STAGE = re.compile(r"^\W*(?P<stage>[A-Za-z][\w -]{0,30}?)(?::|\s+\d)")


@dataclass(frozen=True)
class Progress:
    """What one line tells.

    Attributes:
        stage: what is being done, such as prepare or train.
        done: finished units (shards, steps, ...), None if the line does not say.
        total: all units.
        images_per_s: rate, None if the line does not say.
        left: time left as printed, "" if the line does not say.
    """

    stage: str
    done: int | None
    total: int | None
    images_per_s: float | None
    left: str


def parse(line: str) -> Progress | None:
    """The progress that a log line tells, or None if it tells none (it must have done / total)."""
    done = _DONE.search(line)
    if not done:
        return None
    stage, rate, left = _STAGE.search(line), _RATE.search(line), _LEFT.search(line)
    return Progress(
        stage=stage["stage"].strip() if stage else "",
        done=_number(done["done"]),
        total=_number(done["total"]),
        images_per_s=float(rate["rate"].replace(",", "")) if rate else None,
        left=(left["left"] or left["eta"]).strip() if left else "",
    )


def latest(log: str) -> Progress | None:
    """The last progress in a log."""
    found = (parse(line) for line in reversed(log.splitlines()))
    return next((progress for progress in found if progress), None)


def _number(text: str) -> int:
    return int(text.replace(",", ""))
