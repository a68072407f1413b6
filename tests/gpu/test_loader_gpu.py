"""The loader on a CUDA device: batches as on the CPU, the input kernel, safe buffers, resume, the decoder's sweep."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.loader.batch import SplitFeed
from pipeline.loader.batches import EvaluationLoader, TrainingLoader
from pipeline.loader.bench import BenchOptions, run_bench
from pipeline.loader.config import LoaderConfig
from pipeline.loader.graph import DECODER_SHARES, Decoding, measure_decoder_shares, with_decoder_share
from pipeline.loader.input_rule import InputRule, by_torch
from pipeline.loader.net_input import find_kernel
from pipeline.loader.open_split import open_split
from tests.helpers.gpu_net_input import check_flat_images, check_net_input, make_rows, rounding_bound
from tests.helpers.loader_data_set import make_data_set

triton_input = pytest.importorskip("pipeline.loader.triton_input", reason="Triton comes with torch's CUDA wheels")
net_input = triton_input.net_input
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CROP, BATCH = 56, 8
# Gray levels. The GPU's inverse DCT may round Y, Cb and Cr one level away from libjpeg-turbo's (the most that IEEE 1180
# lets a decoder be off). That is 1 + 1.402 of red, 1 + 0.344 + 0.714 of green, 1 + 1.772 of blue, and rounding to whole
# levels on both sides adds less than 1 more: 3 at most.
LEVELS = 3.0
CONFIG = LoaderConfig(crop_px=CROP, color="deviation", threads=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
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
        level = 1.0 / config.color_divisor
        if config.normalize != "none":
            level = 0.05  # these photos deviate by 20 gray levels and more
        rounding = 2 * rounding_bound(255 + 255 + 100, level)  # of float32, on both sides
        tolerance = level * (LEVELS if name in ("jpeg", "gray") else 0.0) + 2 * rounding
        difference = (a.images - b.images.cpu()).abs()
        assert float(difference.max()) <= tolerance
        assert float(difference.mean()) <= tolerance / 10 + rounding
        assert b.images.is_contiguous(memory_format=torch.channels_last)


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


@pytest.mark.parametrize("name", ["raw", "jpeg"])
def test_split_feed_equals_each(folders: dict[str, Path], name: str) -> None:
    """Two halves are the whole: raw images bit for bit; of JPEGs the GPU's decoder rounds with the size of a batch."""
    config = LoaderConfig(**{**vars(CONFIG), "decode": "sharded"})
    arguments = {"batch_size": BATCH, "seed": 3, "device": "cuda:0"}
    parts: list[torch.Tensor] = []

    def collect(crops: torch.Tensor) -> torch.Tensor:
        assert crops.dtype == torch.uint8 and crops.shape == (BATCH // 2, CROP, CROP, 3)
        parts.append(crops.clone())
        return torch.cat([crops, crops])

    for part in range(2):
        feed = SplitFeed(part, 2, collect)
        TrainingLoader(folders[name], config, split_feed=feed, **arguments).next()
    joined = SplitFeed(0, 2, lambda _: torch.cat(parts))
    batch = TrainingLoader(folders[name], config, split_feed=joined, **arguments).next()
    each = TrainingLoader(folders[name], CONFIG, **arguments).next()
    assert batch.fingerprint == each.fingerprint
    difference = float((batch.images - each.images).abs().max())
    assert difference <= (LEVELS + rounding_bound(255 + 255 + 100, 1.0) if name == "jpeg" else 0.0)


def test_the_input_kernel_equals_its_definition() -> None:
    """In float64, on odd sizes and the paper's; and it is the kernel that made the loader's batches."""
    assert find_kernel(InputRule(None, None, False, torch.float32), CROP, 3, "cuda:0") is net_input
    check_net_input("cuda:0")
    check_flat_images("cuda:0")


@pytest.mark.parametrize("standardize", [False, True])
def test_torch_operations_do_the_same(standardize: bool) -> None:
    """What works where Triton cannot be had, on the GPU too."""
    crops = torch.randint(256, (4, 57, 57, 3), dtype=torch.uint8, device="cuda:0")
    image = 255 * torch.rand(64, 61, 3, device="cuda:0")
    rows, rule = make_rows(4, (4, 7), 3).cuda(), InputRule(image, None, standardize, torch.float32)
    bound = rounding_bound(255 + 255 + 200, 1.5)
    torch.testing.assert_close(by_torch(crops, rows, rule), net_input(crops, rows, rule), rtol=1e-6, atol=2 * bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_waits_for_nothing_of_torch(folders: dict[str, Path], dtype: torch.dtype) -> None:
    """Labels and what differs between images follow from pinned memory; torch refuses whatever would wait."""
    loader = TrainingLoader(folders["raw"], CONFIG, batch_size=BATCH, seed=3, device="cuda:0", dtype=dtype)
    loader.next()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [loader.next() for _ in range(6)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(batch.images.dtype == dtype for batch in batches)


def test_batches_on_another_stream(folders: dict[str, Path]) -> None:
    """Whatever torch's current stream is, the kernel waits for DALI's crops, and DALI for the kernel."""
    arguments = {"batch_size": BATCH, "seed": 3, "device": "cuda:0"}
    usual = TrainingLoader(folders["raw"], CONFIG, **arguments)
    expected = [usual.next().images for _ in range(12)]
    torch.cuda.synchronize()
    stream, loader = torch.cuda.Stream(), TrainingLoader(folders["raw"], CONFIG, **arguments)
    with torch.cuda.stream(stream):
        found = []
        for _ in range(12):
            torch.cuda._sleep(5_000_000)  # kernels wait behind it, while DALI goes on
            found.append(loader.next().images)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bench_takes_the_gpu(folders: dict[str, Path]) -> None:
    result = run_bench(folders["raw"], CONFIG, BenchOptions(batch_size=BATCH, seconds=0.05, repeats=1))
    assert result.device == "cuda:0" and all(row.images_per_s > 0 for row in result.stages)


def test_the_sweep_measures_every_share_and_chooses_one(folders: dict[str, Path]) -> None:
    config = LoaderConfig(**{**vars(CONFIG), "hw_decoder_load": -1})
    split = open_split(folders["jpeg"], "train")
    chosen = with_decoder_share(Decoding(split, config, BATCH, "cuda:0"))
    assert chosen.config.hw_decoder_load in DECODER_SHARES
    rates = measure_decoder_shares(Decoding(split, CONFIG, BATCH, "cuda:0"))
    assert set(rates) == set(DECODER_SHARES) and min(rates.values()) > 0
