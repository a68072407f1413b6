"""A GPU's way to the net's input, uint8 crops and one rule, equals the CPU's for every recipe; run on the CPU here."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.loader import batches
from pipeline.loader.augmentation import Augmentation, color_steps
from pipeline.loader.batch import Batch, BatchShare, SplitFeed, shares_decoding
from pipeline.loader.batches import EvaluationLoader, TrainingLoader
from pipeline.loader.config import LoaderConfig
from pipeline.loader.image_reader import ImageReader
from pipeline.loader.input_rule import InputRule, by_torch
from pipeline.loader.net_input import SWITCH, NetInput, find_kernel
from pipeline.loader.normalize import Normalizer
from pipeline.loader.open_split import read_statistics
from pipeline.manifest import read_manifest
from tests.helpers.gpu_net_input import rounding_bound
from tests.helpers.loader_data_set import load_reference, make_data_set

pytestmark = pytest.mark.numeric

CROP, BATCH, SEED = 32, 6, 3
CONFIG = LoaderConfig(crop_px=CROP, threads=1)
RECIPES = [
    {"mean": mean, "normalize": normalize, "color": color, "color_divisor": divisor}
    for mean, normalize, (color, divisor) in itertools.product(
        ("none", "channel", "image", "image_center"),
        ("none", "per_channel", "per_image"),
        (("none", 1.1), ("deviation", 1.0), ("deviation", 1.1), ("eigenvalue", 1.1)),
    )
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Odd margins on both sides (png), and others."""
    folder = tmp_path_factory.mktemp("net-input")
    return {
        "png": make_data_set(folder / "png", encoding="png", size=(41, 37)),
        "raw": make_data_set(folder / "raw", encoding="raw", size=(44, 40)),
        "gray": make_data_set(folder / "gray", channels=1, size=(37, 40)),
        "whole": make_data_set(folder / "whole", encoding="raw", size=(CROP, CROP)),  # nothing to cut off
    }


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaders that are opened from now on hand over crops, though on the CPU."""

    def make(normalizer: Normalizer, decoding: Any, dtype: torch.dtype = torch.float32) -> NetInput:
        return NetInput(normalizer, device=decoding.device, dtype=dtype)

    monkeypatch.setattr(batches, "make_net_input", make)


def crops_of(folder: Path, geometry: np.ndarray, keys: tuple[str, ...]) -> torch.Tensor:
    """Cut by NumPy out of the stored images, not mirrored: uint8 (N, S, S, C)."""
    images = load_reference(folder)
    cut = [images[key][0][y : y + CROP, x : x + CROP] for key, (x, y, _) in zip(keys, geometry.tolist(), strict=True)]
    return torch.from_numpy(np.stack(cut))


def bounds(exact: torch.Tensor, net_input: NetInput, rows: torch.Tensor) -> torch.Tensor:
    """What two float32 computations of ``exact`` may differ by: (N, 1, 1, 1).

    Standardizing multiplies that by 1 / deviation, and adds what its own sums round.
    """
    factor, channels = float(rows[:, -1].max()), (rows.shape[1] - 3) // 2
    error = rounding_bound(255 + 255 + float(rows[:, 3 : 3 + channels].abs().max()), factor)
    if not net_input._rule.standardize:
        return torch.tensor(error)
    largest = exact.abs().amax(dim=(1, 2, 3), keepdim=True)  # at most 255 * factor / deviation
    return 4 * error * largest / (20 * factor) + rounding_bound(1, 4) * largest


@pytest.mark.parametrize("data", ["png", "raw", "gray"])
def test_the_rule_equals_the_cpus_way(folders: dict[str, Path], data: str) -> None:
    """In float64 against DALI's float32, within rounding: every recipe on odd sizes, some of them on the others."""
    folder = folders[data]
    manifest = read_manifest(folder)
    statistics = read_statistics(folder, manifest)
    crops: torch.Tensor | None = None
    for recipe in RECIPES if data == "png" else RECIPES[::7]:
        config = dataclasses.replace(CONFIG, **recipe)  # type: ignore[arg-type]
        batch = TrainingLoader(folder, config, batch_size=BATCH, seed=SEED).next()
        size = manifest.image.height_px or 0, manifest.image.width_px or 0
        augmentation = Augmentation(config, SEED, *size, color_steps(config, statistics))
        draws = augmentation.draw(0, 0, BATCH)
        assert {0, 1} == set(draws.geometry[:, 2].tolist())
        net_input = NetInput(Normalizer(config, statistics), device="cpu")
        rows = net_input.rows(draws, augmentation.divisor(0)).double()
        rule = dataclasses.replace(net_input._rule, dtype=torch.float64)
        crops = crops_of(folder, draws.geometry, batch.keys) if crops is None else crops  # no recipe changes them
        exact = by_torch(crops, rows, rule)
        assert exact.dtype == rule.dtype
        assert bool(((batch.images - exact).abs() <= bounds(exact, net_input, rows)).all()), recipe
        found = net_input(crops, draws, augmentation.divisor(0))
        assert bool(((found - exact).abs() <= bounds(exact, net_input, rows)).all()), recipe


