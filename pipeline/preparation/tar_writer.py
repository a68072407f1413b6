"""Writes USTAR tars that depend on nothing but their samples, and DALI's index beside a tar, ours or another's.

The standard library writes the time and the user into headers and costs more than a JPEG costs to encode in C; a
sample's header here is one formatted string. Format: POSIX.1-1988, 512-byte blocks.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import DatasetError, SourceError
from pipeline.index_checks import MAX_INDEX_LINE, check_index
from pipeline.index_checks import VERSION as INDEX_VERSION
from pipeline.manifest import write_atomic
from pipeline.sources.tar_reader import BLOCK, TarMember, TarSample, group_samples, walk_file
from twotower.untrusted import read_regular

END = bytes(2 * BLOCK)  # two zero blocks: their absence is how a truncated tar is told from a complete one
COPY_BYTES = 2**20


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

    def append(self, samples: BinaryIO, lines: Iterable[str]) -> None:
        """Appends samples that another writer wrote (and did not finish), with its lines of the index."""
        for line in lines:
            fields = line.split(" ")
            fields[1::4] = [str(int(offset) + self.size_bytes) for offset in fields[1::4]]
            self._index.append(" ".join(fields))
        while data := samples.read(COPY_BYTES):
            self._write(data)

    def lines(self) -> tuple[str, ...]:
        """The lines of the index, one a sample."""
        return tuple(self._index)

    def finish(self) -> None:
        """Writes the end of the archive."""
        self._write(END)

    def sha256(self) -> str:
        """Hex digest of everything written."""
        return self._digest.hexdigest()

    def index(self) -> bytes:
        """DALI's index of what was written."""
        return _index_bytes(self._index, len(self._index))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)


def index_line(sample: TarSample) -> str:
    """A sample's line in DALI's index: ``extension offset size name`` for each of its files."""
    return " ".join(f"{member.extension} {member.offset} {member.size} {member.name}" for member in sample.members)


def read_index(path: Path, *, num_samples: int, tar_bytes: int) -> list[TarSample]:
    """The samples of a tar of ours, from its index.

    Args:
        path: the index.
        num_samples, tar_bytes: of the tar.

    Raises:
        DatasetError: the index is missing or damaged.
    """
    try:
        index = read_regular(path, (num_samples + 1) * MAX_INDEX_LINE)
        check_index(index, num_samples, tar_bytes)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: no valid index ({getattr(error, 'strerror', None) or error})") from None
    samples: list[TarSample] = []
    for line in index.decode("ascii").splitlines()[1:]:
        row = line.split(" ")
        members = [TarMember(row[at + 3], int(row[at + 1]), int(row[at + 2])) for at in range(0, len(row), 4)]
        samples += group_samples(members)
    if len(samples) != num_samples:
        raise DatasetError(f"{path}: no valid index (it states {num_samples} samples and has {len(samples)})")
    return samples


def make_index(tar: Path) -> tuple[int, bytes]:
    """Makes the index of a tar as DALI's ``wds2idx`` does, but refuses what DALI would not read.

    Returns:
        The number of samples, and the index.

    Raises:
        SourceError: the tar is truncated, has no samples, or a name has a space.
    """
    samples = list(group_samples(walk_file(tar)))
    if not samples:
        raise SourceError(f"{tar}: no samples in it")
    for member in (member for sample in samples for member in sample.members):
        if any(character.isspace() for character in member.name):
            raise SourceError(f"{tar}: {member.name!r} has a space in its name, which DALI's index cannot hold")
    return len(samples), _index_bytes(map(index_line, samples), len(samples))


def write_index(tar: Path) -> int:
    """Writes ``NAME.idx`` beside a tar; returns the number of samples."""
    num_samples, data = make_index(tar)
    write_atomic(tar.with_suffix(".idx"), data)
    return num_samples


def restore_index(tar: Path, sha256: str) -> bool:
    """Writes the index of a tar again if it comes out with this sha256; tells whether it did."""
    try:
        _, data = make_index(tar)
    except SourceError:
        return False
    if hashlib.sha256(data).hexdigest() != sha256:
        return False
    write_atomic(tar.with_suffix(".idx"), data)
    return True


def _index_bytes(lines: Iterable[str], num_samples: int) -> bytes:
    """DALI's index v1.2: its version and a count, then a line per sample."""
    return os.fsencode("\n".join([f"{INDEX_VERSION} {num_samples}", *lines, ""]))
