"""Which way up: what EXIF or XMP states is applied to the pixels, in every kind of file, whoever states it how."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.config import ImageSettings
from pipeline.preparation.decode import decode
from tests.helpers.odd_images import packet, photo, saved, turned, with_chunk

KEEP = ImageSettings(resize_px=None, encoding="png")
KINDS = ("JPEG", "PNG", "WebP", "TIFF")
METHODS = {  # orientation -> what brings such an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def assert_turned(data: bytes, orientation: int, said_by: str, image: Image.Image | None = None) -> None:
    image = image or photo()
    found = decode(data, KEEP)
    expected = np.asarray(image.transpose(METHODS[orientation]) if orientation in METHODS else image)
    assert found.pixels.shape == expected.shape
    assert (found.width_px, found.height_px) == image.size
    assert np.abs(found.pixels.astype(int) - expected).mean() < 3  # another way up differs by tens of levels
    stated = [words for words in found.converted if "orientation" in words]
    assert stated == ([f"{said_by} orientation {orientation} applied"] if orientation != 1 else [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_xmp_alone(kind: str, orientation: int) -> None:
    assert_turned(turned(photo(), kind, xmp=packet(orientation)), orientation, "XMP")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", [1, 3, 8])
def test_exif_wins_over_xmp(kind: str, orientation: int) -> None:
    assert_turned(turned(photo(), kind, exif=orientation, xmp=packet(6)), orientation, "EXIF")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_avif_is_turned_by_its_own_property_alone(orientation: int) -> None:
    """Pillow writes EXIF's orientation as that property."""
    assert_turned(turned(photo(), "AVIF", exif=orientation, xmp=packet(6)), orientation, "EXIF")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nonsense", [0, 9, 700])
def test_a_number_that_is_no_orientation_is_none(kind: str, nonsense: int) -> None:
    assert_turned(turned(photo(), kind, exif=nonsense, xmp=packet(6)), 6, "XMP")
    assert_turned(turned(photo(), kind, exif=nonsense), 1, "EXIF")
    assert_turned(turned(photo(), kind, xmp=packet(nonsense)), 1, "XMP")


@pytest.mark.parametrize(
    "xmp",
    [
        packet(6, element=True),
        packet(6, quote="'"),
        packet(6, prefix="t-1.x"),
        packet(6, prefix="t", element=True),
        packet(" 6 ", element=True),
        packet(6).decode().encode("utf-16"),
        packet(6, element=True).replace(b"Orientation>6", b'Orientation rdf:datatype="x">6'),
        b'<rdf:Description\ntiff:Orientation = "6"/>',  # its namespace is not declared
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_every_way_to_write_it(kind: str, xmp: bytes) -> None:
    assert_turned(turned(photo(), kind, xmp=xmp), 6, "XMP")


@pytest.mark.parametrize(
    "xmp",
    [
        b"",
        b"\xff\xfe garbage",
        packet(6).replace(b"ns.adobe.com/tiff", b"ns.adobe.com/exif").replace(b"tiff:O", b"other:O"),
        packet(66),
        b'<rdf:Description nottiff:Orientation="6" tiff:Orientations="6"/>',
    ],
)
def test_what_states_nothing_turns_nothing(xmp: bytes) -> None:
    assert_turned(turned(photo(), "JPEG", xmp=xmp), 1, "")


def test_xmp_of_a_cmyk_jpeg() -> None:
    image = photo().convert("CMYK")
    data = saved(image, "JPEG", quality=95, xmp=packet(6))
    assert_turned(data, 6, "XMP", image.convert("RGB"))


def test_compressed_xmp_in_a_png() -> None:
    body = b"XML:com.adobe.xmp\0\1\0en\0words\0"
    png = saved(photo(), "PNG")
    assert_turned(with_chunk(png, b"iTXt", body + zlib.compress(packet(6))), 6, "XMP")
    for broken in (zlib.compress(packet(6))[:20], b"not compressed", b""):
        assert_turned(with_chunk(png, b"iTXt", body + broken), 1, "")


@pytest.mark.parametrize("compressed", [False, True])
def test_exif_as_imagemagick_writes_it_into_a_png(compressed: bool) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    text = b"\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())
    keyword = b"Raw profile type exif\0"
    kind, body = (b"zTXt", keyword + b"\0" + zlib.compress(text)) if compressed else (b"tEXt", keyword + text)
    png = saved(photo(), "PNG")
    assert_turned(with_chunk(png, kind, body), 6, "EXIF")
    assert_turned(with_chunk(png, b"tEXt", keyword + b"\nexif\n9\nno digits"), 1, "")


def test_metadata_behind_the_pixels_of_a_png_counts() -> None:
    png = saved(photo(), "PNG")
    text = with_chunk(png, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet(6))[33 : len(packet(6)) + 33 + 12 + 22]
    assert_turned(png[:-12] + text + png[-12:], 6, "XMP")


def test_segments_before_the_orientation_are_followed() -> None:
    """A JPEG with fill bytes, a long profile and a marker without length before its XMP."""
    data = turned(photo(), "JPEG", xmp=packet(6))
    profile = b"\xff\xe2" + struct.pack(">H", 65535) + bytes(65533)
    assert_turned(data[:2] + b"\xff\xff" + profile[1:] + profile + b"\xff\x01" + data[2:], 6, "XMP")
