"""Rows of ``scale.py``: preparing, listing, checking, opening and loading data."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from growth import Operation, fastest_ms, peak_mib
from tiny_sets import write_tiny_set

ROWS = 128  # of a replica
STEPS = 8  # timed, after some that are not


def write_folder(folder: Path, count: int, classes: int = 10) -> Path:
    """Class folders with so many tiny JPEGs: links to a few files."""
    import numpy as np
    from PIL import Image

    (folder / "originals").mkdir(parents=True)
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32), np.uint8)
        Image.fromarray(pixels).save(folder / "originals" / f"{number}.jpg", quality=80)
    for number in range(count):
        place = folder / "images" / f"class-{number % classes}"
        if number < classes:
            place.mkdir(parents=True)
        os.link(folder / "originals" / f"{number % 20}.jpg", place / f"{number:07d}.jpg")
    return folder / "images"


def prepare_ms(work: Path, images: int) -> float:
    """An image's share of what `prepare` says that it took, without the start of Ray."""
    source = write_folder(work, images)
    command = [sys.executable, "-m", "pipeline", "prepare", "--source", "folder", "--input", str(source)]
    command += ["--output", str(work / "set"), "--workers", "2", "--shard-size", "1024"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=os.environ["PYTHONPATH"])
    found = re.search(r"prepared [\d,]+ images in ([\d.]+) s", done.stdout + done.stderr)
    assert found, done.stdout + done.stderr
    return 1000 * float(found[1]) / images


def listing_us(work: Path, images: int) -> float:
    """Listing class folders, a picture."""
    from pipeline.sources.folder import FolderSource

    source = write_folder(work, images)
    return 1000 * fastest_ms(lambda: FolderSource(source, 0.1, 0).listing(), rounds=3) / images


def verify_us(work: Path, samples: int) -> float:
    """`verify`, every hash, a sample."""
    from pipeline.inspection.verify import check_dataset
    from pipeline.manifest import read_manifest

    folder = write_tiny_set(work / "set", samples)
    manifest = read_manifest(folder)
    return 1000 * fastest_ms(lambda: check_dataset(folder, manifest), rounds=2, warm_up=0) / samples


def inspect_us(work: Path, samples: int) -> float:
    """`inspect`, a sample."""
    from pipeline.inspection.inspect import read_contents
    from pipeline.manifest import read_manifest

    folder = write_tiny_set(work / "set", samples)
    manifest = read_manifest(folder)
    return 1000 * fastest_ms(lambda: read_contents(folder, manifest, "train"), rounds=2, warm_up=0) / samples


def _loader(folder: Path, replicas: int, state: dict[str, Any] | None = None) -> Any:
    from pipeline.loader.batch import BatchShare
    from pipeline.loader.batches import TrainingLoader
    from pipeline.loader.config import LoaderConfig

    config = LoaderConfig(crop_px=8, mirror=0.0, mean="none", color="none", threads=1)
    share = BatchShare(replicas // 2, replicas)
    return TrainingLoader(folder, config, batch_size=ROWS * replicas, seed=1, share=share, state=state)


def loader_step_ms(work: Path, replicas: int) -> float:
    """A batch of the replica in the middle, 128 rows, once the queue's first ones are gone."""
    loader = _loader(write_tiny_set(work / "set", ROWS * 64 * (STEPS + 8)), replicas)
    for _ in range(8):
        loader.next()
    begin = time.perf_counter()
    for _ in range(STEPS):
        loader.next()
    return 1000 * (time.perf_counter() - begin) / STEPS


def opening_s(work: Path, samples: int) -> float:
    """Until the first batch is there."""
    folder = write_tiny_set(work / "set", samples)
    return fastest_ms(lambda: _loader(folder, 1).next(), rounds=3) / 1000


def opening_mib(work: Path, samples: int) -> float:
    """Memory until the first batch is there."""
    folder = write_tiny_set(work / "set", samples)
    _loader(write_tiny_set(work / "small", 4 * ROWS), 1).next()  # what DALI and torch take once
    return peak_mib(lambda: _loader(folder, 1).next())


def resume_s(work: Path, samples: int) -> float:
    """Until the first batch after the last quarter of an epoch's beginning is there."""
    folder = write_tiny_set(work / "set", samples)
    loader = _loader(folder, 1)
    for _ in range(3 * samples // 4 // ROWS):
        loader.next()
    state = loader.state()
    return fastest_ms(lambda: _loader(folder, 1, state).next(), rounds=3) / 1000


OPERATIONS = [
    Operation("prepare, an image", "images", "ms", (2000, 8000, 24000), prepare_ms, most=0),
    Operation("listing, a picture", "pictures", "us", (5000, 20000, 80000), listing_us, most=0, before="11 us"),
    Operation("verify, a sample", "samples", "us", (8192, 32768, 131072), verify_us, most=0),
    Operation("inspect, a sample", "samples", "us", (8192, 32768, 131072), inspect_us, most=0),
    Operation(
        "loader, a step of a replica", "replicas", "ms", (1, 8, 64), loader_step_ms, most=0, before="5.5, 41, 221 ms"
    ),
    Operation("opening, time", "samples", "s", (8192, 65536, 262144), opening_s, before="14 million: 45 s"),
    Operation("opening, memory", "samples", "MiB", (8192, 65536, 262144), opening_mib, before="440 bytes a sample"),
    Operation("resume late in an epoch", "samples", "s", (8192, 32768, 131072), resume_s),
]
