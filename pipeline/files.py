"""Where input lies: a folder of this machine (``pathlib.Path``), or one at a URL that fsspec knows, read by ranges."""

import dataclasses
import functools
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, TypeVar

from pipeline.errors import SourceError

ATTEMPTS = 3
AHEAD = 16  # pictures asked for at once: a store answers each after tens of milliseconds, however many there are

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class UrlPath:
    """The part of ``pathlib.Path`` that sources use, at a URL. Picklable: every process opens its own connection.

    A store that fails is asked again; then :class:`SourceError` says so, and no picture is blamed for it.

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

    def entries(self) -> list["UrlEntry"]:
        """What is in the folder."""
        rows = self._ask("ls", detail=True)
        return [
            UrlEntry(str(row["name"]).rstrip("/").rpartition("/")[2], row["type"], row["size"] or 0) for row in rows
        ]

    def tars(self) -> list["UrlPath"]:
        """Every .tar file below the folder."""
        _, root = _open(self.url)
        return [self / name.removeprefix(root + "/") for name in self._ask("find") if name.endswith(".tar")]

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        failures = 0
        while True:
            try:
                filesystem, path = _open(self.url)
                return getattr(filesystem, method)(path, *arguments, **options)
            except (FileNotFoundError, SourceError):
                raise
            except Exception as error:  # every store fails in its own classes
                failures += 1
                if failures == ATTEMPTS:
                    reason = (str(error) or type(error).__name__).splitlines()[0]
                    raise SourceError(f"{self.url}: cannot be read: {reason}") from None


@dataclasses.dataclass(frozen=True)
class UrlEntry:
    """The part of ``os.DirEntry`` that sources use.

    Attributes:
        name: name in its folder.
        kind: ``file`` or ``directory``.
        size: bytes.
    """

    name: str
    kind: str
    size: int

    def is_dir(self) -> bool:
        """Tells whether it is a folder."""
        return self.kind == "directory"

    def is_file(self) -> bool:
        """Tells whether it is a file."""
        return self.kind == "file"

    def is_symlink(self) -> bool:
        """Stores have no links."""
        return False

    def stat(self) -> SimpleNamespace:
        """An object with ``st_size`` in bytes."""
        return SimpleNamespace(st_size=self.size)


Place = Path | UrlPath


def place(text: str) -> Place:
    """A folder, or a URL if ``text`` has ``://``."""
    return UrlPath(text.rstrip("/")) if "://" in text else Path(text)


def local(folder: Place) -> Path:
    """The absolute path of a folder that is not at a URL."""
    assert isinstance(folder, Path)
    return folder.absolute()


def tars(root: Place) -> list[Place]:
    """Every .tar file below a folder, in the order of their names' bytes."""
    found: list[Place] = [*(root.rglob("*.tar") if isinstance(root, Path) else root.tars())]
    return sorted(found, key=lambda path: os.fsencode(str(path)))


def below(root: Place, path: Place) -> PurePosixPath:
    """The path of a file relative to a folder above it."""
    if isinstance(path, Path) and isinstance(root, Path):
        return PurePosixPath(path.relative_to(root))
    return PurePosixPath(str(path).removeprefix(f"{root}/"))


def ahead(function: Callable[[Argument], Result], arguments: Iterable[Argument]) -> Iterator[Result]:
    """``map`` with a bounded number of calls at once in threads; the results come in order."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[Future[Result]] = deque()
        for argument in arguments:
            waiting.append(pool.submit(function, argument))
            if len(waiting) == AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@functools.lru_cache(maxsize=1024)
def _open(url: str) -> tuple[Any, str]:
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
