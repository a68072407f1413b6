"""Rows of ``scale.py``: opening large data sets, a replica's step, resuming.

    python benchmarks/scale_loader.py --work DIR      1.25 million samples in 626 shards: opened, resumed, evaluated

The images are raw pixels of 4 x 4: what is measured is the reading, not the decoding. As a program of its own it prints
what one process takes, with one replica and as one of 64.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SIDE_PX = 4
ROWS = 128  # of a replica's batch
STEPS = 200


def make_shards(folder: Path, num_shards: int, shard_size: int) -> Path:
    """A data set of tiny raw images; class = number modulo 10. About 30 us a sample."""
    from pipeline.manifest import (
        FORMAT,
        MANIFEST_NAME,
        STATISTICS_NAME,
        ClassRecord,
        ImageFormat,
        Manifest,
        SplitRecord,
        write_atomic,
    )

    pixels = SIDE_PX * SIDE_PX * 3
    arrays = {"mean": np.full(3, 128.0), "covariance": np.eye(3), "mean_image": np.full((SIDE_PX, SIDE_PX, 3), 128.0)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, eigenvalues=np.ones(3), eigenvectors=np.eye(3))  # type: ignore[arg-type]
    write_atomic(folder / STATISTICS_NAME, buffer.getvalue())
    files = {
        STATISTICS_NAME: {
            "size_bytes": len(buffer.getvalue()),
            "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        }
    }
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
    train = tuple(_write_shard(folder, "train", number, shard_size, pixels) for number in range(num_shards))
    val = (_write_shard(folder, "val", 0, min(shard_size, 100), pixels),)
    splits = {
        name: SplitRecord(sum(shard.num_samples for shard in shards), 0, shards)
        for name, shards in (("train", train), ("val", val))
    }
    classes = tuple(ClassRecord(str(number), str(number)) for number in range(10))
    image, count = ImageFormat("raw", 3, SIDE_PX, SIDE_PX), sum(split.num_samples for split in splits.values())
    manifest = Manifest(FORMAT, "scale", {}, image, classes, "synthetic", splits, files, count)
    write_atomic(folder / MANIFEST_NAME, manifest.to_json().encode())
    return folder


def _write_shard(folder: Path, split: str, number: int, size: int, pixels: int):
    from pipeline.manifest import ShardRecord
    from pipeline.preparation.tar_writer import TarWriter

    name = f"{split}/{split}-{number:06d}.tar"
    with (folder / name).open("wb") as file:
        writer = TarWriter(file)
        for sample in range(number * size, (number + 1) * size):
            image = sample.to_bytes(8, "little") * (pixels // 8)
            writer.add_sample(f"{split}-{sample:08d}", [("raw", image), ("cls", b"%d" % (sample % 10))])
        writer.finish()
    record = ShardRecord(name, size, writer.size_bytes, writer.sha256(), 0, "")
    index = writer.index()
    (folder / record.index_name).write_bytes(index)
    return dataclasses.replace(record, index_size_bytes=len(index), index_sha256=hashlib.sha256(index).hexdigest())


def open_loader(folder: Path, replicas: int, state: dict | None = None):
    """The last of some replicas, ``ROWS`` rows of each batch."""
    from pipeline.loader.batch import BatchShare
    from pipeline.loader.batches import TrainingLoader
    from pipeline.loader.config import LoaderConfig

    config = LoaderConfig(crop_px=SIDE_PX, mean="channel", threads=1)
    share = BatchShare(replicas - 1, replicas)
    return TrainingLoader(folder, config, batch_size=ROWS * replicas, seed=1, share=share, state=state)


def step_ms(work: Path, replicas: int) -> float:
    """A step of one of some replicas: the median of :data:`STEPS`, ms."""
    loader = open_loader(make_shards(work, 200, 500), replicas)
    loader.next()
    times = []
    for _ in range(min(STEPS, loader.steps_per_epoch - 4)):
        begin = time.perf_counter()
        loader.next()
        times.append(time.perf_counter() - begin)
    loader.close()
    return 1e3 * float(np.median(times))


def open_s(work: Path, samples: int) -> float:
    """Opening a set in one process, to the first batch, s."""
    folder = make_shards(work, samples // 2000, 2000)
    begin = time.perf_counter()
    open_loader(folder, 1).next()
    return time.perf_counter() - begin


def resume_s(work: Path, step: int) -> float:
    """Opening at a step and taking a batch, s."""
    folder = make_shards(work, 60, 2000)
    loader = open_loader(folder, 1)
    state = loader.state() | {"epoch": step // loader.steps_per_epoch, "position": step % loader.steps_per_epoch}
    loader.close()
    begin = time.perf_counter()
    open_loader(folder, 1, state).next()
    return time.perf_counter() - begin


# The fields of an operation of scale.py: name, what grows, unit, sizes, figure of a folder and a size, most exponent.
OPERATIONS: list[tuple[str, str, str, tuple[int, ...], Callable[[Path, int], float], float]] = [
    ("loader: a replica's step", "replicas", "ms a step", (1, 8, 64), step_ms, 0.0),
    ("loader: opening a set", "samples", "s", (40_000, 160_000, 640_000), open_s, 1.0),
    ("loader: resuming", "steps done", "s", (10, 1_000, 100_000), resume_s, 0.0),
]


def memory_mb() -> float:
    """Memory of this process that no file stands behind, MB."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e6


def describe_large(folder: Path) -> dict[str, float]:
    """Times (s) and memory (MB) of one process with a large set."""
    from pipeline.loader.batches import EvaluationLoader
    from pipeline.loader.config import LoaderConfig

    found: dict[str, float] = {}
    warm = open_loader(folder, 64)  # imports and what DALI keeps
    warm.next()
    warm.close()
    for replicas in (64, 1):
        before_mb, begin = memory_mb(), time.perf_counter()
        loader = open_loader(folder, replicas)
        loader.next()
        found[f"opened_s, of {replicas}"] = time.perf_counter() - begin
        found[f"memory_mb, of {replicas}"] = memory_mb() - before_mb
        begin = time.perf_counter()
        for _ in range(STEPS // 2):
            loader.next()
        found[f"step_ms, of {replicas}"] = 1e3 * (time.perf_counter() - begin) / (STEPS // 2)
        late = loader.state() | {"epoch": 5, "position": loader.steps_per_epoch - 3}
        loader.close()
        begin = time.perf_counter()
        loader = open_loader(folder, replicas, late)
        loader.next()
        found[f"resumed_late_s, of {replicas}"] = time.perf_counter() - begin
        loader.close()
    config = LoaderConfig(crop_px=SIDE_PX, mean="channel", threads=1)
    begin = time.perf_counter()
    evaluation = EvaluationLoader(folder, config, batch_size=ROWS, split="train")
    count = sum(len(batch.keys) for batch in evaluation)
    found["evaluated_s"] = time.perf_counter() - begin
    found["evaluated_samples"] = count
    return found | {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def main() -> None:
    """Command line."""
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for 2.6 GB of shards, kept")
    parser.add_argument("--shards", type=int, default=626)
    parser.add_argument("--shard-size", type=int, default=2000)
    arguments = parser.parse_args()
    if not (arguments.work / "manifest.json").exists():
        make_shards(arguments.work, arguments.shards, arguments.shard_size)
    print(json.dumps(describe_large(arguments.work), indent=1))


if __name__ == "__main__":
    main()
