"""Opening a prepared data set: everything that can be wrong with it is said here, in one line, before DALI starts."""

import dataclasses
import hashlib
import logging
import resource
import stat
import tempfile
from pathlib import Path

import numpy as np

from pipeline.errors import DatasetError
from pipeline.index_checks import MAX_INDEX_LINE, check_index
from pipeline.loader.augmentation import Statistics
from pipeline.manifest import Manifest, ShardRecord, SplitRecord, path_inside, read_manifest
from pipeline.statistics_file import REPAIR as _REPAIR
from pipeline.statistics_file import read_statistics_file
from twotower.untrusted import read_regular

_SPARE_FILES = 256  # descriptors and mappings that Python, torch, CUDA and the trainer hold beside the tars'
_SPARE_MAPS = 4096
_MAX_MAPS = Path("/proc/sys/vm/max_map_count")
_LOGGER = logging.getLogger(__name__)


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
        height_px, width_px: size of every image.
        index_folder: the shorter indexes that a skip list makes, there as long as this is held.
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
    index_folder: "tempfile.TemporaryDirectory[str] | None" = None

    @property
    def sample_bytes(self) -> float:
        """Bytes of the tars a sample."""
        return sum(shard.size_bytes for shard in self.record.shards) / self.record.num_samples


def open_split(folder: Path, split: str, *, skip_list: Path | None = None) -> OpenSplit:
    """Reads the manifest and checks the split's files against it: sizes of tars, hashes and counts of indexes.

    Args:
        folder: a prepared data set on this machine.
        split: name of the split.
        skip_list: text file of sample keys to leave out, one a line.

    Raises:
        DatasetError: anything missing or different, named; or the skip list cannot be read, or leaves nothing.
    """
    folder = Path(folder).absolute()
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        raise DatasetError(f"{folder} has no split {split!r}: it has {', '.join(sorted(manifest.splits))}")
    record = manifest.splits[split]
    image = manifest.image
    if image.height_px is None or image.width_px is None:
        raise DatasetError(f"{folder} holds images of different sizes: prepare it with --resize to feed a network")
    for shard in record.shards:
        _check_shard(folder, shard)
    opened = OpenSplit(
        folder=folder,
        manifest=manifest,
        record=record,
        tars=tuple(str(folder / shard.name) for shard in record.shards),
        indexes=tuple(str(folder / shard.index_name) for shard in record.shards),
        num_samples=record.num_samples,
        skipped=(),
        height_px=image.height_px,
        width_px=image.width_px,
    )
    return opened if skip_list is None else _skip(opened, read_skip_list(skip_list))


def _check_shard(folder: Path, shard: ShardRecord) -> None:
    tar = path_inside(folder, shard.name)
    try:
        found = tar.stat()
    except FileNotFoundError:
        raise DatasetError(f"{tar} is missing: {_REPAIR}") from None
    if not stat.S_ISREG(found.st_mode):
        raise DatasetError(f"{tar} is no regular file: {_REPAIR}")
    if found.st_size != shard.size_bytes:
        raise DatasetError(f"{tar} has {found.st_size} bytes, the manifest records {shard.size_bytes}: {_REPAIR}")
    # An index of another tar is read silently by DALI, and one whose first line is too small shrinks the data set.
    # Hashing all of them is cheap (60 bytes per sample), so it is always done. Who made the index made its hash too,
    # so every number in it is checked as well.
    path = path_inside(folder, shard.index_name)
    index = _read(path, shard.num_samples * MAX_INDEX_LINE + MAX_INDEX_LINE)
    if hashlib.sha256(index).hexdigest() != shard.index_sha256:
        raise DatasetError(f"{path} is not the index that the manifest records: {_REPAIR}")
    try:
        check_index(index, shard.num_samples, shard.size_bytes)
    except ValueError as error:
        raise DatasetError(f"{path} {error}: {_REPAIR}") from None


def _read(path: Path, most_bytes: int) -> bytes:
    try:
        return read_regular(path, most_bytes)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): {_REPAIR}") from None


def read_statistics(folder: Path, manifest: Manifest) -> Statistics:
    """Reads statistics.npz and checks it against the manifest.

    Raises:
        DatasetError: missing, changed, or damaged.
    """
    arrays = read_statistics_file(folder, manifest)
    return Statistics(
        mean=arrays["mean"],
        std=np.sqrt(np.diag(arrays["covariance"])),
        mean_image=arrays.get("mean_image"),
        eigenvalues=arrays["eigenvalues"],
        eigenvectors=arrays["eigenvectors"],
    )


def read_skip_list(path: Path) -> frozenset[str]:
    """Keys of a skip list: one a line; empty lines and what follows ``#`` are ignored.

    Raises:
        DatasetError: the file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"skip list {path} cannot be read ({error}): expected a text file, one key a line") from None
    return frozenset(key for line in lines if (key := line.split("#", 1)[0].strip()))


def _skip(split: OpenSplit, keys: frozenset[str]) -> OpenSplit:
    """The split without some samples: DALI cannot skip, but it reads what the index says, so that is copied without."""
    folder = tempfile.TemporaryDirectory(prefix="twotower-index-")
    tars, indexes, skipped = [], [], []
    for number, (tar, index) in enumerate(zip(split.tars, split.indexes, strict=True)):
        lines = Path(index).read_text().splitlines()[1:]
        dropped = [key for line in lines if (key := _key_of(line)) in keys]
        kept = [line for line in lines if _key_of(line) not in keys]
        if dropped:
            index = str(Path(folder.name) / f"{number:06d}.idx")
            Path(index).write_text("\n".join([f"v1.2 {len(kept)}", *kept]) + "\n")
        if kept:
            tars.append(tar)
            indexes.append(index)
        skipped += dropped
    if not tars:
        raise DatasetError(f"the skip list leaves nothing of {split.folder}")
    if len(skipped) < len(keys):
        _LOGGER.warning("%d of %d keys of the skip list are not in this split", len(keys) - len(skipped), len(keys))
    return dataclasses.replace(
        split,
        tars=tuple(tars),
        indexes=tuple(indexes),
        num_samples=split.num_samples - len(skipped),
        skipped=tuple(sorted(skipped)),
        index_folder=folder,
    )


def _key_of(line: str) -> str:
    """The key in a line of an index, ``EXT OFFSET SIZE NAME`` repeated."""
    return line.split(" ", 4)[3].rsplit("/", 1)[-1].split(".", 1)[0]


def check_limits(num_shards: int, *, mmap: bool) -> None:
    """Makes sure that all tars of a split can be open at once, as DALI's reader wants them.

    Mapped tars cost one mapping each and no descriptor (measured); files cost a descriptor each. The soft limit of
    descriptors is raised as far as the hard one allows.

    Raises:
        DatasetError: too many shards; says which limit and how to raise it.
    """
    if mmap:
        _check_maps(num_shards)
    else:
        _check_descriptors(num_shards)


def _check_maps(num_shards: int) -> None:
    try:
        limit = int(_MAX_MAPS.read_text())
    except (OSError, ValueError):
        return  # another system than Linux
    if num_shards + _SPARE_MAPS > limit:
        raise DatasetError(
            f"{num_shards} shards need {num_shards + _SPARE_MAPS} memory mappings and this system allows {limit}: "
            "prepare with a larger --shard-size, raise vm.max_map_count, or set data.mmap = false"
        )


def _check_descriptors(num_shards: int) -> None:
    needed = num_shards + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise DatasetError(
            f"{num_shards} shards read as files need {needed} open files and this system allows {hard}: raise it "
            "(ulimit -Hn), prepare with a larger --shard-size, or set data.mmap = true"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
