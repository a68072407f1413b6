"""A list of any length as HTML: some entries a file, so that neither a browser nor this program holds all images."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from pipeline.manifest import write_atomic
from trainer.errors import RunError

PER_PAGE = 200  # entries; an image takes some ten kilobytes
Entry = TypeVar("Entry")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a page stands among the others.

    Attributes:
        number: 1 is the first.
        first, last: numbers of its entries, from 1.
        before, after: names of the files beside it; empty where there is none.
    """

    number: int
    first: int
    last: int
    before: str
    after: str


class Pages(Generic[Entry]):
    """Takes entries one by one, and writes a page whenever there are enough; the first page last.

    Args:
        path: of the first page; the others are PATH-2.html and so on, beside it.
        draw: entries and place to a page's text.
    """

    def __init__(self, path: Path, draw: Callable[[Sequence[Entry], Place], str]) -> None:
        self._path, self._draw = path, draw
        self._waiting: list[Entry] = []
        self._number = 1
        self._first_page = ""

    def add(self, entry: Entry) -> None:
        """Takes the next entry.

        Raises:
            RunError: a file cannot be written.
        """
        if len(self._waiting) == PER_PAGE:
            self._write(more=True)
        self._waiting.append(entry)

    def close(self) -> None:
        """Writes what is left.

        Raises:
            RunError: a file cannot be written.
        """
        self._write(more=False)
        self._save(1, self._first_page)

    def _write(self, *, more: bool) -> None:
        number = self._number
        first = PER_PAGE * (number - 1) + 1
        before = self._file(number - 1).name if number > 1 else ""
        place = Place(
            number, first, first + len(self._waiting) - 1, before, self._file(number + 1).name if more else ""
        )
        text = self._draw(self._waiting, place)
        if number == 1:
            self._first_page = text
        else:
            self._save(number, text)
        self._waiting, self._number = [], number + 1

    def _file(self, number: int) -> Path:
        return self._path if number == 1 else self._path.with_stem(f"{self._path.stem}-{number}")

    def _save(self, number: int, text: str) -> None:
        path = self._file(number)
        try:
            write_atomic(path, text.encode(errors="replace"))
        except OSError as error:
            raise RunError(f"--html {path} cannot be written: {error.strerror}") from None
