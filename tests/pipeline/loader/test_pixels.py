"""Every recipe against plain NumPy on images that PIL decoded: geometry exact, pixels within rounding."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.loader.augmentation import Augmentation, color_steps, ten_views
from pipeline.loader.batch import Batch
from pipeline.loader.batches import EvaluationLoader, TrainingLoader
from pipeline.loader.config import LoaderConfig
from pipeline.loader.open_split import read_statistics
from pipeline.manifest import read_manifest
from tests.helpers.loader_data_set import load_reference, make_data_set

pytestmark = pytest.mark.numeric

CROP = 32
BATCH = 6


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pixels")
    return {
        "jpeg": make_data_set(folder / "jpeg"),
        "png": make_data_set(folder / "png", encoding="png", size=(41, 39)),
        "raw": make_data_set(folder / "raw", encoding="raw", size=(44, 40)),
        "original": make_data_set(folder / "original", encoding="original"),
        "gray": make_data_set(folder / "gray", channels=1),
        "gray-png": make_data_set(folder / "gray-png", encoding="png", channels=1),
        "wide": make_data_set(folder / "wide", encoding="png", size=(48, 36)),
    }


def normalize(
    stored: np.ndarray, view: np.ndarray, shift: np.ndarray, config: LoaderConfig, arrays: dict[str, np.ndarray]
) -> np.ndarray:
    """The definition, in float64: uint8 (H, W, C) to (C, S, S); not the division, which belongs to the color noise."""
    size = config.crop_px

    def cut(image: np.ndarray) -> np.ndarray:
        x, y, mirror = (int(value) for value in view)
        crop = image[y : y + size, x : x + size]
        return crop[:, ::-1] if mirror else crop

    result = cut(stored.astype(np.float64))
    if config.mean == "channel":
        result = result - arrays["mean"]
    elif config.mean == "image":
        result = result - cut(arrays["mean_image"])
    elif config.mean == "image_center":
        top, left = ((length - size) // 2 for length in stored.shape[:2])
        result = result - arrays["mean_image"][top : top + size, left : left + size]
    result = result + shift
    if config.normalize == "per_channel":
        result = result / np.sqrt(np.diag(arrays["covariance"]))
    elif config.normalize == "per_image":
        result = (result - result.mean()) / np.sqrt(result.var() + 1e-3)
    return result.transpose(2, 0, 1)


def tolerance(config: LoaderConfig, arrays: dict[str, np.ndarray], data: str) -> float:
    """One gray level in the recipe's unit for JPEG; float rounding for images without loss."""
    if config.normalize == "per_image":
        level = 0.1  # these crops deviate by 10 gray levels or more
    elif config.normalize == "per_channel":
        level = 1 / np.sqrt(np.diag(arrays["covariance"])).min()
    else:
        level = 1.0
    return level * (1.0 if data in ("jpeg", "original", "gray") else 1e-3)


RECIPES = [
    {"mean": "none"},
    {"mean": "none", "mirror": 0.0},
    {"mean": "channel"},
    {"mean": "channel", "normalize": "per_channel"},
    {"mean": "image"},
    {"mean": "image", "color": "eigenvalue"},
    {"mean": "image", "color": "deviation", "normalize": "per_channel"},
    {"mean": "image_center", "color": "deviation", "color_divisor": 1.1, "crop_shared_by": 4},
    {"mean": "image_center", "normalize": "per_channel", "color": "deviation", "color_divisor": 2.0},
    {"mean": "image_center", "color_divisor": 2.0},  # no noise, no division
    {"mean": "image", "color": "deviation", "color_sigma": 0.0, "color_divisor": 2.0},
    {"mean": "none", "normalize": "per_image"},
    {"mean": "image", "color": "deviation", "normalize": "per_image", "color_divisor": 1.1},
    {"mean": "image", "crop_px": 40},
]
OTHER_DATA = [
    (data, recipe)
    for data in ("png", "raw", "original", "gray", "gray-png", "wide")
    for recipe in (
        {"mean": "image", "color": "deviation"},
        {"mean": "channel", "normalize": "per_channel"},
        {"mean": "image_center", "normalize": "per_image"},
        {"mean": "image_center"},  # png: an odd margin on both sides
    )
]


