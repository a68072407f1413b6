"""The loader on a CUDA device: batches as on the CPU, safe buffers, resume, raw shards, the decoder's sweep."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.loader.batch import SplitFeed
from pipeline.loader.batches import EvaluationLoader, TrainingLoader
from pipeline.loader.config import LoaderConfig
from pipeline.loader.graph import DECODER_SHARES, Decoding, measure_decoder_shares, with_decoder_share
from pipeline.loader.open_split import open_split
from tests.helpers.loader_data_set import make_data_set

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CROP, BATCH = 56, 8
LEVELS = 3.0  # the GPU's inverse DCT and color conversion round otherwise than libjpeg-turbo's
CONFIG = LoaderConfig(crop_px=CROP, color="deviation", threads=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gpu")
    shapes = {"jpeg": ("jpeg", 3), "png": ("png", 3), "raw": ("raw", 3), "gray": ("jpeg", 1)}
    return {
        name: make_data_set(folder / name, encoding=encoding, channels=channels, size=(72, 64), train=40, val=11)
        for name, (encoding, channels) in shapes.items()
    }


@pytest.mark.parametrize("name", ["jpeg", "png", "raw", "gray"])
@pytest.mark.parametrize(
    "recipe",
    [
        {"mean": "image"},
        {"mean": "image_center", "color_divisor": 1.1},
        {"mean": "channel", "normalize": "per_channel"},
        {"mean": "none", "normalize": "per_image"},
    ],
)
def test_batches_equal_the_cpu(folders: dict[str, Path], name: str, recipe: dict[str, object]) -> None:
    config = LoaderConfig(**{**vars(CONFIG), **recipe})
    arguments = {"batch_size": BATCH, "seed": 3}
    on_cpu = TrainingLoader(folders[name], config, **arguments)
    on_gpu = TrainingLoader(folders[name], config, device="cuda:0", **arguments)
    for _ in range(7):
        a, b = on_cpu.next(), on_gpu.next()
        assert b.images.device == b.labels.device == torch.device("cuda:0")
        assert a.fingerprint == b.fingerprint and a.keys == b.keys and np.array_equal(a.draws, b.draws)
        assert torch.equal(a.labels, b.labels.cpu())
        level = 1.0
        if config.normalize != "none":
            level = 0.05  # these photos deviate by 20 gray levels and more
        tolerance = level * (LEVELS if name in ("jpeg", "gray") else 1e-3)
        difference = (a.images - b.images.cpu()).abs()
        assert float(difference.max()) <= tolerance
        assert float(difference.mean()) <= tolerance / 10


@pytest.mark.parametrize("views", ["center", "ten"])
def test_evaluation_equals_the_cpu(folders: dict[str, Path], views: str) -> None:
    on_cpu = list(EvaluationLoader(folders["png"], CONFIG, batch_size=4, views=views))
    on_gpu = list(EvaluationLoader(folders["png"], CONFIG, batch_size=4, views=views, device="cuda:0"))
    assert sum(len(batch.keys) for batch in on_gpu) == 11
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert a.keys == b.keys and float((a.images - b.images.cpu()).abs().max()) < 1e-3


def test_interrupted_equals_uninterrupted(folders: dict[str, Path]) -> None:
    arguments = {"batch_size": BATCH, "seed": 3, "device": "cuda:0"}
    loader = TrainingLoader(folders["jpeg"], CONFIG, **arguments)
    states, whole = [], []
    for _ in range(13):
        states.append(loader.state())
        whole.append(loader.next())
    for cut in (0, 1, 4, 5, 6, 10):
        resumed = TrainingLoader(folders["jpeg"], CONFIG, state=states[cut], **arguments)
        for expected in whole[cut : cut + 3]:
            batch = resumed.next()
            assert batch.fingerprint == expected.fingerprint and torch.equal(batch.images, expected.images)


def test_a_state_of_the_cpu_continues_on_the_gpu(folders: dict[str, Path]) -> None:
    loader = TrainingLoader(folders["jpeg"], CONFIG, batch_size=BATCH, seed=3)
    for _ in range(7):
        loader.next()
    moved = TrainingLoader(folders["jpeg"], CONFIG, batch_size=BATCH, seed=3, device="cuda:0", state=loader.state())
    for _ in range(4):
        assert loader.next().fingerprint == moved.next().fingerprint
    back = TrainingLoader(folders["jpeg"], CONFIG, batch_size=BATCH, seed=3, state=moved.state())
    assert loader.next().fingerprint == back.next().fingerprint


def test_memory_given_back_is_not_reused_before_torch_has_read_it(folders: dict[str, Path]) -> None:
    """Each batch is dropped while kernels that read it still wait behind slow work on torch's stream."""
    loader = TrainingLoader(folders["raw"], CONFIG, batch_size=BATCH, seed=3, device="cuda:0")
    sums = []
    for _ in range(40):
        images = loader.next().images
        torch.cuda._sleep(20_000_000)  # about 10 ms
        sums.append(images.double().sum())
        del images
    again = TrainingLoader(folders["raw"], CONFIG, batch_size=BATCH, seed=3, device="cuda:0")
    for value in sums:
        images = again.next().images
        torch.cuda.synchronize()
        assert float(images.double().sum()) == float(value)


def test_split_feed_equals_each(folders: dict[str, Path]) -> None:
    config = LoaderConfig(**{**vars(CONFIG), "decode": "sharded"})
    arguments = {"batch_size": BATCH, "seed": 3, "device": "cuda:0"}
    parts: list[torch.Tensor] = []

    def collect(crops: torch.Tensor) -> torch.Tensor:
        parts.append(crops.clone())
        return torch.cat([crops, crops])

    for part in range(2):
        feed = SplitFeed(part, 2, collect)
        TrainingLoader(folders["jpeg"], config, split_feed=feed, **arguments).next()
    whole = SplitFeed(0, 1, lambda crops: crops)
    expected = TrainingLoader(folders["jpeg"], config, split_feed=whole, **arguments).next()
    joined = SplitFeed(0, 2, lambda _: torch.cat(parts))
    batch = TrainingLoader(folders["jpeg"], config, split_feed=joined, **arguments).next()
    assert torch.equal(batch.images, expected.images)
    each = TrainingLoader(folders["jpeg"], CONFIG, **arguments).next()
    assert float((batch.images - each.images).abs().max()) < 1e-3


def test_the_sweep_measures_every_share_and_chooses_one(folders: dict[str, Path]) -> None:
    config = LoaderConfig(**{**vars(CONFIG), "hw_decoder_load": -1})
    split = open_split(folders["jpeg"], "train")
    chosen = with_decoder_share(Decoding(split, config, BATCH, "cuda:0"))
    assert chosen.config.hw_decoder_load in DECODER_SHARES
    rates = measure_decoder_shares(Decoding(split, CONFIG, BATCH, "cuda:0"))
    assert set(rates) == set(DECODER_SHARES) and min(rates.values()) > 0
