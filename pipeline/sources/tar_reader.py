"""Reads tars that others wrote, in place: names and byte ranges, nothing is ever extracted.

Python's extraction filters have been bypassed repeatedly (CVE-2025-4517), so nothing here makes a file: a member's
name is text for people, its bytes are a range of the archive. Links, devices and sizes that do not fit are refused.
"""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import PictureError, SourceError
from pipeline.files import Place, UrlPath

BLOCK = 512
KINDS = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a named pipe", b"S": "sparse"}
LONGEST_EXTENSION = 2**20  # pax and GNU long-name records are a few hundred bytes; more is an attack on memory

MAX_OPEN = 64  # files kept open by a worker; some data sets have thousands of tars

Read = Callable[[int, int], bytes]
_handles: dict[Path, int] = {}


class ArchiveMember(NamedTuple):
    """A regular file in a tar.

    Attributes:
        name: its name as the archive states it, never to be used as a path.
        offset: byte of the archive where its data starts.
        size: bytes of data.
    """

    name: str
    offset: int
    size: int


def walk_tar(read: Read, start: int, end: int, where: str) -> Iterator[ArchiveMember]:
    """Yields the regular files of the tar in bytes ``start..end``, reading headers only. USTAR, GNU and PAX names.

    Args:
        read: gives ``size`` bytes at ``offset``.
        start: first byte of the tar.
        end: byte after its last.
        where: the archive, for messages.

    Raises:
        SourceError: it is torn, damaged, or holds something else than files and folders.
    """
    offset, name, size_override = start, None, None
    while offset + BLOCK <= end:
        block = read(offset, BLOCK)
        if block == bytes(BLOCK):
            return
        size = _checked_size(block, where, offset) if size_override is None else size_override
        kind, data = block[156:157], offset + BLOCK
        offset = data + size + -size % BLOCK
        if data + size > end:
            raise SourceError(
                f"{where}: torn or lying: {_plain_name(block)} claims {size:,} bytes, {end - data:,} are left"
            )
        if kind in b"xgL":
            if size > LONGEST_EXTENSION:
                raise SourceError(f"{where}: a name record of {size:,} bytes")
            if kind != b"g":
                name, size_override = _extended(kind, read(data, size), name)
            continue
        if kind in b"0\x007":
            yield ArchiveMember(name or _plain_name(block), data, size)
        elif kind != b"5":
            found = KINDS.get(kind, f"of unknown kind {kind!r}")
            raise SourceError(f"{where}: {name or _plain_name(block)} is {found}; only regular files are read")
        name, size_override = None, None
    raise SourceError(f"{where}: torn: it ends without its end blocks")


def read_range(path: Place, offset: int, size: int) -> bytes:
    """Reads exactly ``size`` bytes at ``offset``; files stay open, so that a picture costs one system call.

    Raises:
        SourceError: the file is gone or shorter than it was when it was listed.
    """
    try:
        data = path.read_range(offset, size) if isinstance(path, UrlPath) else os.pread(_handle(path), size, offset)
    except FileNotFoundError:
        raise SourceError(f"{path}: is gone, or not on this machine") from None
    except OSError as error:
        raise PictureError(f"cannot be read: {error.strerror}") from None
    if len(data) != size:
        raise SourceError(f"{path}: ended at byte {offset + len(data):,}; it is shorter than when it was listed")
    return data


def _handle(path: Path) -> int:
    """A file descriptor that stays open until many others were needed since."""
    if path not in _handles:
        if len(_handles) == MAX_OPEN:
            os.close(_handles.pop(next(iter(_handles))))
        _handles[path] = os.open(path, os.O_RDONLY)
    return _handles[path]


def reader(path: Place) -> Read:
    """A ``read`` for :func:`walk_tar`."""
    return functools.partial(read_range, path)


def _checked_size(block: bytes, where: str, offset: int) -> int:
    try:
        stated = int(block[148:156].strip(b"\0 ") or b"0", 8)
        if stated == sum(block) - sum(block[148:156]) + 8 * 32:
            if block[124] & 0x80:  # GNU base-256, for members of 8 GiB and more
                return int.from_bytes(block[125:136])
            return int(block[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError:
        pass
    raise SourceError(f"{where}: damaged header at byte {offset:,}")


def _plain_name(block: bytes) -> str:
    prefix, name = block[345:500].split(b"\0", 1)[0], block[:100].split(b"\0", 1)[0]
    joined = prefix + b"/" + name if prefix and block[257:262] == b"ustar" and block[263:265] == b"00" else name
    return joined.decode("utf-8", "surrogateescape")


def _extended(kind: bytes, data: bytes, name: str | None) -> tuple[str | None, int | None]:
    """The name and size that a PAX (``x``) or GNU (``L``) record gives to the next member."""
    if kind == b"L":
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape"), None
    size = None
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            break
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit():
            size = int(value)
        data = data[int(length) :]
    return name, size
