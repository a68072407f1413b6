"""Reads tars that others wrote, in place: names and byte ranges, nothing is ever extracted.

Python's extraction filters have been bypassed repeatedly (CVE-2025-4517), so nothing here makes a file: a member's
name is text for people, its bytes are a range of the archive. Links, devices and sizes that do not fit are refused.

Why not tarfile: after a damaged header in the middle it ends as if the archive did (of 20,000 members it listed 10,000,
without an error), it keeps an object for every member, and it takes 16 us a member where this takes 5. Only small
compressed archives, which have no byte ranges, are read by it (:func:`read_compressed`).
"""

import functools
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from pipeline.errors import SourceError
from pipeline.files import AnyPath, read_range

BLOCK = 512
KINDS = {b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a named pipe", b"S": "sparse"}
LONGEST_EXTENSION = 2**20  # pax and GNU long-name records are a few hundred bytes; more is an attack on memory

Read = Callable[[int, int], bytes]  # offset, size -> that many bytes


class TarMember(NamedTuple):
    """A regular file in a tar.

    Attributes:
        name: its name as the archive states it, never to be used as a path.
        offset: byte of the archive where its data starts.
        size: bytes of data.
    """

    name: str
    offset: int
    size: int

    @property
    def base(self) -> str:
        """The last part of the name: the rest means nothing and is not trusted."""
        return self.name.rpartition("/")[2]

    @property
    def extension(self) -> str:
        """What follows the first dot of its last part; the component of a sample that it is."""
        return self.base.partition(".")[2]


class TarSample(NamedTuple):
    """The members in a row that share a key.

    Attributes:
        key: their name up to the first dot of its last part, folders included.
        members: the members, one a component, in the order of the tar.
    """

    key: str
    members: tuple[TarMember, ...]


def walk_tar(read: Read, start: int, end: int, where: str) -> Iterator[TarMember]:
    """Yields the regular files of the tar in bytes ``start..end``, reading headers only. USTAR, GNU and PAX names.

    Args:
        read: gives ``size`` bytes at ``offset``.
        start: first byte of the tar.
        end: byte after its last.
        where: the archive, for messages.

    Raises:
        SourceError: it is truncated, damaged, or holds something else than files and folders.
    """
    offset, name, size_override = start, None, None
    while offset + BLOCK <= end:
        block = read(offset, BLOCK)
        if block == bytes(BLOCK):
            return
        stated = _checked_size(block, where, offset)
        size = stated if size_override is None else size_override
        kind, data = block[156:157], offset + BLOCK
        offset = data + size + -size % BLOCK
        if data + size > end:
            raise SourceError(
                f"{where}: truncated or lying: {_plain_name(block)} claims {size:,} bytes, {end - data:,} are left"
            )
        if kind in b"xgL":
            if size > LONGEST_EXTENSION:
                raise SourceError(f"{where}: a name record of {size:,} bytes")
            if kind != b"g":
                name, size_override = _extended(kind, read(data, size), name)
            continue
        if kind in b"0\x007":
            yield TarMember(name or _plain_name(block), data, size)
        elif kind != b"5":
            found = KINDS.get(kind, f"of unknown kind {kind!r}")
            raise SourceError(f"{where}: {name or _plain_name(block)} is {found}; only regular files are read")
        name, size_override = None, None
    raise SourceError(f"{where}: truncated: it ends without its end blocks")


def group_samples(members: Iterable[TarMember], passed_over: list[TarMember] | None = None) -> Iterator[TarSample]:
    """Groups members that follow each other into samples, as DALI and webdataset do.

    Hidden files and names without an extension belong to no sample, for those two neither.

    Args:
        members: what :func:`walk_tar` yields, or the index of a tar.
        passed_over: gets the members that belong to no sample.
    """
    key, group = "", list[TarMember]()
    for member in members:
        stem, dot, _ = member.base.partition(".")
        if not stem or not dot:
            if passed_over is not None:
                passed_over.append(member)
            continue
        found = member.name[: len(member.name) - len(member.base) + len(stem)]
        if group and found != key:
            yield TarSample(key, tuple(group))
            group = []
        key = found
        group.append(member)
    if group:
        yield TarSample(key, tuple(group))


def range_reader(path: AnyPath) -> Read:
    """A ``read`` for :func:`walk_tar`."""
    return functools.partial(read_range, path)


def walk_file(path: AnyPath) -> Iterator[TarMember]:
    """:func:`walk_tar` over a whole file."""
    return walk_tar(range_reader(path), 0, path.stat().st_size, str(path))


def read_compressed(archive: AnyPath, names: Iterable[str]) -> dict[str, bytes]:
    """Reads the files whose paths end in these names out of a small .tar.gz, as a stream, up to the last of them.

    Raises:
        SourceError: it is damaged, or one is not in it.
    """
    missing, found = set(names), dict[str, bytes]()
    try:
        with archive.open("rb") as stream, tarfile.open(fileobj=stream, mode="r|gz") as tar:
            while missing and (member := tar.next()):
                name = next((name for name in missing if f"/{member.name}".endswith(f"/{name}")), None)
                if name and member.isreg():
                    file = tar.extractfile(member)
                    found[name] = file.read() if file else b""
                    missing.remove(name)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise SourceError(f"{archive}: damaged: {error}") from None
    if missing:
        raise SourceError(f"{archive}: {', '.join(sorted(missing))} is not in it")
    return found


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
