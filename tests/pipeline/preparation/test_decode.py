"""Files of every kind: sound ones are decoded as Pillow does and what is odd is said; bad ones get a reason of ours."""

import io
import pickle
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.config import ImageSettings
from pipeline.errors import ImageError
from pipeline.preparation.containers import kind_of
from pipeline.preparation.decode import decode
from pipeline.preparation.decoder_check import dali_pixels
from pipeline.preparation.image import make_image
from tests.helpers.odd_images import (
    OTHER_KINDS,
    bad_files,
    good_files,
    need,
    photo,
    saved,
    wide_png,
    with_chunk,
)

KEEP = ImageSettings(resize_px=None, encoding="png")
ORIGINAL = ImageSettings(resize_px=None, encoding="original")
BAD, GOOD = bad_files(), good_files()


@pytest.mark.parametrize("name", GOOD)
def test_a_sound_file_is_decoded_and_what_is_odd_is_said(name: str) -> None:
    data, words = GOOD[name]
    found = decode(data, KEEP)
    assert "; ".join(found.converted) == words
    assert found.pixels.shape == (60, 80, 3)
    if not name.startswith(("exif", "xmp", "sixteen")):
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.abs(found.pixels.astype(int) - expected).max() <= 4  # two builds of libjpeg-turbo


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gets_its_reason(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(ImageError) as caught:
        decode(data, KEEP)
    assert str(caught.value) == reason


@pytest.mark.parametrize("name", GOOD)
def test_what_is_stored_as_original_is_what_the_loader_sees(name: str) -> None:
    data, words = GOOD[name]
    made = make_image(data, ORIGINAL)
    seen = dali_pixels(made.data)
    assert seen is not None and seen.shape == made.pixels.shape
    assert np.abs(seen.astype(int) - made.pixels).max() <= 4
    kind = kind_of(data)
    if made.data == data:
        assert kind in ("JPEG", "PNG") and made.converted in ((), ("first of several frames",))
    else:
        assert kind in OTHER_KINDS or "XMP" in words
        assert "; ".join(made.converted[:-1]) == words
        assert made.converted[-1].startswith("stored as PNG: ")
        np.testing.assert_array_equal(seen, made.pixels)


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_sizes_are_checked_before_pixels(kind: str) -> None:
    with pytest.raises(ImageError, match="80x60 is more than --max-pixels 4,799"):
        decode(saved(photo(), kind), ImageSettings(max_pixels=4799))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", *OTHER_KINDS])
def test_a_file_cut_anywhere_or_with_a_byte_changed_is_decoded_or_gets_a_reason(kind: str) -> None:
    """Never another error, and the same reason each time."""
    data = saved(photo(24, 24), kind)
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(data), 120).tolist():
        changed = bytearray(data)
        changed[position] ^= int(rng.integers(1, 256))
        for odd in (data[:position], bytes(changed)):
            assert _outcome(odd) == _outcome(odd)


def _outcome(data: bytes) -> str:
    try:
        return str(decode(data, ImageSettings(resize_px=None, max_pixels=100_000)).pixels.shape)
    except ImageError as error:
        reason = str(error)
        assert "0x" not in reason and "<" not in reason and "/" not in reason.replace("PNG/", ""), reason
        return reason


def test_text_and_profiles_of_a_png_say_nothing_about_its_pixels() -> None:
    image = photo()
    png, noise = saved(image, "PNG"), np.random.default_rng(0).bytes(3 * 2**20)
    for kind, body in (
        (b"tEXt", b"Comment\0" + b"x" * (2 << 20)),
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 << 20))),
        (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(100 << 20))),
        (b"iCCP", b"profile\0\0" + zlib.compress(noise)),
        (b"prVt", noise),
    ):
        for data in (with_chunk(png, kind, body), with_chunk(png, kind, body)[:-12] + png[-12:]):
            found = decode(data, KEEP)
            assert found.converted == ()
            np.testing.assert_array_equal(found.pixels, np.asarray(image))
    broken = with_chunk(png, b"tEXt", b"Comment\0words").replace(b"words", b"wordy")
    np.testing.assert_array_equal(decode(broken, KEEP).pixels, np.asarray(image))