def assert_equal_batches(found: Batch, expected: Batch) -> None:
    """The same to all that looks at a batch; the images within rounding, and channels_last."""
    assert (found.keys, found.fingerprint, found.order_fingerprint) == (
        expected.keys,
        expected.fingerprint,
        expected.order_fingerprint,
    )
    assert torch.equal(found.labels, expected.labels) and np.array_equal(found.draws, expected.draws)
    assert found.images.shape == expected.images.shape and found.images.dtype == torch.float32
    images = found.images.flatten(0, -4)
    assert images.is_contiguous(memory_format=torch.channels_last)
    difference = float((images - expected.images.flatten(0, -4)).abs().max())
    assert difference <= rounding_bound(255 + 255 + 100, 1.0)


@pytest.mark.parametrize("data", ["png", "raw", "gray", "whole"])
def test_training_batches_are_the_cpus(folders: dict[str, Path], data: str, request: pytest.FixtureRequest) -> None:
    """Decoding, crops, draws, labels, into the second epoch, where the color noise ends; and after a resume."""
    config = dataclasses.replace(CONFIG, color="deviation", color_divisor=1.1, color_off_epoch=1)
    arguments: dict[str, Any] = {"batch_size": BATCH, "seed": SEED}
    loader = TrainingLoader(folders[data], config, **arguments)
    expected = [loader.next() for _ in range(7)]
    request.getfixturevalue("as_on_a_gpu")
    crops = TrainingLoader(folders[data], config, **arguments)
    for batch in expected[:3]:
        assert_equal_batches(crops.next(), batch)
    resumed = TrainingLoader(folders[data], config, state=crops.state(), **arguments)
    for batch in expected[3:]:
        assert_equal_batches(resumed.next(), batch)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_bfloat16_is_the_rounded_float32(folders: dict[str, Path]) -> None:
    """Once, at the end: what autocast would make of it."""
    arguments: dict[str, Any] = {"batch_size": BATCH, "seed": SEED}
    wide = TrainingLoader(folders["png"], CONFIG, **arguments).next().images
    low = TrainingLoader(folders["png"], CONFIG, dtype=torch.bfloat16, **arguments).next().images
    assert low.dtype == torch.bfloat16 and torch.equal(low, wide.bfloat16())
    assert low.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("views", "mean"), [("ten", "image"), ("center", "image_center")])
def test_evaluation_is_the_cpus(
    folders: dict[str, Path], views: str, mean: str, request: pytest.FixtureRequest
) -> None:
    config = dataclasses.replace(CONFIG, mean=mean)  # type: ignore[arg-type]
    expected = list(EvaluationLoader(folders["png"], config, batch_size=4, views=views))
    request.getfixturevalue("as_on_a_gpu")
    found = list(EvaluationLoader(folders["png"], config, batch_size=4, views=views))
    for batch, other in zip(found, expected, strict=True):
        assert_equal_batches(batch, other)


