"""photo-crops: exact counts, the same crops for the same seed, and no pixel that training and testing share."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError
from pipeline.sources import open_source, photo_crops
from pipeline.sources.photo_crops import CROP_PX, CROPS, PHOTOS, PhotoCropsSource, halves


def test_exact_counts_of_every_photo_in_every_split() -> None:
    listing = PhotoCropsSource(0).listing()
    assert [record.name for record in listing.classes] == list(PHOTOS) and listing.channels == 3
    for split, count in CROPS.items():
        rows = listing.splits[split]
        assert np.bincount(rows.labels).tolist() == [count] * len(PHOTOS)
        assert len(set(rows.names)) == len(rows) == count * len(PHOTOS)


@pytest.mark.parametrize("name", PHOTOS)
def test_every_place_is_inside_its_half_and_no_two_are_equal(name: str) -> None:
    source = PhotoCropsSource(4)
    for split in CROPS:
        places = source.places(split, name)
        height, width = photo_crops._half(name, split).shape[:2]
        assert min(height, width) == photo_crops.SHORT_PX
        assert (places >= 0).all() and (places + CROP_PX <= (height, width)).all()
        assert len({tuple(place) for place in places.tolist()}) == CROPS[split]
        assert len(set(places[:, 0].tolist())) > 20, "spread over the half"


@pytest.mark.parametrize(("height", "width"), [(4, 10), (10, 4), (7, 7), (5, 9), (9, 5)])
def test_the_halves_share_no_pixel(height: int, width: int) -> None:
    photo = np.arange(height * width * 3).reshape(height, width, 3)
    first, second = halves(photo)
    assert first.shape == second.shape and not set(first.flat) & set(second.flat)
    assert first.size + second.size >= photo.size - 3 * min(height, width)


def test_what_a_half_shows_does_not_depend_on_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cut before resized: a filter that reached over the cut would carry pixels of one half into the other."""
    from PIL import Image

    random = np.random.default_rng(0)
    photo = random.integers(0, 255, (300, 600, 3), dtype=np.uint8)
    other = photo.copy()
    other[:, 300:] = random.integers(0, 255, (300, 300, 3))
    seen = []
    for number, pixels in enumerate((photo, other)):
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path)
        monkeypatch.setattr(photo_crops, "_path", lambda name, path=path: path)
        photo_crops._half.cache_clear()
        seen.append([photo_crops._half("cat", split) for split in ("train", "val")])
    photo_crops._half.cache_clear()
    assert (seen[0][0] == seen[1][0]).all() and (seen[0][1] != seen[1][1]).any()


def test_the_seed_decides_which_crops_and_nothing_else() -> None:
    def crops(seed: int) -> list[bytes]:
        source = PhotoCropsSource(seed)
        rows = source.listing().splits["val"]
        found = [source.read(item) for item in rows.items(np.arange(0, len(rows), 97))]
        assert all(image.shape == (CROP_PX, CROP_PX, 3) and image.dtype == np.uint8 for image in found)
        return [image.tobytes() for image in found]

    assert crops(1) == crops(1) and crops(1) != crops(2)
    assert PhotoCropsSource(1).listing().digest() == PhotoCropsSource(1).listing().digest()


def test_without_scikit_image_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(name: str, *more: object) -> object:
        return None if name == "skimage" else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    photo_crops._folder.cache_clear()
    try:
        with pytest.raises(
            ConfigError, match=r"part of scikit-image, which is not installed: pip install -e '.\[photos\]'"
        ):
            open_source(PrepareOptions("photo-crops", Path("out")))
    finally:
        photo_crops._folder.cache_clear()


def test_it_takes_no_input() -> None:
    with pytest.raises(ConfigError, match="leave --input out"):
        open_source(PrepareOptions("photo-crops", Path("out"), input=Path("x")))
