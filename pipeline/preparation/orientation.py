"""Which way up an image is: EXIF says it, or XMP where EXIF does not; the pixels are turned accordingly."""

import re
import warnings

import numpy as np
from PIL import Image

ORIENTATION_TAG = 0x0112
# orientation -> (transpose first, flip rows, flip columns)
ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
TIFF_NAMES = re.compile(rb"""xmlns:([\w.-]+)\s*=\s*["']http://ns\.adobe\.com/tiff/1\.0/["']""")
AS_ATTRIBUTE = rb"""\s%s:Orientation\s*=\s*["']\s*([1-8])\s*["']"""
AS_ELEMENT = rb"<%s:Orientation(?:\s[^<>]*)?>\s*([1-8])\s*<"


def orientation_of(exif: bytes, xmp: bytes) -> tuple[int, str]:
    """The orientation 1..8 and who says it, ``EXIF`` or ``XMP``; where both do, EXIF is right: every reader knows it.

    Args:
        exif: EXIF as Pillow loads it, empty if there is none.
        xmp: an XMP packet, empty if there is none.
    """
    stated = _of_exif(exif) if exif else None
    if stated is not None:
        return stated, "EXIF"
    return (_of_xmp(xmp) if xmp else None) or 1, "XMP"


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors pixels (H, W, C) as the orientation 1..8 says."""
    if orientation not in ORIENTATIONS:
        return pixels
    transpose, flip_rows, flip_columns = ORIENTATIONS[orientation]
    pixels = pixels.transpose(1, 0, 2) if transpose else pixels
    return np.ascontiguousarray(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def _of_exif(exif: bytes) -> int | None:
    found = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd EXIF
            found.load(exif)
            stated = found.get(ORIENTATION_TAG)
    except Exception:  # broken EXIF says nothing about orientation; the image itself may be fine
        return None
    return stated if isinstance(stated, int) and 1 <= stated <= 8 else None


def _of_xmp(xmp: bytes) -> int | None:
    """``tiff:Orientation`` as an attribute or as an element, under the prefix that the packet gives its namespace."""
    text = xmp.replace(b"\0", b"")  # UTF-16 read as ASCII
    prefix = re.escape(found.group(1) if (found := TIFF_NAMES.search(text)) else b"tiff")
    for pattern in (AS_ATTRIBUTE, AS_ELEMENT):
        if match := re.search(pattern % prefix, text):
            return int(match.group(1))
    return None
