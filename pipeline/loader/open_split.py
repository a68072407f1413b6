"""Opening a prepared data set: everything that can be wrong with it is said here, in one line, before DALI starts."""

import dataclasses
import hashlib
import logging
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import DatasetError
from pipeline.loader.augmentation import Statistics
from pipeline.loader.shards import check_tar, in_threads, read_checked, read_index
from pipeline.manifest import Manifest, ShardRecord, SplitRecord, read_manifest
from pipeline.statistics_file import read_statistics_file
from twotower.words import listed

_SPARE_FILES = 256  # descriptors and mappings that Python, torch, CUDA and the trainer hold beside the tars'
_SPARE_MAPS = 4096
_MAX_MAPS = Path("/proc/sys/vm/max_map_count")
_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class OpenSplit:
    """One split, as its manifest records it; its files are looked at by those who read them.

    Attributes:
        folder: the data set.
        manifest: its record.
        record: the split's record.
        tars, indexes: absolute paths, in order.
        counts: (num_tars,) samples of each tar that will be read: those of the record less the skipped ones.
        kept: for a tar of which samples are skipped, by its number: the others.
        skipped: keys of this split that the skip list took out, sorted.
        height_px, width_px: size of every image.
    """

    folder: Path
    manifest: Manifest
    record: SplitRecord
    tars: tuple[str, ...]
    indexes: tuple[str, ...]
    counts: np.ndarray
    kept: Mapping[int, np.ndarray]
    skipped: tuple[str, ...]
    height_px: int
    width_px: int

    @property
    def num_samples(self) -> int:
        """Samples that will be read."""
        return int(self.counts.sum())

    @property
    def sample_bytes(self) -> float:
        """Bytes of the tars a sample."""
        return sum(shard.size_bytes for shard in self.record.shards) / self.record.num_samples


def open_split(folder: Path, split: str, *, skip_list: Path | None = None) -> OpenSplit:
    """Reads the manifest; with a skip list also all indexes, to find its keys.

    Args:
        folder: a prepared data set on this machine.
        split: name of the split.
        skip_list: text file of sample keys to leave out, one a line.

    Raises:
        DatasetError: there is no such split, or its record contradicts itself; or the skip list cannot be read, or
            leaves nothing.
    """
    folder = Path(folder).absolute()
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        raise DatasetError(f"{folder} has no split {split!r}: it has {listed(sorted(manifest.splits))}")
    record = manifest.splits[split]
    image = manifest.image
    if image.height_px is None or image.width_px is None:
        raise DatasetError(f"{folder} holds images of different sizes: prepare it with --resize to feed a network")
    counts = np.array([shard.num_samples for shard in record.shards], np.int64)
    opened = OpenSplit(
        folder=folder,
        manifest=manifest,
        record=record,
        tars=tuple(str(folder / shard.name) for shard in record.shards),
        indexes=tuple(str(folder / shard.index_name) for shard in record.shards),
        counts=counts,
        kept={},
        skipped=(),
        height_px=image.height_px,
        width_px=image.width_px,
    )
    return opened if skip_list is None else _skip(opened, read_skip_list(skip_list))


def check_files(split: OpenSplit) -> None:
    """Checks all files of a split against the manifest, before a run begins: sizes of tars, all that indexes say.

    A process that trains checks those that it reads. This reads all indexes, 100 bytes a sample.

    Raises:
        DatasetError: anything missing or different, named.
    """

    def check(shard: ShardRecord) -> None:
        check_tar(split.folder, shard)
        read_checked(split.folder, shard)

    in_threads(check, split.record.shards)


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


def describe_keys(keys: Sequence[str]) -> str:
    """Number and hash of keys, in order: what is kept of a skip list, which may have a million of them."""
    if not keys:
        return "none"
    return f"{len(keys)} of sha256 {hashlib.sha256(chr(10).join(keys).encode()).hexdigest()[:16]}"


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
    """The split without some samples."""
    wanted = np.array(sorted(key.encode() for key in keys), "S")

    def find(shard: ShardRecord) -> tuple[np.ndarray, np.ndarray]:
        found = read_index(split.folder, shard, split.manifest.image.extension).keys
        dropped = np.isin(found, wanted)
        return np.flatnonzero(~dropped), found[dropped]

    found = in_threads(find, split.record.shards)
    skipped = sorted(key.decode() for _, dropped in found for key in dropped.tolist())
    counts = np.array([len(rest) for rest, _ in found], np.int64)
    if not counts.any():
        raise DatasetError(f"the skip list leaves nothing of {split.folder}")
    if len(skipped) < len(keys):
        _LOGGER.warning("%d of %d keys of the skip list are not in this split", len(keys) - len(skipped), len(keys))
    kept = {number: rest for number, (rest, dropped) in enumerate(found) if len(dropped)}
    return dataclasses.replace(split, counts=counts, kept=kept, skipped=tuple(skipped))


def check_limits(num_shards: int, *, mmap: bool) -> None:
    """Makes sure that all tars that a process reads in an epoch can be open at once.

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
