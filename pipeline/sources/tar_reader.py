"""Reads tars that others wrote, in place: names and byte ranges, nothing is ever extracted.

Python's extraction filters have been bypassed repeatedly (CVE-2025-4517), so nothing here makes a file: a member's
name is text for people, its bytes are a range of the archive. Links, devices and sizes that do not fit are refused.

Why not tarfile: after a damaged header in the middle it ends as if the archive did (of 20,000 members it listed 10,000,
without an error), it keeps an object for every member, and it takes 16 us a member where this takes 5. Only small
compressed archives, which have no byte ranges, are read by it (:func:`read_compressed`).
"""

import contextlib
import functools
import gzip
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

from pipeline.errors import SourceError
from pipeline.files import AnyPath, read_range
from twotower.words import one_line

BLOCK = 512
STORE_FILES = "; tar --dereference --hard-dereference stores the files themselves"
KINDS = {
    b"1": "a hard link" + STORE_FILES,
    b"2": "a link" + STORE_FILES,
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": "sparse; tar without --sparse stores whole files",
}
FILES = b"0\x007"
NO_FILES = FILES + b"5DV"  # folders, also with a list of their files (GNU), and a label of the whole tar
LONGEST_EXTENSION = 2**20  # pax and GNU long-name records are a few hundred bytes; more is an attack on memory
REST_BYTES = 2**20
MOST_UNPACKED = 2**30  # of a compressed archive: CIFAR-10's has a fifth of it
MOST_REST = 2**30  # zeros behind the end: tar fills up a record of some kilobytes, and a sparse file may have exabytes
OCTAL = re.compile(rb"[0-7]*")  # int() takes a sign and underscores besides, and a size below 0 leads back
MOST_DIGITS = 19  # of a PAX number
# How a compressed archive begins, and what unpacks it. It has no byte ranges that could be read in place.
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x1f\x9d": ("compress", "uncompress"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
    b"LZIP": ("lzip", "lzip -d"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"7z\xbc\xaf\x27\x1c": ("7-Zip", "7z x"),
}
COMPRESSED_NAME = re.compile(
    r".*\.(tar\.(gz|gzip|z|bz2?|bzip2?|xz|lzma|lz|lz4|lzo|zstd?|br|zip|7z|rar)|tgz|taz|tbz2?|tz2|txz|tlz|tzst|tzstd)",
    re.I,
)

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
        key: their name up to the first dot of its last part, folders included, as :func:`plain_name` has it.
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
        SourceError: it is truncated, damaged, compressed, or holds something else than files and folders.
    """
    offset, name, size_override = start, None, None
    if end == start:
        raise SourceError(f"{where}: an empty file, not even an empty tar")
    while offset + BLOCK <= end:
        block = read(offset, BLOCK)
        if block == bytes(BLOCK):
            _check_rest(read, offset, end, where)
            return
        if offset == start:
            _refuse_compressed(block, where)
        stated = _checked_size(block, where, offset)
        size = stated if size_override is None else size_override
        kind, data = block[156:157], offset + BLOCK
        offset = data + size + -size % BLOCK
        if data + size > end:
            raise SourceError(
                f"{where}: truncated or lying: {one_line(_plain_name(block))} claims {size:,} bytes, and "
                f"{end - data:,} are left"
            )
        if kind in b"xgLK":
            if size > LONGEST_EXTENSION:
                raise SourceError(f"{where}: a name record of {size:,} bytes")
            if kind in b"xL":  # not the names that links lead to (K), nor what is said of all members (g)
                name, size_override = _extended(kind, read(data, size), name, where)
            continue
        found = name or _plain_name(block)
        if kind in FILES and (size or not found.endswith("/")):  # very old tars write a folder with a slash
            yield TarMember(found, data, size)
        elif kind not in NO_FILES:
            raise SourceError(
                f"{where}: only regular files are read, and {one_line(found)} is "
                f"{KINDS.get(kind, f'of unknown kind {kind!r}')}"
            )
        name, size_override = None, None
    _refuse_compressed(read(start, min(BLOCK, end - start)), where)
    raise SourceError(f"{where}: truncated: it ends without its end blocks")


def _check_rest(read: Read, offset: int, end: int, where: str) -> None:
    """Refuses what stands behind the end of a tar: tar programs ignore it in silence, so would lose a second tar."""
    if end - offset > MOST_REST:
        raise SourceError(
            f"{where}: {end - offset:,} bytes behind the end of the tar, at byte {offset:,}: cut them off"
        )
    for start in range(offset, end, REST_BYTES):
        rest = read(start, min(REST_BYTES, end - start))
        if rest.strip(b"\0"):
            first = start + len(rest) - len(rest.lstrip(b"\0"))
            raise SourceError(
                f"{where}: more data behind the end of the tar, at byte {first:,}: two tars in one file? Make them two"
            )


def _refuse_compressed(head: bytes, where: str) -> None:
    for magic, (name, program) in COMPRESSED.items():
        if head.startswith(magic):
            raise SourceError(f"{where}: compressed by {name}, so it has no byte ranges to read in place: {program} it")


def plain_name(name: str) -> str:
    """A member's name without ``./`` and doubled slashes: ``./a.jpg`` and ``a.jpg`` are one file."""
    if "//" not in name and "./" not in name and not name.startswith("/"):
        return name
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def is_hidden(name: str) -> bool:
    """Tells what a Mac or a hidden folder left in a tar: ``._NAME``, ``.DS_Store``, all below ``__MACOSX``."""
    if not name.startswith(".") and "/." not in name and "__MACOSX/" not in name:
        return False
    parts = name.split("/")
    return any(part.startswith(".") and part not in (".", "..") for part in parts) or "__MACOSX" in parts[:-1]


