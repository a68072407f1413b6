"""Label files for pictures that lie in no class folders: a CSV with or without header, ``NAME LABEL`` lines, tables.

Tiny-ImageNet's ``val_annotations.txt`` and Kaggle's ``LOC_val_solution.csv`` are such files as they come.
"""

import bisect
import csv
import dataclasses
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pipeline.errors import SourceError
from pipeline.files import AnyPath, read_whole
from pipeline.pictures import has_picture_name
from pipeline.sources.listing import nfc, printable
from twotower.words import listed, one_line

DELIMITERS = "\t,;"
LABEL_HEADER = re.compile(
    r"(class|label|category|target|wnid|synset|predictionstring)s?([ _-]?(name|id))?", re.IGNORECASE
)
NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?", re.IGNORECASE)
KAGGLE_HEADER = "PredictionString"  # its cells hold the class, then boxes
EXPECTED = "expected a CSV or lines NAME LABEL"
SHOWN = 60
MOST_BYTES = 2**30  # of a label file: a million lines have a tenth of it
LAST = "\U0010ffff"  # sorts behind every name


class Row(NamedTuple):
    """A line of the file: its number, and its cells."""

    line: int
    cells: list[str]

    def cell(self, column: int) -> str:
        """One cell; empty where the line is shorter."""
        return self.cells[column] if column < len(self.cells) else ""


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels that a file gives to pictures.

    Attributes:
        label_of: path of a picture -> its label, for the pictures that have one.
        line_of: label -> the first line that gives it to a picture.
        unused: names that the file labels although there is no such picture.
    """

    label_of: dict[str, str]
    line_of: dict[str, int]
    unused: tuple[str, ...]


def read_labels(file: AnyPath, pictures: Iterable[str]) -> Labels:
    """Gives pictures their labels.

    A line names a picture by its path below the input or by the end of that, with or without extension. Which column
    holds the names is found out: that in which most cells name a picture.

    Args:
        file: the label file.
        pictures: their paths relative to the input.

    Raises:
        SourceError: the file cannot be read, is no table, labels none of the pictures, gives a picture two labels, or
            a name stands for several pictures.
    """
    if not file.is_file():
        raise SourceError(f"{file}: is no file; {EXPECTED}")
    try:
        text = read_whole(file, MOST_BYTES).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror or error}; {EXPECTED}") from None
    names = _Names(pictures)
    rows = list(_rows(file, text, names))
    name_column, label_column, rows = _columns(file, rows, names)
    labels = Labels({}, {}, ())
    unused = []
    for row in rows:
        name, label = row.cell(name_column), nfc(row.cell(label_column))
        found = names.find(name)
        if not found:
            unused.append(name)
            continue
        where = f"{file}, line {row.line}: {_shown(name)}"
        if not label:
            raise SourceError(f"{where} has no label; {EXPECTED}")
        if len(found) > 1:
            raise SourceError(
                f"{where} may be {_shown(found[0])} or {_shown(found[1])}; write the path below the input"
            )
        before = labels.label_of.setdefault(found[0], label)
        if before != label:
            raise SourceError(
                f"{where} is {_shown(label)} here and {_shown(before)} in a line before; keep one of them"
            )
        labels.line_of.setdefault(label, row.line)
    return dataclasses.replace(labels, unused=tuple(unused))


class _Names:
    """The pictures by the ways in which a line may name them.

    They are sorted by their paths read from the end, without extension: those that end alike stand side by side, and a
    million of them may have one name in as many folders.
    """

    def __init__(self, pictures: Iterable[str]) -> None:
        self._paths = list(pictures)
        self._turned = sorted((_turned(_stem(nfc(path))), number) for number, path in enumerate(self._paths))
        self._found: dict[str, list[str]] = {}

    def find(self, name: str) -> list[str]:
        """The pictures that a name may mean: by its path, by the end of it, by that without extension."""
        if name not in self._found:
            self._found[name] = self._look(nfc(name).removeprefix("./"))
        return self._found[name]

    def _look(self, name: str) -> list[str]:
        near = [self._paths[k] for k in sorted({k for end in (_stem(name), name) for k in self._near(_turned(end))})]
        ways = (
            lambda path: path == name,
            lambda path: f"/{path}".endswith(f"/{name}") or f"/{name}".endswith(f"/{path}"),
            lambda path: f"/{_stem(path)}".endswith(f"/{name}"),
        )
        return next((found for way in ways if (found := [path for path in near if way(nfc(path))])), [])

    def _near(self, turned: str) -> Iterator[int]:
        """Numbers of the pictures whose path ends so, and of those whose whole path is an end of it."""
        cuts = [place for place, sign in enumerate(turned, 1) if sign == "/"]
        for least, most in [*((turned[:cut], turned[:cut]) for cut in cuts[:-1]), (turned, turned + LAST)]:
            first = bisect.bisect_left(self._turned, (least,))
            last = bisect.bisect_right(self._turned, (most, len(self._turned)))
            yield from (number for _, number in self._turned[first:last])


def _rows(file: AnyPath, text: str, names: _Names) -> Iterator[Row]:
    delimiter = next((sign for sign in DELIMITERS if sign in text.partition("\n")[0]), None)
    if delimiter is None:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield Row(number, _words(line.strip(), names))
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield Row(reader.line_num, [cell.strip() for cell in cells])
    except csv.Error as error:
        raise SourceError(f"{file}, line {reader.line_num}: {error}; {EXPECTED}") from None


def _words(line: str, names: _Names) -> list[str]:
    """Name and label of a line without a delimiter; either may hold spaces."""
    cuts = [line.split(None, 1), line.rsplit(None, 1)]
    return next((cells for cells in cuts if names.find(cells[0])), cuts[0])


def _columns(file: AnyPath, rows: list[Row], names: _Names) -> tuple[int, int, list[Row]]:
    """Column of the names, column of the labels, and the rows without a header."""
    hits = Counter(column for row in rows for column, cell in enumerate(row.cells) if names.find(cell))
    if not hits:
        example = f", the first is {_shown(rows[0].cells[0])}" if rows else ""
        raise SourceError(f"{file}: none of its {len(rows):,} lines names a picture of the input{example}; {EXPECTED}")
    name_column = min(hits, key=lambda column: (-hits[column], column))
    header = rows[0] if _is_header(rows, name_column, 1 if name_column == 0 else 0, names) else None
    rows = rows if header is None else rows[1:]
    label_column = _label_column(file, header, rows, name_column)
    if header is not None and header.cell(label_column) == KAGGLE_HEADER:
        cut = slice(label_column, label_column + 1)
        for row in rows:
            row.cells[cut] = row.cell(label_column).split()[:1] or [""]
    return name_column, label_column, rows


def _label_column(file: AnyPath, header: Row | None, rows: list[Row], name_column: int) -> int:
    """The column whose name says so; else the only one beside the names, or the first if all others are numbers.

    Raises:
        SourceError: several may be it.
    """
    width = max((len(row.cells) for row in rows), default=0)
    others = [column for column in range(width) if column != name_column and any(row.cell(column) for row in rows)]
    named = [column for column in others if header is not None and LABEL_HEADER.fullmatch(header.cell(column))]
    if named or len(others) < 2:
        return [*named, *others, width][0]  # none: every cell of it is empty
    numbers = [column for column in others if all(NUMBER.fullmatch(row.cell(column)) for row in rows)]
    if header is None and numbers == others[1:]:
        return others[0]  # boxes follow, as in Tiny-ImageNet's val_annotations.txt
    what = listed([_shown(header.cell(column)) for column in others]) if header else f"{len(others)} columns"
    raise SourceError(f"{file}: {what}: any may be the label; keep name and label alone, or name the column label")


def _is_header(rows: list[Row], name_column: int, label_column: int, names: _Names) -> bool:
    """The first line names no picture, and says so or has a label of its own."""
    name, label = rows[0].cell(name_column), rows[0].cell(label_column)
    if names.find(name) or has_picture_name(name):
        return False
    words = any(LABEL_HEADER.fullmatch(cell) for cell in rows[0].cells)
    return words or all(row.cell(label_column) != label for row in rows[1:])


def _stem(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.rpartition(".")[0] or base)


def _turned(path: str) -> str:
    """Its parts from the last to the first, each with a slash behind it."""
    return "".join(f"{part}/" for part in reversed(path.split("/")))


def _shown(text: str) -> str:
    text = one_line(printable(text))
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
