"""A path or a URL: folders of this machine are ``pathlib.Path``, those of a store that fsspec knows :class:`UrlPath`.

A :class:`UrlPath` has the methods of ``Path`` that readers of input need, under the same names, so a source is written
once. (universal-pathlib would be this class in large; here a store that fails is asked again, which it does not do.)
"""

import dataclasses
import errno
import functools
import io
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, NamedTuple, TypeVar

from pipeline.addresses import is_address as is_url
from pipeline.addresses import open_store
from pipeline.errors import ImageError, SourceError, first_line
from twotower.untrusted import open_regular, read_regular

ATTEMPTS = 3
PREFETCH = 16  # files asked for at once: a store answers each after tens of milliseconds, however many there are
CACHE_VARIABLE = "TWOTOWER_CACHE"
NOT_FOR_US = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
MAX_OPEN = 64  # files kept open by a process; some data sets have thousands of tars

Argument = TypeVar("Argument")
Result = TypeVar("Result")


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
        _, root = _open_store(self.url)
        for row in self._ask("ls", detail=True):
            path = str(row["name"]).rstrip("/")
            if path != root:  # some stores keep an empty object for the folder itself
                kind = row["type"] if row["type"] in ("file", "directory") else "other"
                yield Entry(path.rpartition("/")[2], kind, row["size"] or 0)

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


# Of macOS's zips, Synology (thumbnails of every picture; deleted ones), Windows and ext4.
SYSTEM_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)


class Entry(NamedTuple):
    """Something in a folder.

    Attributes:
        name: its name there.
        kind: ``file``, ``directory``, ``link`` (one that leads nowhere), ``pipe``, ``socket``, ``device``,
            ``unreadable`` (it cannot be told) or ``other``; what a link leads to counts.
        size: bytes of a file, else 0.
        linked: what a link leads to.
    """

    name: str
    kind: str
    size: int
    linked: bool = False

    @property
    def hidden(self) -> bool:
        """Its name begins with a dot, or it is a folder that a system keeps among people's files."""
        return self.name.startswith(".") or (self.kind == "directory" and self.name in SYSTEM_FOLDERS)


def parse_path(text: str) -> AnyPath:
    """A path, or a URL if ``text`` is an address."""
    return UrlPath(text.rstrip("/")) if is_url(text) else Path(text)


def cache_folder() -> Path:
    """Where data sets of URLs are kept and made: ``$TWOTOWER_CACHE``, else ``~/.cache/twotower``.

    Raises:
        RuntimeError: there is no home folder.
    """
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "twotower")


def local_path(path: AnyPath) -> Path | None:
    """A path of this machine, also of a ``file://`` URL; None for a URL of any other store."""
    if isinstance(path, Path):
        return path
    filesystem, place = _open_store(path.url)
    return Path(place) if getattr(filesystem, "local_file", False) else None


def relative_to(path: AnyPath, root: AnyPath) -> PurePosixPath:
    """What follows the folder ``root`` in ``path``."""
    return PurePosixPath(str(path).removeprefix(str(root)).lstrip("/"))


class UnreadableFolder(SourceError):
    """This user may not list a folder of this machine; what is in it is not known."""


def scan(folder: AnyPath) -> Iterator[Entry]:
    """What is in a folder, hidden names too, in the order that the file system gives.

    Raises:
        UnreadableFolder: it is not for this user to see.
        SourceError: it cannot be listed.
    """
    place = local_path(folder) or folder
    try:
        yield from place.entries() if isinstance(place, UrlPath) else _scan_local(place)
    except OSError as error:
        raise _unlisted(folder, error) from None


def identity(folder: AnyPath) -> object:
    """What two paths to one folder share, however links lead there.

    Raises:
        UnreadableFolder: it is not for this user to see.
        SourceError: it is gone.
    """
    place = local_path(folder)
    if place is None:
        return str(folder)
    try:
        found = place.stat()
    except OSError as error:
        raise _unlisted(folder, error) from None
    return found.st_dev, found.st_ino


def _unlisted(folder: AnyPath, error: OSError) -> SourceError:
    kind = UnreadableFolder if error.errno in NOT_FOR_US else SourceError
    return kind(f"{folder}: cannot be listed: {error.strerror or error}")


def read_head(path: AnyPath, size: int) -> bytes:
    """The first bytes of a file, without waiting for anybody.

    Raises:
        OSError: it cannot be read, or is no regular file.
        SourceError: its store fails.
    """
    if isinstance(path, UrlPath):
        return path.read_range(0, size)
    with open_regular(path) as handle:
        return os.read(handle, size)


def read_whole(path: AnyPath, most_bytes: int) -> bytes:
    """A file of at most so many bytes; a pipe or a device is neither read nor waited for.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger; ``strerror`` says so.
        SourceError: its store fails.
    """
    if isinstance(path, Path):
        return read_regular(path, most_bytes)
    if path.stat().st_size > most_bytes:
        raise OSError(errno.EFBIG, f"is larger than {most_bytes:,} bytes", str(path))
    return path.read_bytes()


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
            try:
                if entry.is_file():
                    yield Entry(entry.name, "file", entry.stat().st_size, entry.is_symlink())
                elif entry.is_dir():
                    yield Entry(entry.name, "directory", 0, entry.is_symlink())
                else:
                    yield Entry(entry.name, _kind(entry.stat().st_mode), 0)
            except PermissionError:
                yield Entry(entry.name, "unreadable", 0)
            except OSError:  # a link to nothing, to itself, or through a file
                yield Entry(entry.name, "link", 0)


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "pipe"
    if stat.S_ISSOCK(mode):
        return "socket"
    return "device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "other"


_handles: dict[Path, int] = {}


def _handle(path: Path) -> int:
    """A file descriptor that stays open until many others were needed since."""
    if path not in _handles:
        if len(_handles) == MAX_OPEN:
            os.close(_handles.pop(next(iter(_handles))))
        with open_regular(path) as handle:
            _handles[path] = os.dup(handle)
    return _handles[path]


@functools.lru_cache(maxsize=1024)
def _open_store(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        SourceError: fsspec does not know the kind of URL, or lacks its package.
    """
    try:
        return open_store(url)
    except (ValueError, ImportError) as error:
        raise SourceError(f"--input {url}: {error}") from None
