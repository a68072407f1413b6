"""ILSVRC-2012's development kit: the class table in the order of the challenge, and the labels of the flat val."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import signal
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.errors import SourceError, first_line
from pipeline.files import AnyPath, read_whole
from pipeline.sources.tar_reader import read_compressed
from pipeline.sources.walk import join

DEVKIT_NAME = "ILSVRC2012_devkit_t12.tar.gz"
META_NAME = "data/meta.mat"
TRUTH_NAME = "data/ILSVRC2012_validation_ground_truth.txt"
DEVKIT_FOLDERS = ("ILSVRC2012_devkit_t12", "devkit", "")
MOST_TABLE_BYTES = 2**26  # of a file of labels or titles, also unpacked: the devkit's has 1 MB
MOST_SECONDS = 60
PACKED = 15  # a MATLAB file's element that is packed by zlib


@dataclasses.dataclass(frozen=True)
class Devkit:
    """What ILSVRC-2012's development kit tells.

    Attributes:
        wordnet_ids: the classes in ILSVRC order: row i has ILSVRC id i + 1.
        titles: their names, in the same order.
        val_ids: ILSVRC id of the i-th validation image in the order of names.
        files: the files of the input that it was read from.
    """

    wordnet_ids: tuple[str, ...]
    titles: tuple[str, ...]
    val_ids: tuple[int, ...]
    files: tuple[str, ...]


def find_devkit(root: AnyPath) -> Devkit | None:
    """Reads the kit below ``root``, as the archive or extracted; None if there is none.

    Raises:
        SourceError: it is there but damaged.
    """
    archive = root / DEVKIT_NAME
    if archive.is_file():
        read = read_compressed(archive, (META_NAME, TRUTH_NAME))
        return _parse_devkit(read[META_NAME], read[TRUTH_NAME], archive, (DEVKIT_NAME,))
    for folder in DEVKIT_FOLDERS:
        files = join(folder, META_NAME), join(folder, TRUTH_NAME)
        meta, truth = (root / file for file in files)
        if meta.is_file() and truth.is_file():
            return _parse_devkit(read_table(meta), read_table(truth), root / folder, files)
    return None


def read_table(path: AnyPath) -> bytes:
    """A small file of labels or titles.

    Raises:
        SourceError: it cannot be read, or is not small.
    """
    try:
        return read_whole(path, MOST_TABLE_BYTES)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None


def _check_packed(meta: bytes) -> None:
    """Refuses a MATLAB file whose packed elements are larger than a devkit's: zlib packs a thousand to one.

    Raises:
        ValueError: one is.
    """
    position = 128  # behind the header
    while position + 8 <= len(meta):
        kind, size = (int.from_bytes(meta[at : at + 4], "little") for at in (position, position + 4))
        packed = meta[position + 8 : position + 8 + size] if kind == PACKED else b""
        if len(zlib.decompressobj().decompress(packed, MOST_TABLE_BYTES)) == MOST_TABLE_BYTES:
            raise ValueError(f"unpacks to more than {MOST_TABLE_BYTES:,} bytes")
        position += 8 + size


def _class_rows(meta: bytes) -> list[tuple[int, str, str]]:
    """ILSVRC id, WordNet id and words of every class."""
    synsets = scipy_io().loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return sorted(
        (int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"]))
        for row in np.atleast_1d(synsets)
        if int(row["num_children"]) == 0  # the others are parents in WordNet's tree, not classes
    )


def scipy_io() -> Any:
    """The package, imported only for this one small file."""
    return importlib.import_module("scipy.io")


def _apart(work: Callable[[bytes], Any], data: bytes) -> Any:
    """What ``work`` makes of data, in a process of its own: scipy's reader crashes on some damaged files.

    Raises:
        ValueError: it fails, or its process dies.
    """
    scipy_io()  # before the fork, so that nothing is imported behind it
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(reading)
            signal.alarm(MOST_SECONDS)
            with os.fdopen(writing, "wb") as out:
                out.write(json.dumps(_attempt(work, data)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        told = answer.read()
    os.waitpid(child, 0)
    if not told:
        raise ValueError("the reader of MATLAB files died of it")
    made, why = json.loads(told)
    if why:
        raise ValueError(why)
    return made


def _attempt(work: Callable[[bytes], Any], data: bytes) -> tuple[Any, str]:
    try:
        return work(data), ""
    except Exception as error:  # scipy fails in many ways
        return None, f"{type(error).__name__}: {error}"


def _parse_devkit(meta: bytes, truth: bytes, where: AnyPath, files: tuple[str, ...]) -> Devkit:
    try:
        _check_packed(meta)
        rows = _apart(_class_rows, meta)
        val_ids = tuple(int(line) for line in truth.split())
    except ValueError as error:
        raise SourceError(f"{where}: damaged: {first_line(error)}") from None
    if [row[0] for row in rows] != list(range(1, len(rows) + 1)):
        raise SourceError(f"{where}: the ids of the classes in {META_NAME} are not 1..{len(rows)}")
    if any(not 1 <= label <= len(rows) for label in val_ids):
        raise SourceError(f"{where}: {TRUTH_NAME} has ids outside 1..{len(rows)}")
    return Devkit(tuple(row[1] for row in rows), tuple(row[2] for row in rows), val_ids, files)
