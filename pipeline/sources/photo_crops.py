"""Source ``photo-crops``: which photo does a crop come from? Ten photos that scikit-image and scikit-learn ship.

A small labeled set of real color images without a download. Each photo is cut into two halves, across its longer side,
before anything is resized; training crops come from the first half, test crops from the second. So no pixel, nor what
a resizing mixes of it, is in both.
"""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, SourceError
from pipeline.manifest import ClassRecord
from pipeline.sources.listing import Item, Listing, Source, SplitListing
from pipeline.sources.split import shuffled

# Photos in color, no drawings. Of the stereo pair only one: two views of one scene would be one class.
PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
}
HALVES = {"train": 0, "val": 1}
CROPS = {"train": 500, "val": 100}  # a photo
SHORT_PX = 128  # the shorter side of a half: photos of 300 and of 1,411 px then show things of about one size
CROP_PX = 40


@dataclasses.dataclass(frozen=True)
class PhotoCropsSource(Source):
    """Crops of 40x40 px, 500 a photo for training and 100 for testing, at seeded places that differ within a half.

    Attributes:
        seed: of the places.
    """

    seed: int

    def listing(self) -> Listing:
        """5,000 train and 1,000 val images of ten classes."""
        return Listing(
            classes=tuple(ClassRecord(name=name, title=name) for name in PHOTOS),
            label_order="source",
            splits={split: self._split(split) for split in HALVES},
            encoded=False,
            channels=3,
        )

    def _split(self, split: str) -> SplitListing:
        count = CROPS[split]
        labels = np.repeat(np.arange(len(PHOTOS), dtype=np.int32), count)
        numbers = np.tile(np.arange(count, dtype=np.int64), len(PHOTOS))
        names = list(PHOTOS)
        return SplitListing(
            names=[
                f"{split}/{names[label]}/{number:04d}"
                for label, number in zip(labels.tolist(), numbers.tolist(), strict=True)
            ],
            labels=labels,
            files=tuple(f"{split}/{name}" for name in names),
            file_of=labels,
            offsets=numbers,
            sizes=np.full(len(labels), CROP_PX * CROP_PX * 3, np.int64),
        )

    def read(self, item: Item) -> np.ndarray:
        """One crop, uint8 (40, 40, 3).

        Raises:
            SourceError: the photo is not what the package ships.
        """
        split, name = item.file.split("/")
        half = _half(name, split)
        top, left = self.places(split, name)[item.offset]
        return np.ascontiguousarray(half[top : top + CROP_PX, left : left + CROP_PX])

    def places(self, split: str, name: str) -> np.ndarray:
        """Top and left of every crop in its half, (count, 2) int64; no two are equal."""
        return _places(self.seed, split, name)


@functools.lru_cache(maxsize=2 * len(PHOTOS))
def _places(seed: int, split: str, name: str) -> np.ndarray:
    height, width = (side - CROP_PX + 1 for side in _half(name, split).shape[:2])
    chosen = shuffled(height * width, seed, f"photo crops {split} {name}")[: CROPS[split]]
    return np.stack([chosen // width, chosen % width], axis=1)


def halves(photo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A photo (H, W, 3) cut in the middle of its longer side; the middle row or column of an odd side is in neither."""
    axis = int(photo.shape[1] > photo.shape[0])
    size = photo.shape[axis] // 2
    return np.take(photo, range(size), axis), np.take(photo, range(-size, 0), axis)


@functools.lru_cache(maxsize=2 * len(PHOTOS))
def _half(name: str, split: str) -> np.ndarray:
    """One half of a photo, uint8 (H, W, 3), its shorter side 128 px."""
    path = _path(name)
    try:
        with Image.open(path) as opened:
            photo = np.asarray(opened.convert("RGB"))
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error}): install scikit-image and scikit-learn again") from None
    half = halves(photo)[HALVES[split]]
    scale = SHORT_PX / min(half.shape[:2])
    size = round(half.shape[1] * scale), round(half.shape[0] * scale)
    return np.asarray(Image.fromarray(half).resize(size, Image.Resampling.BICUBIC))


def _path(name: str) -> Path:
    package, inside = PHOTOS[name]
    return _folder(package) / inside


@functools.cache
def _folder(package: str) -> Path:
    """Where a package is installed; it is not imported, which takes seconds.

    Raises:
        ConfigError: it is not.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        names = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
        raise ConfigError(
            f"--source photo-crops: its photos are part of {names[package]}, which is not installed: "
            "pip install -e '.[photos]' -c constraints.txt"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def from_options(options: PrepareOptions) -> PhotoCropsSource:
    """Makes the source; it takes no input."""
    if options.input is not None:
        raise ConfigError(f"--input {options.input}: source photo-crops brings its own photos; leave --input out")
    for name in PHOTOS:
        path = _path(name)
        if not path.is_file():
            raise ConfigError(
                f"--source photo-crops: {path} is missing: pip install --force-reinstall scikit-image scikit-learn "
                "-c constraints.txt"
            )
    return PhotoCropsSource(seed=options.seed)
