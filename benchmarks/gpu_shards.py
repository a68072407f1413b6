"""Data sets for ``gpu.py``: 256-px photos as JPEG and raw shards, by prepare's own writer, without Ray."""

import dataclasses
import functools
import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import harness
import numpy as np

NUM_CLASSES = 10
QUALITY = 97  # of the photos; prepare stores them again, in quality 90
SHARD_SIZE = 256


@functools.cache
def _photos() -> list[Any]:
    import photos

    return photos.load_photos()


@dataclasses.dataclass(frozen=True)
class PhotoSource:
    """A source of :mod:`pipeline.sources` that makes its images when they are read: different crops of real photos."""

    side_px: int

    def read(self, item: Any) -> bytes:
        """A JPEG file."""
        import photos

        number, photo = item.offset, _photos()[item.offset % len(_photos())]
        made, buffer = photos.crop(photo, self.side_px, self.side_px, np.random.default_rng(number)), io.BytesIO()
        made.save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
        return buffer.getvalue()


def make_shards(work: Path, count: int, side_px: int) -> dict[str, Path]:
    """Folders by encoding, ``jpeg`` and ``raw``, of the same ``count`` images; on all cores."""
    return {encoding: _make(work / encoding, encoding, count, side_px) for encoding in ("jpeg", "raw")}


def _make(folder: Path, encoding: str, count: int, side_px: int) -> Path:
    from pipeline.config import ImageSettings
    from pipeline.manifest import FORMAT, ClassRecord, ImageFormat, Manifest
    from pipeline.preparation import output
    from pipeline.preparation.plan import plan_split
    from pipeline.preparation.shard import ShardJob, ShardTask, build_shard, read_result
    from pipeline.sources.listing import Item

    for name in ("train", "val", ".work/tmp", ".work/records"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    names = tuple(f"class-{number}" for number in range(NUM_CLASSES))
    settings = ImageSettings(resize_px=side_px, encoding=encoding)
    job = ShardJob(folder, PhotoSource(side_px), settings, names, fail_on_error=True)  # type: ignore[arg-type]
    counts = {"train": count, "val": NUM_CLASSES}
    tasks = [
        ShardTask(
            name=plan.name,
            split=split,
            start=plan.start,
            items=[Item(f"photo-{row}", row % NUM_CLASSES, "photos", row, 0) for row in plan.rows.tolist()],
        )
        for split, images in counts.items()
        for plan in plan_split(split, images, seed=0, shard_size=SHARD_SIZE)
    ]
    fresh = multiprocessing.get_context("spawn")  # a fork would have this process's CUDA, which cannot work there
    with ProcessPoolExecutor(min(harness.CORES, len(tasks)), fresh, _one_thread) as pool:
        results = list(pool.map(functools.partial(build_shard, job), tasks))
    whole = [read_result(folder / ".work", task.stem, with_positions=True) for task in tasks if task.split == "train"]
    merged = functools.reduce(lambda a, b: a.merge(b), [result.totals for result in whole if result])
    classes = tuple(ClassRecord(name, name) for name in names)
    image = ImageFormat(encoding, 3, side_px, side_px)
    draft = Manifest(FORMAT, "photos", {"seed": 0}, image, classes, "source", {}, {}, sum(counts.values()))
    output.finish(folder, draft, results, merged)
    output.clear_work(folder)
    return folder


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
