"""Opening a prepared data set: everything that can be wrong with it is said here, in one line, before DALI starts."""

import dataclasses
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np

from pipeline.errors import DatasetError
from pipeline.loader.augmentation import Statistics
from pipeline.manifest import STATISTICS_NAME, Manifest, ShardRecord, SplitRecord, read_manifest

_REPAIR = "run python -m pipeline verify on it, then prepare again to repair it"


@dataclasses.dataclass(frozen=True)
class OpenSplit:
    """One split, checked.

    Attributes:
        folder: the data set.
        manifest: its record.
        record: the split's record.
        tars, indexes: absolute paths, in order.
        num_samples: samples that will be read: those of the record less the skipped ones.
        skipped: keys of this split that the skip list took out, sorted.
        height_px, width_px: size of every picture.
    """

    folder: Path
    manifest: Manifest
    record: SplitRecord
    tars: tuple[str, ...]
    indexes: tuple[str, ...]
    num_samples: int
    skipped: tuple[str, ...]
    height_px: int
    width_px: int


def open_split(folder: Path, split: str, *, verify: bool = False) -> OpenSplit:
    """Reads the manifest and checks the split's files against it: sizes of tars, hashes and counts of indexes.

    Args:
        folder: a prepared data set on this machine.
        split: name of the split.
        verify: hash the tars as well (reads them whole).

    Raises:
        DatasetError: anything missing or different, named.
    """
    folder = Path(folder).absolute()
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        raise DatasetError(f"{folder} has no split {split!r}: it has {', '.join(sorted(manifest.splits))}")
    record = manifest.splits[split]
    picture = manifest.picture
    if picture.height_px is None or picture.width_px is None:
        raise DatasetError(f"{folder} holds pictures of different sizes: prepare it with --resize to feed a network")
    if sum(shard.num_samples for shard in record.shards) != record.num_samples or not record.num_samples:
        raise DatasetError(f"{folder}: split {split!r} records {record.num_samples} samples, not those of its shards")
    for shard in record.shards:
        _check_shard(folder, shard, verify)
    return OpenSplit(
        folder=folder,
        manifest=manifest,
        record=record,
        tars=tuple(str(folder / shard.name) for shard in record.shards),
        indexes=tuple(str(folder / shard.index_name) for shard in record.shards),
        num_samples=record.num_samples,
        skipped=(),
        height_px=picture.height_px,
        width_px=picture.width_px,
    )


def _check_shard(folder: Path, shard: ShardRecord, verify: bool) -> None:
    _check_size(folder / shard.name, shard.size_bytes)
    if verify and file_sha256(folder / shard.name) != shard.sha256:
        raise DatasetError(f"{folder / shard.name} is not the tar that the manifest records: {_REPAIR}")
    # An index of another tar is read silently by DALI, and one whose first line is too small shrinks the data set.
    # Hashing all of them is cheap (60 bytes a sample), so it is always done.
    index = _read(folder / shard.index_name)
    if hashlib.sha256(index).hexdigest() != shard.index_sha256:
        raise DatasetError(f"{folder / shard.index_name} is not the index that the manifest records: {_REPAIR}")
    header = index.split(b"\n", 1)[0].decode("ascii", "replace")
    if header != f"v1.2 {shard.num_samples}":
        raise DatasetError(
            f"{folder / shard.index_name} begins {header!r}, expected 'v1.2 {shard.num_samples}': {_REPAIR}"
        )


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(path: Path, expected_bytes: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: {_REPAIR}") from None
    if found != expected_bytes:
        raise DatasetError(f"{path} has {found} bytes, the manifest records {expected_bytes}: {_REPAIR}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): {_REPAIR}") from None


def read_statistics(folder: Path, manifest: Manifest) -> Statistics:
    """Reads statistics.npz and checks it against the manifest.

    Raises:
        DatasetError: missing, changed, or damaged.
    """
    path = folder / STATISTICS_NAME
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != manifest.files.get(STATISTICS_NAME, {}).get("sha256"):
        raise DatasetError(f"{path} is not the file that the manifest records: {_REPAIR}")
    try:
        arrays = dict(np.load(io.BytesIO(data), allow_pickle=False))
        return Statistics(
            mean=np.asarray(arrays["mean"], np.float64),
            std=np.sqrt(np.diag(arrays["covariance"])),
            mean_image=arrays.get("mean_image"),
            eigenvalues=np.asarray(arrays["eigenvalues"], np.float64),
            eigenvectors=np.asarray(arrays["eigenvectors"], np.float64),
        )
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{path} is damaged ({error}): {_REPAIR}") from None