def group_samples(members: Iterable[TarMember], passed_over: list[TarMember] | None = None) -> Iterator[TarSample]:
    """Groups members that follow each other into samples, as DALI and webdataset do (which tell ``./a`` from ``a``).

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
        found = plain_name(member.name[: len(member.name) - len(member.base) + len(stem)])
        if group and found != key:
            yield TarSample(key, tuple(group))
            group = []
        key = found
        group.append(member)
    if group:
        yield TarSample(key, tuple(group))


def refuse_two(where: object, first: TarMember, second: TarMember) -> None:
    """Refuses two members that would be one: most readers, DALI and webdataset among them, take one without a word.

    Raises:
        SourceError: they are not the same.
    """
    if first is not second:
        names = [one_line(f"{member.name} at byte {member.offset:,}") for member in (first, second)]
        raise SourceError(
            f"{where}: two samples under one name: {' and '.join(names)}: "
            "name each apart, in more than case and Unicode form"
        )


def range_reader(path: AnyPath) -> Read:
    """A ``read`` for :func:`walk_tar`."""
    return functools.partial(read_range, path)


def walk_file(path: AnyPath) -> Iterator[TarMember]:
    """:func:`walk_tar` over a whole file."""
    return walk_tar(range_reader(path), 0, path.stat().st_size, str(path))


@contextlib.contextmanager
def open_compressed(archive: AnyPath) -> Iterator[tarfile.TarFile]:
    """A small .tar.gz as a stream of members, which ends with an error where a bomb would go on.

    Raises:
        SourceError: it is damaged, or unpacks to more than :data:`MOST_UNPACKED`.
    """
    try:
        with (
            archive.open("rb") as stream,
            gzip.open(stream) as unpacked,
            tarfile.open(fileobj=cast(Any, _Limited(unpacked)), mode="r|") as tar,
        ):
            yield tar
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError, OverflowError) as error:
        raise SourceError(f"{archive}: damaged: {error}") from None


class _Limited:
    """The first :data:`MOST_UNPACKED` bytes of a stream; more of it is an error."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._left = stream, MOST_UNPACKED

    def read(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise OSError(f"unpacks to more than {MOST_UNPACKED:,} bytes")
        return data


def read_compressed(archive: AnyPath, names: Iterable[str]) -> dict[str, bytes]:
    """Reads the files whose paths end in these names out of a small .tar.gz, as a stream, up to the last of them.

    Raises:
        SourceError: it is damaged, or one is not in it.
    """
    missing, found = set(names), dict[str, bytes]()
    with open_compressed(archive) as tar:
        while missing and (member := tar.next()):
            name = next((name for name in missing if f"/{member.name}".endswith(f"/{name}")), None)
            if name and member.isreg():
                file = tar.extractfile(member)
                found[name] = file.read() if file else b""
                missing.remove(name)
    if missing:
        raise SourceError(f"{archive}: {', '.join(sorted(missing))} is not in it")
    return found


def _checked_size(block: bytes, where: str, offset: int) -> int:
    checksum, size = block[148:156].strip(b"\0 "), block[124:136].strip(b"\0 ")
    if OCTAL.fullmatch(checksum) and int(checksum or b"0", 8) == sum(block) - sum(block[148:156]) + 8 * 32:
        if block[124] == 0x80:  # GNU base-256, for members of 8 GiB and more; 0xff would be a number below 0
            return int.from_bytes(block[125:136])
        if OCTAL.fullmatch(size):
            return int(size or b"0", 8)
    raise SourceError(f"{where}: damaged header at byte {offset:,}")


def _plain_name(block: bytes) -> str:
    prefix, name = block[345:500].split(b"\0", 1)[0], block[:100].split(b"\0", 1)[0]
    joined = prefix + b"/" + name if prefix and block[257:262] == b"ustar" and block[263:265] == b"00" else name
    return joined.decode("utf-8", "surrogateescape")


def _extended(kind: bytes, data: bytes, name: str | None, where: str) -> tuple[str | None, int | None]:
    """The name and size that a PAX (``x``) or GNU (``L``) record gives to the next member.

    Raises:
        SourceError: the member is sparse: its bytes in the tar are not those of the file.
    """
    if kind == b"L":
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape"), None
    size, start = None, 0
    while start < len(data):
        length = data[start : start + MOST_DIGITS].partition(b" ")[0]
        if not length.isdigit() or not len(length) + 2 < int(length) <= len(data) - start:
            break
        key, _, value = data[start + len(length) + 1 : start + int(length) - 1].partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit() and len(value) <= MOST_DIGITS:
            size = int(value)
        elif key.startswith(b"GNU.sparse."):
            raise SourceError(f"{where}: {one_line(name or 'a member')} is {KINDS[b'S']}")
        start += int(length)
    return name, size
