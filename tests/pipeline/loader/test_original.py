"""The images of ``configs/original.toml`` against the original program's, written here in NumPy with its own numbers.

The reference knows neither the loader's code nor the recipe: 1.1, 0.1, the center of the mean image stand in it. Only
where a crop lies is taken from the batch; the color noise is drawn again, from the same counters.
"""

import dataclasses
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.loader.batch import Batch, BatchShare, SplitFeed
from pipeline.loader.batches import EvaluationLoader, TrainingLoader
from pipeline.loader.config import LoaderConfig
from tests.helpers.loader_data_set import load_reference, make_data_set

CROP, SIDE = 30, 41  # an odd margin: 11 px, so the center begins at 5
BATCH, SEED = 6, 11
NOISE_ENDS = 67  # the first epoch without it, counted from 0
STEPS_PER_EPOCH = 2
TABLE = tomllib.loads((Path(__file__).resolve().parents[3] / "configs" / "original.toml").read_text())["data"]
RECIPE = LoaderConfig(**{**TABLE, "crop_px": CROP, "threads": 1, "prefetch": 5})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("original")
    shape = {"size": (SIDE, SIDE), "train": BATCH * STEPS_PER_EPOCH, "val": 7}
    return {name: make_data_set(folder / name, encoding=name, **shape) for name in ("jpeg", "png", "raw")}  # type: ignore[arg-type]


def noise(epoch: int, sample: int, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """0.1 N(0,1) standard deviations along each eigenvector of RGB, (3,) gray levels."""
    generator = np.random.Philox(key=np.array([SEED, 2 * epoch + 1], np.uint64), counter=np.array([sample, 0, 0, 0]))
    u = (generator.random_raw(4) >> np.uint64(11)) / 2.0**53
    radius = np.sqrt(-2 * np.log(1 - u[[0, 2]]))
    normal = [*(radius * np.cos(2 * np.pi * u[[1, 3]])), radius[0] * np.sin(2 * np.pi * u[1])]
    return sum(0.1 * normal[k] * np.sqrt(arrays["eigenvalues"][k]) * arrays["eigenvectors"][:, k] for k in range(3))


def as_the_program(pixels: np.ndarray, x: int, y: int, mirror: int, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """A test image: (H, W, 3) to (3, S, S), the center of the mean image subtracted, and nothing else."""
    crop = pixels[y : y + 30, x : x + 30].astype(np.float64)
    crop = crop[:, ::-1] if mirror else crop
    return (crop - arrays["mean_image"][5:35, 5:35]).transpose(2, 0, 1)


def assert_training_images(batch: Batch, folder: Path) -> None:
    """Noise and the division by 1.1 before epoch 67; neither from then on."""
    arrays, images = dict(np.load(folder / "statistics.npz")), load_reference(folder)
    for row, (key, image, (x, y, mirror)) in enumerate(
        zip(batch.keys, batch.images.numpy(), batch.draws.tolist(), strict=True)
    ):
        expected = as_the_program(images[key][0], x, y, mirror, arrays)
        if batch.epoch < 67:
            added = noise(batch.epoch, batch.position * BATCH + row, arrays)
            assert np.abs(added).max() > 0.1
            expected = (expected + added[:, None, None]) / 1.1
        assert np.abs(image - expected).max() <= tolerance(folder), (batch.epoch, batch.position, key)


def tolerance(folder: Path) -> float:
    """JPEG: DALI's decoder and libjpeg-turbo differ by a level here and there."""
    return 1.001 if folder.name == "jpeg" else 1e-3


def before_the_end(folder: Path, config: LoaderConfig = RECIPE, **arguments: object) -> TrainingLoader:
    """A loader whose next batch is the last with noise."""
    loader = TrainingLoader(folder, config, batch_size=BATCH, seed=SEED, **arguments)  # type: ignore[arg-type]
    for _ in range(NOISE_ENDS * STEPS_PER_EPOCH - 1):
        loader.next()
    return loader


def test_the_recipe_is_read() -> None:
    assert (RECIPE.color_off_epoch, RECIPE.normalize, RECIPE.mean) == (NOISE_ENDS, "none", "image_center")
    assert RECIPE.crop_shared_by == 32


@pytest.mark.parametrize("encoding", ["jpeg", "png", "raw"])
def test_training_with_noise_and_after_it(folders: dict[str, Path], encoding: str) -> None:
    """Across the epoch in which it ends, which DALI has prefetched five batches before."""
    folder = folders[encoding]
    loader = TrainingLoader(folder, RECIPE, batch_size=BATCH, seed=SEED)
    for number in range((NOISE_ENDS + 2) * STEPS_PER_EPOCH):
        batch = loader.next()
        assert (batch.epoch, batch.position) == divmod(number, STEPS_PER_EPOCH)
        if number < 3 or number > (NOISE_ENDS - 1) * STEPS_PER_EPOCH:
            assert_training_images(batch, folder)


def test_resumed_around_the_end_of_the_noise(folders: dict[str, Path]) -> None:
    loader = before_the_end(folders["raw"])
    for _ in range(3):  # in the last epoch with noise, between the two, in the first without
        state = loader.state()
        resumed = TrainingLoader(folders["raw"], RECIPE, batch_size=BATCH, seed=SEED, state=state)
        batch = loader.next()
        for found in (batch, resumed.next()):
            assert_training_images(found, folders["raw"])
            assert found.images.equal(batch.images) and found.fingerprint == batch.fingerprint


@pytest.mark.parametrize("way", ["shares", "split feed"])
def test_the_noise_ends_in_every_way_of_reading(folders: dict[str, Path], way: str) -> None:
    if way == "split feed":
        feed, config = SplitFeed(0, 1, lambda crops: crops), dataclasses.replace(RECIPE, decode="sharded")
        loaders = [before_the_end(folders["png"], config, split_feed=feed)]
    else:
        loaders = [before_the_end(folders["png"], share=BatchShare(part, 2)) for part in range(2)]
    for _ in range(3):
        parts = [loader.next() for loader in loaders]
        whole = dataclasses.replace(
            parts[0],
            images=torch.cat([part.images for part in parts]),
            keys=sum((part.keys for part in parts), ()),
            draws=np.concatenate([part.draws for part in parts]),
        )
        assert_training_images(whole, folders["png"])


@pytest.mark.parametrize("encoding", ["jpeg", "png", "raw"])
@pytest.mark.parametrize("views", ["center", "ten"])
def test_testing(folders: dict[str, Path], encoding: str, views: str) -> None:
    """No noise, no division: the center, or corners and center and then the same mirrored."""
    folder = folders[encoding]
    arrays, stored = dict(np.load(folder / "statistics.npz")), load_reference(folder, "val")
    places = [(0, 0), (11, 0), (5, 5), (0, 11), (11, 11)]
    looks = [(x, y, mirror) for mirror in (0, 1) for x, y in places] if views == "ten" else [(5, 5, 0)]
    seen = 0
    for batch in EvaluationLoader(folder, RECIPE, batch_size=4, views=views):
        for key, images in zip(batch.keys, batch.images.numpy(), strict=True):
            for image, look in zip(images if views == "ten" else images[None], looks, strict=True):
                expected = as_the_program(stored[key][0], *look, arrays)
                assert np.abs(image - expected).max() <= tolerance(folder), (key, look)
            seen += 1
    assert seen == 7
