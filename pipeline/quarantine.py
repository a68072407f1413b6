"""Reads ``quarantine.jsonl``: the images that were left out or converted, a line each."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DatasetError
from pipeline.manifest import QUARANTINE_NAME, path_inside
from pipeline.record_checks import check_quarantine
from twotower.untrusted import open_regular, parse_json

MAX_LINE_BYTES = 2**20


def read_quarantine(folder: Path) -> Iterator[dict[str, str]]:
    """Yields split, source, class, action and reason of every line of a data set's list.

    Raises:
        DatasetError: it cannot be read, or a line is damaged.
    """
    path, number = path_inside(folder, QUARANTINE_NAME), 0
    try:
        with open_regular(path) as handle, open(handle, "rb", closefd=False) as file:
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                row = parse_json(line)
                check_quarantine(row)
                yield row
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): run prepare again") from None
    except (ValueError, DatasetError):
        raise DatasetError(f"{path}, line {number:,}, is damaged: run prepare again") from None