def test_many_texts_are_no_bomb() -> None:
    text = b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(100 << 20))
    png = saved(photo(), "PNG")
    for _ in range(50):  # 5 GB, if they were unpacked
        png = with_chunk(png, *text)
    assert decode(png, KEEP).pixels.shape == (60, 80, 3)


def test_a_jpeg_of_markers_alone_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoders take two minutes over 200 MiB of them, so they are not asked."""
    monkeypatch.setattr("pipeline.preparation.decode.simplejpeg", None)
    monkeypatch.setattr("pipeline.preparation.decode.Image", None)
    with pytest.raises(ImageError, match="damaged JPEG: more than 65,536 markers before its pixels"):
        decode(b"\xff\xd8" + b"\xff" * (20 << 20), KEEP)


def test_bytes_between_the_segments_of_a_jpeg_are_no_reason_to_lose_it() -> None:
    """Such files exist; libjpeg-turbo skips the bytes with a remark."""
    jpeg = saved(photo(), "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    np.testing.assert_array_equal(decode(jpeg[:frame] + b"junk" + jpeg[frame:], KEEP).pixels, decode(jpeg, KEEP).pixels)


@pytest.mark.parametrize("options", [{"compression": name} for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits")])
def test_compressed_tiffs(options: dict[str, str]) -> None:
    np.testing.assert_array_equal(decode(saved(photo(), "TIFF", **options), KEEP).pixels, np.asarray(photo()))


@pytest.mark.parametrize("color_type", [2, 4, 6])
def test_sixteen_bits_are_said_in_every_color_type(color_type: int) -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (5, 4, {2: 3, 4: 2, 6: 4}[color_type])).astype(np.uint16)
    found = decode(wide_png(color_type, samples), KEEP)
    assert found.converted[0] == "16 bits a sample to 8"
    expected = np.broadcast_to(samples[..., :1], (5, 4, 3)) if color_type == 4 else samples[..., :3]
    np.testing.assert_array_equal(found.pixels, expected >> 8)


def test_colors_that_pillow_cannot_convert_are_a_reason() -> None:
    for mode in ("LAB", "YCbCr", "CMYK"):
        assert decode(saved(Image.new(mode, (8, 8)), "TIFF"), KEEP).pixels.shape == (8, 8, 3)
    with pytest.raises(ImageError, match="32-bit samples in a TIFF have no range"):
        decode(saved(Image.new("I", (8, 8)), "TIFF"), KEEP)


def test_a_damaged_second_frame_is_nothing_to_the_first() -> None:
    image = photo()
    gif = saved(image, "GIF", save_all=True, append_images=[photo(seed=1)])
    first = saved(image, "GIF")
    found = decode(gif[: len(first) + 30], KEEP)
    np.testing.assert_array_equal(found.pixels, decode(first, KEEP).pixels)


def test_a_kind_that_this_pillow_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    need("WebP")
    data = saved(photo(), "WebP")
    monkeypatch.setattr("pipeline.preparation.decode.features.check", lambda name: name != "webp")
    with pytest.raises(ImageError, match="WebP is not supported by the Pillow that is installed here"):
        decode(data, KEEP)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("cannot identify image file <_io.BytesIO object at 0x7f34d2cd70b0>", "cannot identify image file an object"),
        ("<Frame at 0xABC> failed", "an object failed"),
        ("at 0xdeadBEEF, twice", "at an address, twice"),
        ("cannot open '/tmp/ray_x/tmpabc.png'", "cannot open 'a path'"),
        ("two\nlines\t here", "two lines here"),
        ("400x300 is more than --max-pixels 1/2 and/or 3", "400x300 is more than --max-pixels 1/2 and/or 3"),
    ],
)
def test_no_reason_holds_what_differs_from_run_to_run(given: str, kept: str) -> None:
    error = ImageError(given)
    assert str(error) == kept
    assert str(pickle.loads(pickle.dumps(error))) == kept
