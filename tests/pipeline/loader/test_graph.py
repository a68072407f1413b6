"""The GPU's graph, as far as DALI defines one without a GPU: which operator runs where, with which arguments."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.loader.augmentation import ten_views
from pipeline.loader.batches import TrainingLoader
from pipeline.loader.config import LoaderConfig
from pipeline.loader.graph import (
    Decoding,
    crops_graph,
    define_pipeline,
    evaluation_crops_graph,
    evaluation_graph,
    training_graph,
)
from pipeline.loader.open_split import open_split
from tests.helpers.loader_data_set import make_data_set

ENCODINGS = {
    "jpeg": ("jpeg", 3),
    "png": ("png", 3),
    "raw": ("raw", 3),
    "gray": ("jpeg", 1),
    "original": ("original", 3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("graph")
    return {
        name: make_data_set(folder / name, encoding=encoding, channels=channels, size=(16, 16), train=4, val=2)
        for name, (encoding, channels) in ENCODINGS.items()
    }


def operators(folder: Path, graph: str, device: str, **fields: Any) -> dict[str, list[str]]:
    """Operator name -> devices of its instances."""
    config = LoaderConfig(**{"crop_px": 12, **fields})
    split = open_split(folder, "train")
    decoding = Decoding(split, config, 2, device)
    views = ten_views(height_px=16, width_px=16, crop_px=12)
    zeros, ones = np.zeros(split.manifest.image.channels), np.ones(split.manifest.image.channels)
    graphs = {
        "training": lambda: training_graph(decoding, lambda _: ()),
        "crops": lambda: crops_graph(decoding, lambda _: ()),
        "center": lambda: evaluation_crops_graph(decoding, lambda _: (), views[2:3]),
        "ten": lambda: evaluation_crops_graph(decoding, lambda _: (), views),
        "ten, on a CPU": lambda: evaluation_graph(decoding, lambda _: (), views, zeros, ones),
    }
    pipeline = define_pipeline(decoding, graphs[graph])
    found: dict[str, list[str]] = {}
    pipeline._build_graph()  # what build() does first, before it asks for the device
    for operator in pipeline._ops:
        text = str(operator.spec)
        device_line = next(line for line in text.splitlines() if line.strip().startswith("device:"))
        found.setdefault(text.split()[2].rstrip(":"), []).append(device_line.split(":")[1].strip())
    return found


@pytest.mark.parametrize("graph", ["crops", "center", "ten"])
@pytest.mark.parametrize("name", list(ENCODINGS))
def test_the_gpu_decodes_and_crops(folders: dict[str, Path], name: str, graph: str) -> None:
    found = operators(folders[name], graph, "cuda:0")
    decoders = [
        device for operator, devices in found.items() if operator.startswith("decoders__") for device in devices
    ]
    assert decoders == ([] if name == "raw" else ["mixed"])
    assert set(found["Crop"]) == {"gpu"} and "CropMirrorNormalize" not in found
    assert set(found["ExternalSource"]) == {"cpu"}


def test_the_cpu_graph_stays_on_the_cpu(folders: dict[str, Path]) -> None:
    for name in ENCODINGS:
        found = operators(folders[name], "training", "cpu")
        assert {device for devices in found.values() for device in devices} == {"cpu"}
        assert ("decoders__ImageCrop" in found) == (name in ("jpeg", "png", "gray"))  # stops at the crop's edge


def test_ten_views_decode_once(folders: dict[str, Path]) -> None:
    found = operators(folders["jpeg"], "ten", "cuda:0")
    assert len(found["decoders__Image"]) == 1 and len(found["Crop"]) == 5  # the mirrored views are the same crops
    found = operators(folders["jpeg"], "ten, on a CPU", "cpu")
    assert len(found["decoders__Image"]) == 1 and len(found["CropMirrorNormalize"]) == 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")
def test_a_missing_device_is_one_line(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="device is 'cuda:0': this machine has 0 CUDA devices"):
        TrainingLoader(folders["jpeg"], LoaderConfig(crop_px=12), batch_size=2, seed=0, device="cuda:0")
