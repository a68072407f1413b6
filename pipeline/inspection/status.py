"""How far a data set is, read from its folder by anyone, on any node."""

import dataclasses
from pathlib import Path

from pipeline.errors import DatasetError
from pipeline.manifest import MANIFEST_NAME, read_manifest
from pipeline.preparation.output import is_running, read_plan
from pipeline.preparation.shard import WORK_NAME, read_result


@dataclasses.dataclass(frozen=True)
class SplitProgress:
    """One split.

    Attributes:
        done: images in finished shards, those left out included.
        total: images planned.
        left_out: images that could not be used, so far.
        shards: finished shards.
    """

    done: int
    total: int
    left_out: int
    shards: int


@dataclasses.dataclass(frozen=True)
class Status:
    """A data set's state.

    Attributes:
        stage: ``whole``, ``running``, ``stopped`` (run prepare again) or ``repairing``.
        splits: the splits by name.
        images_per_s: rate over the finished shards of the current run, None where it cannot be told.
        left_s: seconds left at that rate, None where it cannot be told.
        found: lines that say what became of everything found, once the data set is whole.
    """

    stage: str
    splits: dict[str, SplitProgress]
    images_per_s: float | None
    left_s: float | None
    found: tuple[str, ...] = ()


def read_status(folder: Path) -> Status:
    """Reads the state of a data set.

    Raises:
        DatasetError: the folder holds no data set, not even one begun.
    """
    running = is_running(folder)
    plan = read_plan(folder)
    if (folder / MANIFEST_NAME).is_file() and (plan is None or not running):
        manifest = read_manifest(folder)
        splits = {
            name: SplitProgress(
                split.num_samples + split.num_quarantined,
                split.num_samples + split.num_quarantined,
                split.num_quarantined,
                len(split.shards),
            )
            for name, split in manifest.splits.items()
        }
        return Status("whole", splits, None, None, tuple(manifest.found_lines()))
    if plan is None:
        if running:
            return Status("running", {}, None, None)
        raise DatasetError(f"{folder} holds no data set, complete or begun")
    stage = ("repairing" if (folder / MANIFEST_NAME).is_file() else "running") if running else "stopped"
    return _begun(folder, plan["totals"], stage)


def _begun(folder: Path, totals: dict[str, int], stage: str) -> Status:
    records = sorted((folder / WORK_NAME / "records").glob("*.json"), key=lambda path: path.lstat().st_mtime)
    results = [read_result(folder / WORK_NAME, path.stem, with_positions=False) for path in records]
    splits = {}
    for name, total in totals.items():
        rows = [result for result in results if result and result.split == name]
        splits[name] = SplitProgress(
            done=sum(row.num_planned for row in rows),
            total=total,
            left_out=sum(row.num_left_out for row in rows),
            shards=len(rows),
        )
    rate = _rate([(path.lstat().st_mtime, row.num_planned) for path, row in zip(records, results, strict=True) if row])
    left = sum(split.total - split.done for split in splits.values())
    return Status(stage, splits, rate, left / rate if rate else None)


def _rate(finished: list[tuple[float, int]]) -> float | None:
    """Images a second from the first finished shard to the last one."""
    if len(finished) < 2 or finished[-1][0] <= finished[0][0]:
        return None
    return sum(images for _, images in finished[1:]) / (finished[-1][0] - finished[0][0])