@pytest.mark.parametrize("views", ["center", "ten"])
def test_pictures_are_the_cpus(folders: dict[str, Path], views: str) -> None:
    """Predictions see on a GPU what they see on a CPU, mirrored views too."""
    reader = ImageReader(folders["png"], CONFIG, views=views)
    stored = [image for image, _ in list(load_reference(folders["png"]).values())[:3]]
    expected = reader.images(stored)
    reader._net_input = NetInput(reader._normalize, device="cpu")
    assert float((reader.images(stored) - expected).abs().max()) <= rounding_bound(255 + 255, 1.0)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_shared_decoding_exchanges_crops(folders: dict[str, Path]) -> None:
    """A quarter of float32's bytes; whoever has decoded which half, the images are the same, bit for bit."""
    config = dataclasses.replace(CONFIG, decode="sharded", color="deviation")
    arguments: dict[str, Any] = {"batch_size": BATCH, "seed": SEED}
    parts: list[torch.Tensor] = []

    def keep(crops: torch.Tensor) -> torch.Tensor:
        parts.append(crops.clone())
        return torch.cat([crops, crops])

    for part in range(2):
        TrainingLoader(folders["png"], config, split_feed=SplitFeed(part, 2, keep), **arguments).next()
    assert [(part.shape, part.dtype) for part in parts] == [((BATCH // 2, CROP, CROP, 3), torch.uint8)] * 2
    joined = SplitFeed(1, 2, lambda _: torch.cat(parts))
    batch = TrainingLoader(folders["png"], config, split_feed=joined, **arguments).next()
    whole = TrainingLoader(folders["png"], config, **arguments).next()
    assert torch.equal(batch.images, whole.images) and batch.fingerprint == whole.fingerprint


def test_decoding_is_shared_where_it_pays() -> None:
    """By default between GPUs, of images that must be decoded, in equal parts; said by the recipe, everywhere."""
    near, far = (SplitFeed(0, 2, torch.clone, between_gpus=gpus) for gpus in (True, False))
    partial = LoaderConfig(last_batch="partial")
    rows = [
        (LoaderConfig(), "jpeg", 128, near, True),
        (LoaderConfig(), "original", 128, near, True),
        (LoaderConfig(), "raw", 128, near, False),
        (LoaderConfig(), "jpeg", 128, far, False),
        (LoaderConfig(), "jpeg", 127, near, False),
        (partial, "jpeg", 128, near, False),
        (LoaderConfig(decode="replicated"), "jpeg", 128, near, False),
        (LoaderConfig(decode="sharded"), "raw", 128, far, True),
    ]
    for config, encoding, count, feed, wanted in rows:
        assert shares_decoding(config, encoding, count, feed) == wanted, (config.decode, encoding, count)


def test_a_loader_says_whether_it_shares_decoding(folders: dict[str, Path]) -> None:
    """Of a replica's rows; without a partner there is nobody to share with."""
    feed = SplitFeed(0, 2, lambda crops: torch.cat([crops, crops]), between_gpus=True)
    for name, share, wanted in (("png", (0, 1), True), ("png", (0, 2), False), ("raw", (0, 1), False)):
        loader = TrainingLoader(
            folders[name], CONFIG, batch_size=BATCH, seed=SEED, split_feed=feed, share=BatchShare(*share)
        )
        assert loader.shares_decoding == wanted  # 3 rows of a replica are no two equal parts
    assert not TrainingLoader(folders["png"], CONFIG, batch_size=BATCH, seed=SEED).shares_decoding


def test_statistics_of_other_images_are_refused(folders: dict[str, Path]) -> None:
    """A kernel would read behind the mean image's end."""
    for name, config in (("raw", CONFIG), ("gray", dataclasses.replace(CONFIG, mean="channel"))):
        with pytest.raises(ConfigError, match=r"the statistics are of images of .*, and these are 37x41x3"):
            EvaluationLoader(folders["png"], config, batch_size=4, statistics=folders[name])
        with pytest.raises(ConfigError, match="give those of images like these"):
            ImageReader(folders["png"], config, statistics=folders[name])
    EvaluationLoader(
        folders["png"], dataclasses.replace(CONFIG, mean="channel"), batch_size=4, statistics=folders["raw"]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")
def test_without_a_kernel_one_line_says_so(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = InputRule(None, None, standardize=False, dtype=torch.float32)
    assert find_kernel(rule, 8, 3, "cuda:0") is None
    said = capsys.readouterr().err
    assert said.startswith("note: torch operations instead of a compiled kernel") and said.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    assert find_kernel(rule, 8, 3, "cuda:0") is None
    monkeypatch.delenv("RANK")
    monkeypatch.setenv(SWITCH, "off")
    assert find_kernel(rule, 8, 3, "cuda:0") is None
    assert capsys.readouterr().err == ""
