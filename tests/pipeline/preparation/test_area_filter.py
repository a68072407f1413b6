"""``prepare --filter area``: a stored pixel is the mean of the area that it covers; recorded, and used to predict."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from pipeline.config import ImageSettings, byte_settings
from pipeline.loader.config import LoaderConfig
from pipeline.loader.image_reader import ImageReader, settings_of
from pipeline.manifest import read_manifest
from pipeline.preparation.decode import decode
from pipeline.preparation.image import encode, make_image, resize
from tests.helpers.loader_data_set import load_reference
from tests.helpers.preparing import run


def area_mean(image: np.ndarray, side: int) -> np.ndarray:
    """The definition, pixel by pixel in float64: (n, n, C) to (side, side, C)."""
    length = len(image)
    scale = length / side

    def covered(number: int) -> np.ndarray:
        begin, end = number * scale, (number + 1) * scale
        return np.array([max(0.0, min(end, pixel + 1) - max(begin, pixel)) for pixel in range(length)])

    result = np.empty((side, side, image.shape[2]))
    for y in range(side):
        for x in range(side):
            weights = np.outer(covered(y), covered(x))
            result[y, x] = (image * weights[..., None]).sum((0, 1)) / weights.sum()
    return result


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "side"), [(48, 48, 16), (50, 40, 16), (31, 64, 24), (17, 16, 15), (9, 9, 16), (1, 1, 3)]
)
def test_equals_the_definition(height: int, width: int, side: int, channels: int) -> None:
    """Shrinking by whole numbers and not, nearly nothing, and enlarging."""
    image = np.ascontiguousarray(skimage.data.astronaut()[100 : 100 + height, 200 : 200 + width, :channels])
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    expected = area_mean(image[top : top + square, left : left + square].astype(np.float64), side)
    found = resize(image, side, "area")
    assert found.dtype == np.uint8 and found.flags.c_contiguous and found.shape == expected.shape
    assert np.abs(found - expected).max() <= 0.5 + 1e-9


def test_halves_are_rounded_up() -> None:
    blocks = np.array([[0, 1, 2, 3], [1, 0, 2, 3], [0, 0, 255, 255], [0, 1, 255, 254]], np.uint8)[..., None]
    assert resize(blocks, 2, "area")[..., 0].tolist() == [[1, 3], [0, 255]]  # of 0.5, 2.5, 0.25 and 254.75


def test_a_large_jpeg_is_decoded_whole() -> None:
    """libjpeg would decode it at half the size for the other filter."""
    photo = Image.fromarray(np.kron(skimage.data.astronaut()[:256, :256], np.ones((2, 2, 1), np.uint8)))
    settings = ImageSettings(resize_px=64, encoding="raw", filter="area")
    data = encode(np.asarray(photo), ImageSettings(encoding="jpeg"))
    whole = decode(data, ImageSettings(resize_px=None)).pixels
    assert whole.shape == (512, 512, 3)
    assert np.array_equal(make_image(data, settings).pixels, resize(whole, 64, "area"))


def test_the_manifest_says_which() -> None:
    area, bicubic = ImageSettings(filter="area"), ImageSettings()
    assert byte_settings(bicubic)["filter"] == "centre square, then antialiased bicubic"
    assert byte_settings(area) == byte_settings(bicubic) | {
        "filter": "center square, then area averaging, halves rounded up"
    }
    assert byte_settings(dataclasses.replace(area, resize_px=None))["filter"] is None


def test_prepared_and_predicted_alike(tmp_path: Path) -> None:
    """A file is read for a prediction as ``prepare`` has stored it, to the bit; by the default filter it is another."""
    photo = skimage.data.astronaut()
    for number in range(6):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo[40 * number : 40 * number + 150, 90:231]).save(path)
    words = ("--source", "folder", "--input", tmp_path / "photos", "--resize", 40, "--encoding", "png")
    run("prepare", *words, "--filter", "area", "--val-fraction", 0, "--workers", 2, "--output", tmp_path / "data")
    manifest = read_manifest(tmp_path / "data")
    assert "torch" not in manifest.settings["libraries"]
    assert settings_of(manifest).filter == "area"
    reader = ImageReader(tmp_path / "data", LoaderConfig(crop_px=32))
    found = sorted(reader.read(path).tobytes() for path in (tmp_path / "photos").rglob("*.png"))
    stored = sorted(image.tobytes() for image, _ in load_reference(tmp_path / "data").values())
    assert found == stored
    assert resize(photo[:150, 90:231], 40).tobytes() not in stored


def test_it_is_refused_where_nothing_is_resized(tmp_path: Path) -> None:
    output = ("--filter", "area", "--output", tmp_path / "data")
    done = run("prepare", "--source", "digits", *output, expect=2)
    assert done.stderr.splitlines()[-1] == "error: --filter area: expected --resize N beside it"
    done = run("prepare", "--source", "digits", "--filter", "lanczos", "--output", tmp_path / "data", expect=2)
    assert done.stderr.splitlines()[-1] == "error: --filter lanczos: expected bicubic or area"
