"""A path or a URL: folders of this machine are ``pathlib.Path``, those of a store that fsspec knows :class:`UrlPath`.

A :class:`UrlPath` has the methods of ``Path`` that readers of input need, under the same names, so a source is written
once. (universal-pathlib would be this class in large; here a store that fails is asked again, which it does not do.)
"""

import dataclasses
import functools
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, NamedTuple, TypeVar

from pipeline.errors import ImageError, SourceError, first_line

ATTEMPTS = 3
PREFETCH = 16  # files asked for at once: a store answers each after tens of milliseconds, however many there are
MAX_OPEN = 64  # files kept open by a process; some data sets have thousands of tars

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def is_url(text: str) -> bool:
    """Tells a URL from a path."""
    return "://" in text


@dataclasses.dataclass(frozen=True)
class UrlPath:
    """The part of ``pathlib.Path`` that sources use, at a URL. Picklable: every process opens its own connection.

    A store that fails is asked again; then :class:`SourceError` says so, and no image is blamed for it.

    Attributes:
        url: address without a slash at its end.
    """

    url: str

    def __truediv__(self, name: str) -> "UrlPath":
        return self if name in ("", ".") else UrlPath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    def absolute(self) -> "UrlPath":
        """Itself: a URL is always absolute."""
        return self

    def is_file(self) -> bool:
        """Tells whether it is a file."""
        return bool(self._ask("isfile"))

    def is_dir(self) -> bool:
        """Tells whether it is a folder."""
        return bool(self._ask("isdir"))

    def stat(self) -> SimpleNamespace:
        """An object with ``st_size`` in bytes."""
        return SimpleNamespace(st_size=int(self._ask("size")))

    def read_bytes(self) -> bytes:
        """The whole file."""
        return bytes(self._ask("cat_file"))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole file as text."""
        return self.read_bytes().decode(encoding)

    def read_range(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``, fewer at the end of the file."""
        return bytes(self._ask("cat_file", start=offset, end=offset + size)) if size else b""

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The file as a stream."""
        assert mode == "rb"
        return io.BufferedReader(self._ask("open", "rb"))

    def rglob(self, pattern: str) -> list["UrlPath"]:
        """The files below this folder whose name ends as ``*SUFFIX`` says."""
        assert pattern.startswith("*")
        _, root = _open_store(self.url)
        return [self / name.removeprefix(root + "/") for name in self._ask("find") if name.endswith(pattern[1:])]

    def entries(self) -> Iterator["Entry"]:
        """What is in the folder."""
        for row in self._ask("ls", detail=True):
            yield Entry(str(row["name"]).rstrip("/").rpartition("/")[2], row["type"], row["size"] or 0)

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        failures = 0
        while True:
            try:
                filesystem, path = _open_store(self.url)
                return getattr(filesystem, method)(path, *arguments, **options)
            except (FileNotFoundError, SourceError):
                raise
            except Exception as error:  # every store fails in its own classes
                failures += 1
                if failures == ATTEMPTS:
                    raise SourceError(f"{self.url}: cannot be read: {first_line(error)}") from None


AnyPath = Path | UrlPath


class Entry(NamedTuple):
    """Something in a folder.

    Attributes:
        name: its name there.
        kind: ``file``, ``directory``, ``link`` (one that leads nowhere) or ``other`` (a pipe, a socket, a device); what
            a link leads to counts.
        size: bytes of a file, else 0.
    """

    name: str
    kind: str
    size: int


def parse_path(text: str) -> AnyPath:
    """A path, or a URL if ``text`` has ``://``."""
    return UrlPath(text.rstrip("/")) if is_url(text) else Path(text)


def relative_to(path: AnyPath, root: AnyPath) -> PurePosixPath:
    """What follows the folder ``root`` in ``path``."""
    return PurePosixPath(str(path).removeprefix(str(root)).lstrip("/"))


def scan(folder: AnyPath) -> list[Entry]:
    """What is in a folder, hidden names left out, in the order that the file system gives.

    Raises:
        SourceError: it cannot be listed.
    """
    try:
        entries = folder.entries() if isinstance(folder, UrlPath) else _scan_local(folder)
        return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise SourceError(f"{folder}: cannot be listed: {error.strerror}") from None


def read_range(path: AnyPath, offset: int, size: int) -> bytes:
    """Reads exactly ``size`` bytes at ``offset``; files stay open, so that an image costs one system call.

    Raises:
        SourceError: the file is gone or shorter than it was when it was listed.
        ImageError: these bytes cannot be read.
    """
    try:
        data = path.read_range(offset, size) if isinstance(path, UrlPath) else os.pread(_handle(path), size, offset)
    except FileNotFoundError:
        raise SourceError(f"{path}: is gone, or not on this machine") from None
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from None
    if len(data) != size:
        raise SourceError(f"{path}: ended at byte {offset + len(data):,}; it is shorter than when it was listed")
    return data


def prefetch(function: Callable[[Argument], Result], arguments: Iterable[Argument]) -> Iterator[Result]:
    """``map`` with a bounded number of calls at once in threads; the results come in order."""
    with ThreadPoolExecutor(PREFETCH) as pool:
        waiting: deque[Future[Result]] = deque()
        for argument in arguments:
            waiting.append(pool.submit(function, argument))
            if len(waiting) == PREFETCH:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _scan_local(folder: Path) -> Iterator[Entry]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield Entry(entry.name, "directory", 0)
            elif entry.is_file():
                yield Entry(entry.name, "file", entry.stat().st_size)
            else:
                yield Entry(entry.name, "link" if entry.is_symlink() else "other", 0)


_handles: dict[Path, int] = {}


def _handle(path: Path) -> int:
    """A file descriptor that stays open until many others were needed since."""
    if path not in _handles:
        if len(_handles) == MAX_OPEN:
            os.close(_handles.pop(next(iter(_handles))))
        _handles[path] = os.open(path, os.O_RDONLY)
    return _handles[path]


@functools.lru_cache(maxsize=1024)
def _open_store(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        SourceError: fsspec does not know the kind of URL, or lacks its package.
    """
    import fsspec  # only where a URL is given

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise SourceError(f"--input {url}: {error}") from None
    return filesystem, str(path).rstrip("/")
