"""Shards of ours, read whole and sample by sample equal by the readers others use: DALI, webdataset, timm, datasets."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.manifest import Manifest, read_manifest
from tests.helpers.shard_data import image, make_dataset

COUNT = 10

Samples = list[tuple[np.ndarray, int]]


def by_webdataset(folder: Path, manifest: Manifest) -> Samples:
    urls = [str(folder / shard.name) for shard in manifest.splits["train"].shards]
    rows = webdataset.WebDataset(urls, shardshuffle=False)
    return [(np.asarray(Image.open(io.BytesIO(row["png"]))), int(row["cls"])) for row in rows]


def by_dali(folder: Path, manifest: Manifest) -> Samples:
    dali = pytest.importorskip("nvidia.dali")
    shards = manifest.splits["train"].shards

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read() -> tuple:
        data, label, _ = dali.fn.readers.webdataset(
            paths=[str(folder / shard.name) for shard in shards],
            index_paths=[str(folder / shard.index_name) for shard in shards],
            ext=["png", "cls", "json"],
            missing_component_behavior="error",
            name="reader",
        )
        return dali.fn.decoders.image(data), label

    pipe = read()
    pipe.build()
    batches = [pipe.run() for _ in range(pipe.epoch_size("reader"))]
    return [(np.asarray(images[0]), int(bytes(np.asarray(labels[0])))) for images, labels in batches]


def by_timm(folder: Path, manifest: Manifest) -> Samples:
    pytest.importorskip("timm", reason="timm is not installed (pip install -e '.[dev]')")
    from timm.data import create_dataset

    rows = create_dataset("wds/", root=str(folder), split="train", is_training=False, batch_size=1)
    assert len(rows) == COUNT
    return [(np.asarray(image), int(label)) for image, label in rows]


def by_datasets(folder: Path, manifest: Manifest) -> Samples:
    os.environ["HF_HUB_OFFLINE"] = "1"
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install -e '.[dev]')")
    files = {"train": [str(folder / shard.name) for shard in manifest.splits["train"].shards]}
    rows = list(datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True))
    assert [row["json"]["label"] for row in rows] == [int(row["cls"]) for row in rows]
    return [(np.asarray(row["png"]), int(row["cls"])) for row in rows]


@pytest.mark.parametrize("read", [by_webdataset, by_dali, by_timm, by_datasets])
def test_every_reader_sees_the_same_samples(tmp_path: Path, read: Callable[[Path, Manifest], Samples]) -> None:
    make_dataset(tmp_path, COUNT)
    manifest = read_manifest(tmp_path)
    found = read(tmp_path, manifest)
    abouts = [
        json.loads(row["json"])
        for shard in manifest.splits["train"].shards
        for row in webdataset.WebDataset(str(tmp_path / shard.name), shardshuffle=False)
    ]
    assert len(found) == len(abouts) == COUNT
    for (pixels, label), about in zip(found, abouts, strict=True):
        np.testing.assert_array_equal(pixels, image(int(about["source"].removeprefix("images/")[:4])))
        assert label == about["label"]
