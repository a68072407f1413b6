"""Data sets of as many samples as are asked for, in seconds: raw gray images of a few pixels, real tars and indexes."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np

SHARD_SIZE = 2048  # samples, as prepare makes them
CLASSES = 10


def write_tiny_set(folder: Path, train: int, val: int = 64, *, side_px: int = 8) -> Path:
    """Writes a data set in the layout of ``pipeline.manifest``; the same bytes for the same arguments."""
    from pipeline.manifest import FORMAT, MANIFEST_NAME, STATISTICS_NAME, ClassRecord, ImageFormat, Manifest

    splits = {name: _write_split(folder, name, count, side_px) for name, count in (("train", train), ("val", val))}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mean_image=np.full((side_px, side_px, 1), 128.0),
        mean=np.array([128.0]),
        covariance=np.array([[5461.0]]),
        eigenvalues=np.array([5461.0]),
        eigenvectors=np.array([[1.0]]),
        num_pictures=np.int64(train),
        num_pixels=np.int64(train * side_px**2),
    )
    (folder / STATISTICS_NAME).write_bytes(buffer.getvalue())
    sealed = {"size_bytes": len(buffer.getvalue()), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    image = ImageFormat("raw", 1, side_px, side_px)
    classes = tuple(ClassRecord(str(number), str(number)) for number in range(CLASSES))
    manifest = Manifest(FORMAT, "test", {}, image, classes, "source", splits, {STATISTICS_NAME: sealed}, train + val)
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return folder


def _write_split(folder: Path, split: str, count: int, side_px: int) -> object:
    """All shards of a split; its record."""
    from pipeline.manifest import ShardRecord, SplitRecord
    from pipeline.preparation.tar_writer import TarWriter

    (folder / split).mkdir(parents=True)
    random, shards = np.random.default_rng(0), []
    about = json.dumps({"width": side_px, "height": side_px, "converted": "", "label": 0}).encode()
    for number, begin in enumerate(range(0, count, SHARD_SIZE)):
        rows = range(begin, min(begin + SHARD_SIZE, count))
        name = f"{split}/{split}-{number:06d}.tar"
        with (folder / name).open("wb") as file:
            tar = TarWriter(file)
            for row in rows:
                pixels, label = random.bytes(side_px**2), str(row % CLASSES).encode()
                tar.add_sample(f"{split}-{row:08d}", [("raw", pixels), ("cls", label), ("json", about)])
            tar.finish()
        index = tar.index()
        (folder / name).with_suffix(".idx").write_bytes(index)
        size, digest = (folder / name).stat().st_size, hashlib.sha256(index).hexdigest()
        shards.append(ShardRecord(name, len(rows), size, tar.sha256(), len(index), digest))
    return SplitRecord(count, 0, tuple(shards))
