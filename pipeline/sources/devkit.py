"""ILSVRC-2012's development kit: the class table and the labels of the validation pictures."""

import dataclasses
import io
import tarfile

import numpy as np

from pipeline.errors import SourceError
from pipeline.files import Place

ARCHIVE_NAME = "ILSVRC2012_devkit_t12.tar.gz"
META_NAME = "data/meta.mat"
TRUTH_NAME = "data/ILSVRC2012_validation_ground_truth.txt"
FOLDERS = ("ILSVRC2012_devkit_t12", "devkit", ".")


@dataclasses.dataclass(frozen=True)
class Devkit:
    """What the kit tells.

    Attributes:
        wordnet_ids: the classes in ILSVRC order: row i has ILSVRC id i + 1.
        titles: their names, in the same order.
        val_ids: ILSVRC id of the i-th validation picture in the order of names.
    """

    wordnet_ids: tuple[str, ...]
    titles: tuple[str, ...]
    val_ids: tuple[int, ...]


def find_devkit(root: Place) -> Devkit | None:
    """Reads the kit below ``root``, as the archive or extracted; None if there is none.

    Raises:
        SourceError: it is there but damaged.
    """
    archive = root / ARCHIVE_NAME
    if archive.is_file():
        return _parse(*_from_archive(archive), where=archive)
    for folder in FOLDERS:
        meta, truth = root / folder / META_NAME, root / folder / TRUTH_NAME
        if meta.is_file() and truth.is_file():
            return _parse(meta.read_bytes(), truth.read_bytes(), where=root / folder)
    return None


def _from_archive(archive: Place) -> tuple[bytes, bytes]:
    """The two files that matter, read as a stream: nothing is extracted."""
    found: dict[str, bytes] = {}
    try:
        with archive.open("rb") as stream, tarfile.open(fileobj=stream, mode="r|gz") as tar:
            for member in tar:
                for name in (META_NAME, TRUTH_NAME):
                    if member.isreg() and member.name.endswith(name):
                        file = tar.extractfile(member)
                        found[name] = file.read() if file else b""
    except (OSError, EOFError, tarfile.TarError) as error:
        raise SourceError(f"{archive}: damaged: {error}") from None
    if len(found) != 2:
        raise SourceError(f"{archive}: expected {META_NAME} and {TRUTH_NAME} in it, found {sorted(found) or 'neither'}")
    return found[META_NAME], found[TRUTH_NAME]


def _parse(meta: bytes, truth: bytes, where: Place) -> Devkit:
    import scipy.io  # only for this one small file

    try:
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        rows = sorted(
            (int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"]))
            for row in np.atleast_1d(synsets)
            if int(row["num_children"]) == 0
        )
        val_ids = tuple(int(line) for line in truth.split())
    except Exception as error:  # scipy fails in many ways on damaged files
        raise SourceError(f"{where}: damaged: {type(error).__name__}: {error}") from None
    if [row[0] for row in rows] != list(range(1, len(rows) + 1)):
        raise SourceError(f"{where}: the ids of the classes in {META_NAME} are not 1..{len(rows)}")
    if any(not 1 <= label <= len(rows) for label in val_ids):
        raise SourceError(f"{where}: {TRUTH_NAME} has ids outside 1..{len(rows)}")
    return Devkit(tuple(row[1] for row in rows), tuple(row[2] for row in rows), val_ids)
