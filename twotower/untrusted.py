"""Reading files that a stranger may have made: as many bytes as are allowed, of a regular file, and JSON that is meant.

Nothing here waits for a pipe, reads a device to an end that it has not, or goes as deep as a file asks.
"""

import contextlib
import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 256 * 2**20  # a record of a million shards
_PIECE_BYTES = 2**22
_JSON_WORDS = "no number is infinite or NaN in JSON"


@contextlib.contextmanager
def open_regular(path: str | os.PathLike[str], *, follow: bool = True) -> Iterator[int]:
    """A descriptor of a regular file, opened for reading; nothing is waited for should it be a pipe by now.

    Args:
        path: the file.
        follow: it may be a link to one.

    Raises:
        OSError: it cannot be opened, or is no regular file (``EINVAL``, and ``strerror`` says so).
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags)
    except OSError as error:
        if follow or error.errno != errno.ELOOP:
            raise
        raise OSError(errno.EINVAL, "is a link, which may lead anywhere", os.fspath(path)) from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", os.fspath(path))
        yield handle
    finally:
        os.close(handle)


def read_regular(path: str | os.PathLike[str], most_bytes: int = MAX_JSON_BYTES, *, follow: bool = True) -> bytes:
    """The content of a regular file of at most so many bytes; ``follow``: it may be a link to one.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger (``EFBIG``, and ``strerror`` says so).
    """
    with open_regular(path, follow=follow) as handle:
        size = os.fstat(handle).st_size
        pieces, left = [], most_bytes + 1
        if size <= most_bytes:
            while left > 0 and (piece := os.read(handle, min(left, max(size + 1, _PIECE_BYTES)))):
                pieces.append(piece)
                left -= len(piece)
        if size > most_bytes or left == 0:
            raise OSError(errno.EFBIG, f"is larger than {most_bytes:,} bytes", os.fspath(path))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_regular_text(path: str | os.PathLike[str], most_bytes: int = MAX_JSON_BYTES) -> str:
    """The same as text in UTF-8.

    Raises:
        OSError: as of :func:`read_regular`.
        UnicodeDecodeError: it is no UTF-8.
    """
    return read_regular(path, most_bytes).decode()


def parse_json(text: str | bytes, *, nan: bool = False) -> Any:
    """What a JSON text says, as the standard has it: no name twice in an object, no number that is none.

    Args:
        text: the text, in UTF-8.
        nan: ``NaN`` and ``Infinity`` are numbers, as Python writes them.

    Raises:
        ValueError: it is not JSON, or is nested so deeply that nobody can have meant it; one line.
    """
    hooks: dict[str, Any] = {} if nan else {"parse_constant": _refuse, "parse_float": _finite}
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=_unique, **hooks)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, most_bytes: int = MAX_JSON_BYTES, *, nan: bool = False) -> Any:
    """The JSON of a regular file.

    Raises:
        OSError: as of :func:`read_regular`.
        ValueError: as of :func:`parse_json`.
    """
    return parse_json(read_regular(path, most_bytes), nan=nan)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:40]!a} stands there twice")
    return found


def _refuse(word: str) -> float:
    raise ValueError(f"{word}: {_JSON_WORDS}")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]}: {_JSON_WORDS}")
    return number
