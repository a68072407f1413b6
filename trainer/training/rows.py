"""``metrics.jsonl`` as it is read: row by row, so that half a million steps take no more memory than ten."""

import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "metrics.jsonl"
TAIL_BYTES = 1 << 18  # some hundred rows
MOST_KEPT = 8192  # values of a :class:`Thinned`


def iterate_rows(run: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every whole row of metrics.jsonl, and the byte behind it; none where there is no such file.

    A line that is damaged, or was cut by a crash, is passed over.
    """
    path = run / NAME
    if not path.exists():
        return
    with path.open("rb") as file:
        end = 0
        for line in file:
            end += len(line)
            row = _parsed(line)
            if row is not None:
                yield end, row


def last_rows(run: Path) -> list[dict[str, Any]]:
    """The whole rows in the last part of metrics.jsonl; an empty list where there is none."""
    path = run / NAME
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        found = map(_parsed, file.read().splitlines())  # the first line may be cut, and is then no row
        return [row for row in found if row is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A row; None for what is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int | float) else None


class Thinned:
    """A long series in bounded memory: every value, or every second, fourth, ... one, evenly spread.

    Its length is that of the whole series.
    """

    def __init__(self) -> None:
        self._kept: list[float] = []
        self._every, self._num = 1, 0

    def append(self, value: float) -> None:
        """Takes the next value."""
        if self._num % self._every == 0:
            self._kept.append(value)
        self._num += 1
        if len(self._kept) > MOST_KEPT:
            del self._kept[1::2]
            self._every *= 2

    def __len__(self) -> int:
        return self._num

    def median(self) -> float:
        """The median; 0 without a value."""
        return statistics.median(self._kept or [0.0])
