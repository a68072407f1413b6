"""Limits of the operating system that a data set of many shards meets: said before DALI fails half-way."""

import resource
from pathlib import Path

from pipeline.errors import DatasetError

_SPARE = 256  # descriptors and mappings that Python, torch, CUDA and the trainer hold beside the tars'
_SPARE_MAPS = 4096
_MAX_MAPS = Path("/proc/sys/vm/max_map_count")


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
    needed = num_shards + _SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise DatasetError(
            f"{num_shards} shards read as files need {needed} open files and this system allows {hard}: raise it "
            "(ulimit -Hn), prepare with a larger --shard-size, or set data.mmap = true"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
