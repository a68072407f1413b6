"""``metrics.jsonl`` as it is read: row by row, so that half a million steps take no more memory than ten."""

import errno
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.training.run_files import is_row
from twotower.untrusted import open_regular, parse_json

NAME = "metrics.jsonl"
MOST_BYTES = 1 << 33  # 90 epochs of ImageNet in batches of 128 are 0.3 GB
MOST_LINE_BYTES = 1 << 20
TAIL_BYTES = 1 << 18  # some hundred rows
MOST_KEPT = 8192  # values of a :class:`Thinned`


def iterate_rows(run: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every whole row of metrics.jsonl, and the byte behind it; none where there is no such file.

    A line that is damaged, was cut by a crash, or is of a stranger's making is passed over.

    Raises:
        OSError: it cannot be read, is a link, or larger than any run's.
    """
    path = run / NAME
    if not os.path.lexists(path):
        return
    end, is_begin = 0, True
    with open_regular(path, follow=False) as handle, os.fdopen(os.dup(handle), "rb") as file:
        if os.fstat(handle).st_size > MOST_BYTES:
            raise OSError(errno.EFBIG, f"is larger than {MOST_BYTES:,} bytes", os.fspath(path))
        while line := file.readline(MOST_LINE_BYTES):
            end += len(line)
            row = _parsed(line) if is_begin else None  # the rest of a line that is too long
            is_begin = line.endswith(b"\n")
            if row is not None:
                yield end, row


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All whole rows at once; see :func:`iterate_rows`."""
    return [row for _, row in iterate_rows(run)]


def last_rows(run: Path) -> list[dict[str, Any]]:
    """The whole rows in the last part of metrics.jsonl; an empty list where there is none.

    Raises:
        OSError: as :func:`iterate_rows`.
    """
    path = run / NAME
    if not os.path.lexists(path):
        return []
    with open_regular(path, follow=False) as handle:
        begin = max(0, os.fstat(handle).st_size - TAIL_BYTES)
        found = map(_parsed, os.pread(handle, TAIL_BYTES, begin).splitlines())  # the first line may be cut: no row
        return [row for row in found if row is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A row; None for what is none."""
    try:
        row = parse_json(line, nan=True)
    except ValueError:
        return None
    return row if is_row(row) else None


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
