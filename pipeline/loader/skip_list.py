"""Leaving samples out of a run: DALI cannot skip, but it reads what the index says, so that is copied without them."""

import dataclasses
import logging
from pathlib import Path

from pipeline.errors import DatasetError
from pipeline.loader.open_split import OpenSplit

_LOGGER = logging.getLogger(__name__)


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


def skip_samples(split: OpenSplit, keys: frozenset[str], folder: Path) -> OpenSplit:
    """The split without some samples.

    Args:
        split: the split.
        keys: sample keys; those of other splits are ignored.
        folder: where the shorter indexes are written; must live as long as the result is read.

    Raises:
        DatasetError: nothing is left.
    """
    tars, indexes, skipped = [], [], []
    for number, (tar, index) in enumerate(zip(split.tars, split.indexes, strict=True)):
        lines = Path(index).read_text().splitlines()[1:]
        dropped = [key for line in lines if (key := _key_of(line)) in keys]
        kept = [line for line in lines if _key_of(line) not in keys]
        if dropped:
            index = str(folder / f"{number:06d}.idx")
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
    )


def _key_of(line: str) -> str:
    """The key in a line of an index, ``EXT OFFSET SIZE NAME`` repeated."""
    return line.split(" ", 4)[3].rsplit("/", 1)[-1].split(".", 1)[0]
