"""DALI's index of a tar, v1.2: read it, or make it for tars that others wrote."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import DatasetError, SourceError
from pipeline.manifest import write_atomic
from pipeline.preparation.tar_writer import INDEX_VERSION
from pipeline.sources.tar_reader import reader, walk_tar


class Component(NamedTuple):
    """One file of a sample.

    Attributes:
        extension: what follows the first dot of its name.
        offset: byte of the tar where its data starts.
        size: bytes of data.
        name: its name in the tar.
    """

    extension: str
    offset: int
    size: int
    name: str


def read_index(path: Path) -> list[tuple[Component, ...]]:
    """The samples of a tar, from its index.

    Raises:
        DatasetError: the index is missing or damaged.
    """
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        version, count = first.split()
        rows = [line.split(" ") for line in lines]
        samples = [
            tuple(
                Component(row[at], int(row[at + 1]), int(row[at + 2]), row[at + 3]) for at in range(0, len(row) - 3, 4)
            )
            for row in rows
        ]
    except (OSError, ValueError, IndexError) as error:
        raise DatasetError(f"{path}: no sound index ({error})") from None
    if version != INDEX_VERSION or int(count) != len(samples):
        raise DatasetError(f"{path}: no sound index (it states {first!r} and has {len(samples)} samples)")
    return samples


def make_index(tar: Path) -> list[tuple[Component, ...]]:
    """Walks a tar and groups its files into samples, as DALI's ``wds2idx`` does, but refuses what DALI would not read.

    Raises:
        SourceError: the tar is torn, a name has a space, or samples do not have the same components.
    """
    samples: list[list[Component]] = []
    last = None
    for member in walk_tar(reader(tar), 0, tar.stat().st_size, str(tar)):
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot:
            continue  # hidden files and names without extension are no components, for DALI neither
        if any(character.isspace() for character in member.name):
            raise SourceError(f"{tar}: {member.name!r} has a space in its name, which DALI's index cannot hold")
        if (folder, stem) != last:
            samples.append([])
            last = (folder, stem)
        samples[-1].append(Component(extension, member.offset, member.size, member.name))
    if not samples:
        raise SourceError(f"{tar}: no samples in it")
    return [tuple(sample) for sample in samples]


def write_index(tar: Path) -> int:
    """Writes ``NAME.idx`` beside a tar; returns the number of samples."""
    samples = make_index(tar)
    write_atomic(tar.with_suffix(".idx"), _to_bytes(samples))
    return len(samples)


def restore_index(tar: Path, sha256: str) -> bool:
    """Writes the index of a tar again if it comes out with this sha256; tells whether it did."""
    try:
        data = _to_bytes(make_index(tar))
    except SourceError:
        return False
    if hashlib.sha256(data).hexdigest() != sha256:
        return False
    write_atomic(tar.with_suffix(".idx"), data)
    return True


def _to_bytes(samples: list[tuple[Component, ...]]) -> bytes:
    lines = [" ".join(" ".join(map(str, component)) for component in sample) for sample in samples]
    return os.fsencode("\n".join([f"{INDEX_VERSION} {len(samples)}", *lines, ""]))
