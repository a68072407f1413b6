"""One image: odd ones converted as Pillow would, bad ones refused with a reason, the filter as stated."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageOps

from pipeline.config import ImageSettings
from pipeline.errors import ImageError
from pipeline.preparation.decode import decode
from pipeline.preparation.decoder_check import dali_accepts, dali_pixels
from pipeline.preparation.image import encode, make_image, make_images, resize
from tests.helpers.odd_images import KINDS_EXPECTED

ORIGINAL = ImageSettings(resize_px=None, encoding="original")
KEEP = ImageSettings(resize_px=None, encoding="png")
NO_IMAGE = f"not an image by its content: {KINDS_EXPECTED}"


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.ascontiguousarray(skimage.data.astronaut()[:300, :400])


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("mode", "kind", "words"),
    [
        ("L", "JPEG", "gray to RGB"),
        ("CMYK", "JPEG", "CMYK to RGB"),
        ("L", "PNG", "gray to RGB"),
        ("P", "PNG", "palette to RGB"),
        ("1", "PNG", "1-bit to RGB"),
        ("RGBA", "PNG", "RGBA to RGB"),
        ("LA", "PNG", "gray with alpha to RGB"),
    ],
)
def test_oddities_become_rgb_and_are_named(photo: np.ndarray, mode: str, kind: str, words: str) -> None:
    data = saved(Image.fromarray(photo).convert(mode), kind)
    found = decode(data, KEEP)
    assert found.converted == (words,)
    np.testing.assert_array_equal(found.pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    wide = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    found = decode(saved(Image.fromarray(wide), "PNG"), KEEP)
    assert found.converted == ("16-bit gray to RGB",)
    np.testing.assert_array_equal(found.pixels[..., 0], wide >> 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(photo: np.ndarray, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(photo), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB")))
    found = decode(data, KEEP)
    assert found.pixels.shape == expected.shape
    assert np.abs(found.pixels.astype(int) - expected).max() <= 4  # two builds of libjpeg-turbo
    assert bool(found.converted) == (orientation != 1)


def test_broken_exif_is_no_reason_to_lose_a_image(photo: np.ndarray) -> None:
    data = saved(Image.fromarray(photo), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert decode(data, KEEP).pixels.shape == photo.shape


def test_content_decides_not_the_name(photo: np.ndarray) -> None:
    np.testing.assert_array_equal(decode(saved(Image.fromarray(photo), "PNG"), KEEP).pixels, photo)


def test_empty_text_and_large_are_refused(photo: np.ndarray) -> None:
    with pytest.raises(ImageError, match="empty file"):
        decode(b"", KEEP)
    with pytest.raises(ImageError, match="not an image"):
        decode(b"this is text", KEEP)
    with pytest.raises(ImageError, match="--max-bytes"):
        decode(b"x" * 11, ImageSettings(max_bytes=10))
    for kind in ("JPEG", "PNG"):
        with pytest.raises(ImageError, match="400x300 is more than --max-pixels"):
            decode(saved(Image.fromarray(photo), kind), ImageSettings(max_pixels=400 * 300 - 1))


def test_a_bomb_costs_nothing() -> None:
    bomb = saved(Image.new("1", (12000, 12000)), "PNG")  # 144 million pixels in about 20 kB
    assert len(bomb) < 200_000
    with pytest.raises(ImageError, match="--max-pixels"):
        make_image(bomb, ImageSettings())


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_cut_file_is_refused_at_every_length(photo: np.ndarray, kind: str) -> None:
    data = saved(Image.fromarray(photo[:60, :60]), kind)
    for length in range(1, len(data) - 12, 97):
        with pytest.raises(ImageError):
            decode(data[:length], KEEP)


@pytest.mark.parametrize(
    ("height", "width"), [(300, 400), (401, 300), (256, 256), (257, 300), (40, 31), (1, 1), (1, 500)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_filter_is_pillows_antialiased_bicubic_of_the_center(height: int, width: int, channels: int) -> None:
    photo = np.resize(skimage.data.astronaut(), (height, width, 3))[..., :channels]
    found = resize(np.ascontiguousarray(photo), 128)
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    box = photo[top : top + square, left : left + square]
    planes = [Image.fromarray(box[..., c]).resize((128, 128), Image.Resampling.BICUBIC) for c in range(channels)]
    assert found.shape == (128, 128, channels)
    assert np.abs(found.astype(int) - np.stack([np.asarray(plane) for plane in planes], -1)).max() <= 1


def test_fine_stripes_do_not_alias() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255  # a filter that only samples would keep black or white
    assert np.abs(resize(stripes, 100).astype(int) - 127).max() <= 12


def test_large_jpegs_decoded_small_stay_close_to_the_whole_way() -> None:
    photo = np.ascontiguousarray(np.kron(skimage.data.astronaut(), np.ones((4, 4, 1), np.uint8)))
    data = saved(Image.fromarray(photo), "JPEG", quality=95)
    quick = make_image(data, ImageSettings(resize_px=128, encoding="raw"))
    whole = resize(decode(data, KEEP).pixels, 128)
    assert decode(data, ImageSettings(resize_px=256)).pixels.shape == (512, 512, 3)
    assert (quick.width_px, quick.height_px) == (2048, 2048)
    assert np.abs(quick.pixels.astype(int) - whole).mean() < 1.0


@pytest.mark.parametrize("channels", [1, 3])
def test_png_and_raw_lose_nothing_and_jpeg_little(photo: np.ndarray, channels: int) -> None:
    pixels = np.ascontiguousarray(photo[..., :channels])
    raw = encode(pixels, ImageSettings(encoding="raw"))
    np.testing.assert_array_equal(np.frombuffer(raw, np.uint8).reshape(pixels.shape), pixels)
    png = pixels_of(encode(pixels, ImageSettings(encoding="png")))
    np.testing.assert_array_equal(png.reshape(pixels.shape), pixels)
    jpeg = pixels_of(encode(pixels, ImageSettings(encoding="jpeg", quality=95)))
    assert np.abs(jpeg.reshape(pixels.shape).astype(int) - pixels).mean() < 4


def test_original_keeps_bytes_that_dali_takes(photo: np.ndarray) -> None:
    for data in (saved(Image.fromarray(photo), "JPEG"), saved(Image.fromarray(photo).convert("CMYK"), "JPEG")):
        assert make_image(data, ORIGINAL).data == data
        assert dali_accepts(data)


@pytest.mark.parametrize(
    ("by_dali", "words"),
    [(None, "refuses its bytes"), (lambda pixels: pixels[::-1], "otherwise"), (lambda pixels: pixels[1:], "turn")],
)
def test_original_that_dali_shows_otherwise_is_stored_without_loss(
    photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, by_dali: Callable[[np.ndarray], np.ndarray] | None, words: str
) -> None:
    data = saved(Image.fromarray(photo), "JPEG")
    ours = decode(data, KEEP).pixels
    found = by_dali and by_dali(ours)
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.preparation.decoder_check.dali_pixels", lambda data: found)
        made = make_image(data, ORIGINAL)
    assert made.data.startswith(b"\x89PNG") and words in made.converted[0]
    np.testing.assert_array_equal(dali_pixels(made.data), ours)


def test_a_level_here_and_there_is_no_reason_to_convert(photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Image.fromarray(photo // 2), "JPEG")
    ours = decode(data, KEEP).pixels
    for levels, kept in ((4, True), (5, False)):  # two builds of libjpeg-turbo differ by 4
        monkeypatch.setattr("pipeline.preparation.decoder_check.dali_pixels", lambda data, levels=levels: ours + levels)
        assert (make_image(data, ORIGINAL).data == data) == kept


def test_pixels_stay_as_they_are() -> None:
    digit = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    made = make_image(digit, ImageSettings(resize_px=None, encoding="png", channels=1))
    np.testing.assert_array_equal(pixels_of(made.data), digit[..., 0])


def test_images_made_together_equal_those_made_alone_in_their_order(
    photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.preparation.image.BATCH_IMAGES", 3)
    settings = ImageSettings(resize_px=32)
    payloads: list = [saved(Image.fromarray(photo[:, :width]), "JPEG") for width in (50, 60, 70, 80, 90, 100)]
    payloads[2:2] = [b"text", photo, ImageError("cannot be read"), b""]
    made = list(make_images(payloads, settings))
    assert [str(row) if isinstance(row, ImageError) else "" for row in made] == [
        *("", "", NO_IMAGE, ""),
        *("cannot be read", "empty file", "", "", "", ""),
    ]
    for payload, row in zip(payloads, made, strict=True):
        if not isinstance(row, ImageError):
            assert row.data == make_image(payload, settings).data


def test_a_batch_of_large_images_ends_early(photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.preparation.image.BATCH_BYTES", 2 * photo.nbytes)
    asked = []
    payloads = (asked.append(number) or photo for number in range(9))
    next(make_images(payloads, ImageSettings()))
    assert len(asked) == 2
