"""Tells a folder of raw images, given where a prepared data set is wanted, and the command that prepares it."""

import contextlib
import itertools
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from pipeline.pictures import HEAD_BYTES, has_picture_head
from twotower.untrusted import open_regular

LOOKED_AT = 20  # entries of a folder
# A name in the folder, the source that reads it, and what it needs besides.
NAMES = (
    (r"ILSVRC.*", "imagenet", "--resize 256"),
    (r"data_batch_1(\.bin)?|cifar-10-batches-(py|bin)", "cifar10", ""),
    (r"(train|t10k)-images[.-]idx3-ubyte(\.gz)?", "mnist", ""),
    (r".*\.tar", "webdataset", "--resize 256"),
)


def advice(folder: Path) -> str:
    """What a folder holds and how it becomes a data set, "" if it is nothing that a source reads."""
    names = [path.name for path in _entries(folder, len(NAMES) * 1000)]
    for pattern, source, options in NAMES:
        if any(re.fullmatch(pattern, name) for name in names):
            return f"it holds raw images of source {source}; {_command(folder, source, options)}"
    inside = [path for path in _entries(folder) if path.is_dir()]
    classes = itertools.chain(inside, *map(_entries, inside))  # CLASS/*, or train/CLASS/*
    if any(_is_image(path) for one in classes if one.is_dir() for path in _entries(one)):
        return f"it holds class folders of raw images; {_command(folder, 'folder', '--resize 256')}"
    if any(_is_image(path) for path in _entries(folder)):
        return "it holds images without class folders: move each class into a folder of its own, then prepare them"
    return ""


def _command(folder: Path, source: str, options: str) -> str:
    place, output = (
        shlex.quote(str(path)) for path in (folder, folder.absolute().with_name(f"{folder.name}-prepared"))
    )
    words = f"python -m pipeline prepare --source {source} --input {place} --output {output} {options}".rstrip()
    return f"prepare them once, and give the output as the data set: {words}"


def _entries(folder: Path, most: int = LOOKED_AT) -> Iterator[Path]:
    """The first entries of a folder that are not hidden; none where it cannot be read."""
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        yield from (Path(entry.path) for entry in itertools.islice(found, most) if not entry.name.startswith("."))


def _is_image(path: Path) -> bool:
    try:
        with open_regular(path) as handle:
            return has_picture_head(os.read(handle, HEAD_BYTES))
    except OSError:
        return False