@pytest.mark.parametrize(("data", "recipe"), [*(("jpeg", recipe) for recipe in RECIPES), *OTHER_DATA])
def test_training_images_equal_numpy(data_sets: dict[str, Path], data: str, recipe: dict[str, object]) -> None:
    folder = data_sets[data]
    config = LoaderConfig(**{"crop_px": CROP, "threads": 1, **recipe})
    loader = TrainingLoader(folder, config, batch_size=BATCH, seed=3)
    arrays, images = dict(np.load(folder / "statistics.npz")), load_reference(folder)
    manifest = read_manifest(folder)
    draws = Augmentation(
        config,
        3,
        manifest.image.height_px or 0,
        manifest.image.width_px or 0,
        color_steps(config, read_statistics(folder, manifest)),
    )
    for _ in range(loader.steps_per_epoch + 1):
        batch = loader.next()
        expected = draws.draw(batch.epoch, batch.position * BATCH, BATCH)
        assert np.array_equal(batch.draws, expected.geometry)
        for i, key in enumerate(batch.keys):
            image, label = images[key]
            assert batch.labels[i] == label
            reference = normalize(image, expected.geometry[i], expected.shift[i].astype(np.float64), config, arrays)
            if expected.shift.any() and config.normalize != "per_image":
                reference /= config.color_divisor
            assert np.abs(batch.images[i].numpy() - reference).max() <= tolerance(config, arrays, data), (key, i)
    assert batch.images.shape == (BATCH, manifest.image.channels, config.crop_px, config.crop_px)
    assert batch.images.is_contiguous()


@pytest.mark.parametrize("views", ["center", "ten"])
@pytest.mark.parametrize(
    ("data", "mean", "scale"),
    [
        ("jpeg", "image", "none"),
        ("png", "image_center", "none"),
        ("png", "channel", "per_channel"),
        ("raw", "image", "per_channel"),
        ("raw", "image", "per_image"),
        ("wide", "image", "none"),
        ("gray", "channel", "none"),
    ],
)
def test_evaluation_images_equal_numpy(
    data_sets: dict[str, Path], data: str, mean: str, scale: str, views: str
) -> None:
    folder = data_sets[data]
    training = {"color": "deviation", "mirror": 1.0, "color_divisor": 1.1}  # not in testing
    config = LoaderConfig(crop_px=CROP, mean=mean, normalize=scale, threads=1, **training)
    arrays, images = dict(np.load(folder / "statistics.npz")), load_reference(folder, "val")
    height, width = next(iter(images.values()))[0].shape[:2]
    geometry = ten_views(height_px=height, width_px=width, crop_px=CROP)
    if views == "center":
        geometry = geometry[2:3]
    seen: list[str] = []
    for batch in EvaluationLoader(folder, config, batch_size=4, views=views):
        seen += batch.keys
        for i, key in enumerate(batch.keys):
            stored, label = images[key]
            assert batch.labels[i] == label
            found = batch.images[i].numpy().reshape(len(geometry), -1, CROP, CROP)
            for view, image in zip(geometry, found, strict=True):
                reference = normalize(stored, view, np.zeros(1), config, arrays)
                assert np.abs(image - reference).max() <= tolerance(config, arrays, data)
    assert seen == sorted(images)


def test_a_flat_image_is_standardized_to_zero(tmp_path: Path) -> None:
    folder = make_data_set(tmp_path, encoding="png", size=(8, 8), train=2, val=1, flat=True)
    loader = TrainingLoader(folder, LoaderConfig(crop_px=8, mean="none", normalize="per_image"), batch_size=2, seed=0)
    assert np.abs(loader.next().images.numpy()).max() < 1e-3


def test_batches_stay_valid_while_later_ones_are_made(data_sets: dict[str, Path]) -> None:
    config = LoaderConfig(crop_px=CROP, threads=2, prefetch=3)
    loader = TrainingLoader(data_sets["png"], config, batch_size=BATCH, seed=1)
    held: list[tuple[Batch, np.ndarray]] = []
    for _ in range(12):
        batch = loader.next()
        held.append((batch, batch.images.numpy().copy()))
    loader.close()
    del loader
    assert all(np.array_equal(batch.images.numpy(), copy) for batch, copy in held)
    assert len({batch.images.data_ptr() for batch, _ in held}) == 12
