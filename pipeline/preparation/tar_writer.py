"""A deterministic USTAR writer with DALI's index, and a reader of headers that trusts nothing.

The standard library writes the time and the user into headers and costs more than a JPEG costs to encode in C; a
sample's header here is one formatted string. Format: POSIX.1-1988, 512-byte blocks.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import BinaryIO

from pipeline.errors import DatasetError

BLOCK = 512
END = bytes(2 * BLOCK)  # two zero blocks: their absence is how a torn tar is told from a whole one
INDEX_VERSION = "v1.2"


@dataclasses.dataclass(frozen=True)
class Member:
    """One regular file in a tar.

    Attributes:
        name: its name.
        offset: byte of its first data byte.
        size: bytes of data.
    """

    name: str
    offset: int
    size: int


def header(name: str, size: int) -> bytes:
    """The USTAR header of a regular file: mode 0644, owner 0, time 0.

    Args:
        name: at most 100 ASCII characters.
        size: bytes, below 8 GiB.
    """
    encoded = name.encode("ascii")
    assert len(encoded) <= 100 and size < 8**11, f"not for USTAR: {name}, {size} bytes"
    fields = b"%b0000644\x000000000\x000000000\x00%011o\x0000000000000\x00%b0%b" % (
        encoded.ljust(100, b"\0"),
        size,
        b"        ",  # the checksum counts as spaces while it is computed
        b"\0" * 100 + b"ustar\x0000" + b"\0" * 247,
    )
    return b"%b%06o\0 %b" % (fields[:148], _SUM + sum(encoded) + sum(fields[124:135]), fields[156:])


# The checksum of a header without its name and its size: summing those few bytes is four times as fast as all 512.
_SUM = sum(b"0000644" + b"0000000" * 2 + b"00000000000" + b" " * 8 + b"0" + b"ustar00")


class TarWriter:
    """Writes samples and collects the index and the sha256 on the way.

    Args:
        file: opened for writing in binary, at its start.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._index: list[str] = []
        self.size_bytes = 0

    @property
    def num_samples(self) -> int:
        """Samples written so far."""
        return len(self._index)

    def add_sample(self, key: str, components: list[tuple[str, bytes]]) -> None:
        """Appends ``KEY.EXTENSION`` files in this order."""
        fields, parts, end = [], [], self.size_bytes
        for extension, data in components:
            name, size = f"{key}.{extension}", len(data)
            padding = -size % BLOCK
            parts += [header(name, size), data, bytes(padding)]
            fields.append(f"{extension} {end + BLOCK} {size} {name}")
            end += BLOCK + size + padding
        self._index.append(" ".join(fields))
        self._write(b"".join(parts))

    def finish(self) -> None:
        """Writes the end of the archive."""
        self._write(END)

    def sha256(self) -> str:
        """Hex digest of everything written."""
        return self._digest.hexdigest()

    def index(self) -> bytes:
        """The DALI index v1.2: a count, then a line a sample of ``extension offset size name`` groups."""
        return "\n".join([f"{INDEX_VERSION} {len(self._index)}", *self._index, ""]).encode("ascii")

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)


def read_members(file: BinaryIO, size_bytes: int) -> Iterator[Member]:
    """Walks a tar that :class:`TarWriter` wrote, checking every header byte, and the end; reads headers only.

    Args:
        file: the tar, opened for reading in binary.
        size_bytes: its size.

    Raises:
        DatasetError: a header is not what the writer writes, or the end is missing; the message says where.
    """
    offset = 0
    while offset + BLOCK <= size_bytes:
        file.seek(offset)
        block = file.read(BLOCK)
        if block == END[:BLOCK]:
            if offset + len(END) != size_bytes or file.read(BLOCK) != END[:BLOCK]:
                raise DatasetError(f"the end of the tar is damaged at byte {offset}")
            return
        member = _parse(block, offset)
        offset = member.offset + member.size + -member.size % BLOCK
        if offset > size_bytes:
            raise DatasetError(f"torn inside {member.name}")
        yield member
    raise DatasetError(f"torn: no end blocks at byte {offset}")


def _parse(block: bytes, offset: int) -> Member:
    try:
        name = block[:100].rstrip(b"\0").decode("ascii")
        size = int(block[124:135], 8)
        if block == header(name, size):
            return Member(name, offset + BLOCK, size)
    except (ValueError, AssertionError):
        pass
    raise DatasetError(f"damaged tar header at byte {offset}")
