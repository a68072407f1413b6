"""Tars as others write them: any members in any order."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tests.helpers.odd_images import photo, saved

Member = tuple[str, bytes] | tarfile.TarInfo  # a file, or a link, a folder, a device


def write_tar(path: Path, members: Iterable[Member], form: int = tarfile.USTAR_FORMAT) -> Path:
    """Writes a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A member that is no regular file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def sample(key: str, label: object = 0, number: int = 0) -> list[Member]:
    """A JPEG that differs by number, and its label."""
    return [(f"{key}.jpg", jpeg(number)), (f"{key}.cls", str(label).encode())]


def jpeg(number: int = 0) -> bytes:
    """A small JPEG that differs by number."""
    return saved(photo(12, 16, seed=number), "JPEG")
