"""Shards for tests, made from images in memory, without Ray."""

import dataclasses
import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import ImageSettings
from pipeline.errors import ImageError
from pipeline.manifest import FORMAT, ClassRecord, ImageFormat, Manifest
from pipeline.preparation import output
from pipeline.preparation.plan import plan_split
from pipeline.preparation.shard import ShardJob, ShardTask, build_shard
from pipeline.sources.listing import Item


@dataclasses.dataclass(frozen=True)
class MemorySource:
    """Small colored PNGs; the image at ``bad`` is text."""

    bad: int = -1

    def read(self, item: Item) -> bytes:
        if item.offset == self.bad:
            return b"text"
        if item.offset < 0:
            raise ImageError("cannot be read")
        buffer = io.BytesIO()
        Image.fromarray(image(item.offset)).save(buffer, "PNG")
        return buffer.getvalue()


def image(number: int, side: int = 12) -> np.ndarray:
    """An image that encodes its number: uint8 (12, 12, 3)."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3)).astype(np.uint8)
    pixels[0, 0] = (number >> 16 & 255, number >> 8 & 255, number & 255)
    return pixels


def make_tasks(count: int, shard_size: int, split: str = "train") -> list[ShardTask]:
    """Tasks over images 0..count-1, label = number % 3."""
    return [
        ShardTask(
            name=plan.name,
            split=split,
            start=plan.start,
            items=[Item(f"images/{row:04d}.png", row % 3, "memory", row, 0) for row in plan.rows.tolist()],
        )
        for plan in plan_split(split, count, seed=0, shard_size=shard_size)
    ]


def make_job(folder: Path, source: MemorySource | None = None, **image_settings: object) -> ShardJob:
    """A job that stores PNGs in ``folder`` and the folders it needs."""
    for name in ("train", "val", ".work/tmp", ".work/records"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    settings = ImageSettings(**({"resize_px": None, "encoding": "png"} | image_settings))
    return ShardJob(folder, source or MemorySource(), settings, ("ant", "bee", "cat"), fail_on_error=False)


def make_dataset(folder: Path, count: int = 10, shard_size: int = 4, source: MemorySource | None = None) -> Manifest:
    """A complete data set with a train and a val split."""
    job = make_job(folder, source)
    results = [build_shard(job, task) for split in ("train", "val") for task in make_tasks(count, shard_size, split)]
    totals = [result.totals for result in results if result.split == "train"]
    merged = totals[0]
    for other in totals[1:]:
        merged = merged.merge(other)
    classes = tuple(ClassRecord(name, name) for name in job.class_names)
    draft = Manifest(
        FORMAT, "memory", {"seed": 0}, ImageFormat("png", 3, None, None), classes, "source", {}, {}, 2 * count
    )
    manifest = output.finish(folder, draft, results, merged)
    output.clear_work(folder)
    return manifest
