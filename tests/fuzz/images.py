"""Pictures that nobody meant, of every kind that prepare and predict read."""

import functools
import io
import random
import re
from pathlib import Path

import numpy as np
import torch  # noqa: F401  what resizes: here once, and not in every child
from PIL import Image

from pipeline.config import ImageSettings
from pipeline.errors import ImageError
from pipeline.preparation.image import make_image
from tests.helpers.fuzzing import Target, mutate_bytes

# A mutated header may claim any size, so the limit is one that a test can afford; what is checked is the same.
SETTINGS = (
    ImageSettings(resize_px=8, encoding="jpeg", max_pixels=4_000_000, max_bytes=2**20),
    ImageSettings(resize_px=None, encoding="png", max_pixels=1_000_000, max_bytes=2**20),
    ImageSettings(resize_px=8, encoding="png", channels=1, max_pixels=1_000_000, max_bytes=2**20, filter="area"),
)
FORMS = (
    ("JPEG", "RGB", {}),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "CMYK", {}),
    ("JPEG", "L", {"comment": b"x" * 50}),
    ("PNG", "RGBA", {}),
    ("PNG", "P", {}),
    ("PNG", "I;16", {}),
    ("GIF", "P", {"save_all": True}),
    ("BMP", "RGB", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "L", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "CMYK", {}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("AVIF", "RGB", {"speed": 10}),
)


@functools.cache
def pictures() -> tuple[bytes, ...]:
    """A small one of each form, with EXIF and XMP where the form has them."""
    made = []
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((40, 30), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    for form, mode, options in FORMS:
        shown = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
        more = {"append_images": [shown.rotate(90)]} if form == "GIF" else {"exif": exif} if form != "BMP" else {}
        buffer = io.BytesIO()
        shown.save(buffer, form, **options, **more)
        made.append(buffer.getvalue())
    return tuple(made)


def make_picture(rng: random.Random, _: Path) -> bytes:
    """One of them, its first bytes (where sizes stand) more often than the others."""
    data = rng.choice(pictures())
    if rng.random() < 0.5:
        cut = min(len(data), rng.choice((64, 256, 700)))
        return data[:12] + mutate_bytes(rng, data[12:cut], pictures()) + data[cut:]
    return mutate_bytes(rng, data, pictures())


def use_picture(_: Path, data: bytes) -> None:
    """Makes of it what a data set stores; the reason why not is the same each time, and one line."""
    settings = SETTINGS[len(data) % len(SETTINGS)]
    try:
        made = make_image(data, settings)
    except ImageError as error:
        assert str(error).isprintable() and not re.search(r"\b0x[0-9a-f]{5}", str(error)), str(error)
        raise
    assert made.pixels.dtype == np.uint8 and made.pixels.shape[2] == settings.channels


TARGETS = [Target("pictures", make_picture, use_picture, (ImageError,), 10.0)]
