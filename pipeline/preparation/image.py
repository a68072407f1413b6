"""One image: the source's bytes or pixels in, checked and resized bytes out.

What a file is, its content tells, never its name. JPEG and PNG are taken; anything else is refused with a reason.
Oddities are converted and reported: CMYK, gray, palette, 16-bit and alpha become 8-bit RGB, the EXIF orientation
is applied to the pixels. A 1x1 image is an image: it is kept, and enlarged like any small one.
"""

import dataclasses
import io
from collections.abc import Iterable, Iterator

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.config import CHROMA, ImageSettings
from pipeline.errors import ImageError

Image.MAX_IMAGE_PIXELS = None  # our own cap (max_pixels) is checked before any pixel is decoded

SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"RIFF": "WebP",
}
BATCH_IMAGES = 16
BATCH_BYTES = 8 * 2**20  # of decoded pixels: a batch of large images ends early, so that memory stays what it was
ORIENTATION_TAG = 0x0112
# EXIF orientation -> (transpose first, flip rows, flip columns)
ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


Payload = bytes | np.ndarray


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """One stored image.

    Attributes:
        data: the bytes for the tar.
        pixels: uint8 (H, W, C), what ``data`` was made of (for JPEG: before its loss).
        width_px: width in the source, before orientation.
        height_px: height in the source, before orientation.
        converted: what was unusual and was converted, in words.
    """

    data: bytes
    pixels: np.ndarray
    width_px: int
    height_px: int
    converted: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Decoded pixels with what they were.

    Attributes:
        pixels: uint8 (H, W, C).
        width_px: width as the file states it.
        height_px: height as the file states it.
        converted: what was converted, in words.
    """

    pixels: np.ndarray
    width_px: int
    height_px: int
    converted: tuple[str, ...]


def make_image(payload: Payload, settings: ImageSettings) -> StoredImage:
    """Checks, resizes and encodes one image.

    Args:
        payload: bytes of a JPEG or PNG file, or uint8 pixels (H, W, C).
        settings: what to make of it.

    Raises:
        ImageError: the image cannot be used; the message is the reason.
    """
    made = next(make_images([payload], settings))
    if isinstance(made, ImageError):
        raise made
    return made


def make_images(
    payloads: Iterable[Payload | ImageError], settings: ImageSettings
) -> Iterator[StoredImage | ImageError]:
    """Checks, resizes and encodes images, giving one result for each payload, in order.

    A few at a time are all decoded, then all resized, then all encoded: between two images each library's code stays
    in the CPU's cache, which saves an eighth of the time.

    Args:
        payloads: as of :func:`make_image`; an error, in place of an image that could not be read, is handed through.
        settings: what to make of them.
    """
    batch: list[tuple[Payload | ImageError, Decoded | ImageError]] = []
    size_bytes = 0
    for payload in payloads:
        decoded = _decode_payload(payload, settings)
        batch.append((payload, decoded))
        size_bytes += 0 if isinstance(decoded, ImageError) else decoded.pixels.nbytes
        if len(batch) == BATCH_IMAGES or size_bytes >= BATCH_BYTES:
            yield from _finish(batch, settings)
            batch, size_bytes = [], 0
    yield from _finish(batch, settings)


def _decode_payload(payload: Payload | ImageError, settings: ImageSettings) -> Decoded | ImageError:
    if isinstance(payload, ImageError):
        return payload
    if isinstance(payload, np.ndarray):
        return Decoded(payload, payload.shape[1], payload.shape[0], ())
    try:
        return decode(payload, settings)
    except ImageError as error:
        return error


def _finish(
    batch: list[tuple[Payload | ImageError, Decoded | ImageError]], settings: ImageSettings
) -> list[StoredImage | ImageError]:
    """Resizes all, then encodes all."""
    side = settings.resize_px
    sized = [
        (payload, made)
        if side is None or isinstance(made, ImageError)
        else (payload, dataclasses.replace(made, pixels=resize(made.pixels, side, settings.filter)))
        for payload, made in batch
    ]
    return [made if isinstance(made, ImageError) else _store(payload, made, settings) for payload, made in sized]


def _store(payload: Payload | ImageError, made: Decoded, settings: ImageSettings) -> StoredImage:
    if settings.encoding == "original" and isinstance(payload, bytes):
        return _keep(payload, made, settings)
    return StoredImage(encode(made.pixels, settings), made.pixels, made.width_px, made.height_px, made.converted)


def decode(data: bytes, settings: ImageSettings) -> Decoded:
    """Decodes a JPEG or PNG file into upright 8-bit pixels with ``settings.channels`` channels.

    A large JPEG is decoded at 1/2, 1/4 or 1/8, as long as its shorter side stays at least twice the target.

    Raises:
        ImageError: it is empty, of another kind, too large, or damaged.
    """
    kind = _kind(data, settings)
    if kind == "JPEG":
        decoded = _decode_jpeg(data, settings)
        if decoded is not None:
            return decoded
    return _decode_slowly(data, kind, settings)


def resize(pixels: np.ndarray, side_px: int, filter_name: str = "bicubic") -> np.ndarray:
    """The center square of an image at ``side_px``.

    By antialiased bicubic interpolation (a = -0.5, Pillow's), or by averaging the area that each pixel covers.

    Same image as scaling the shorter side and cutting out the center, without computing what is cut off.

    Args:
        pixels: uint8 (H, W, C).
        side_px: side of the result.
        filter_name: one of :data:`pipeline.config.FILTERS`.

    Returns:
        uint8 (side, side, C), contiguous.
    """
    height, width, channels = pixels.shape
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    pixels = pixels[top : top + square, left : left + square]
    if square == side_px:
        return np.ascontiguousarray(pixels)
    if filter_name == "area":
        sums = _area_sums(_area_sums(pixels, side_px).transpose(1, 0, 2), side_px).transpose(1, 0, 2)
        area = square * square
        return np.ascontiguousarray((2 * sums + area) // (2 * area)).astype(np.uint8)  # halves rounded up
    if channels == 1:
        image = Image.fromarray(np.ascontiguousarray(pixels[..., 0]))
        return np.array(image.resize((side_px, side_px), Image.Resampling.BICUBIC))[..., None]
    return _resize_rgb(pixels, side_px)


def load_libraries(settings: ImageSettings) -> None:
    """Imports what resizing needs, so that its seconds (torch: 1.3 of processor time) are not an image's."""
    if settings.resize_px and settings.channels == 3:
        resize(np.zeros((2, 2, 3), np.uint8), 1, settings.filter)


def _area_sums(pixels: np.ndarray, side: int) -> np.ndarray:
    """What each of ``side`` equal stretches of the first axis covers, times ``side``: (n, ...) to (side, ...) int64.

    The edges of the stretches lie at whole numbers of 1/side of a pixel, so the sums are exact and the image's bytes
    do not depend on a processor. Enlarging works the same way: a stretch then covers parts of one pixel or two.
    OpenCV's INTER_AREA has the same weights.
    """
    pixel, part = np.divmod(np.arange(side + 1) * len(pixels), side)
    whole = np.add.reduceat(pixels, pixel[:-1], axis=0, dtype=np.int64)
    whole[pixel[:-1] == pixel[1:]] = 0  # reduceat gives the pixel itself for an empty stretch
    begun = part.reshape(-1, *[1] * (pixels.ndim - 1)) * pixels[np.minimum(pixel, len(pixels) - 1)].astype(np.int64)
    return whole * side + begun[1:] - begun[:-1]


def encode(pixels: np.ndarray, settings: ImageSettings) -> bytes:
    """Encodes uint8 (H, W, C) pixels as ``settings.encoding``; ``raw`` is their bytes in HWC order."""
    if settings.encoding == "raw":
        return pixels.tobytes()
    if settings.encoding == "png":
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
        return buffer.getvalue()
    gray = pixels.shape[2] == 1
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels),
        quality=settings.quality,
        colorspace="GRAY" if gray else "RGB",
        colorsubsampling="Gray" if gray else CHROMA,
    )


def _keep(data: bytes, decoded: Decoded, settings: ImageSettings) -> StoredImage:
    """Keeps the source's bytes if DALI's decoder takes them, else stores the decoded pixels as JPEG."""
    from pipeline.preparation.decoder_check import (
        dali_accepts,  # loads the codec library, which only this encoding needs
    )

    converted: tuple[str, ...] = ()
    if not dali_accepts(data):
        data = encode(decoded.pixels, dataclasses.replace(settings, encoding="jpeg"))
        converted = ("refused by DALI's decoder, encoded again as JPEG",)
    return StoredImage(data, decoded.pixels, decoded.width_px, decoded.height_px, converted)


def _kind(data: bytes, settings: ImageSettings) -> str:
    if not data:
        raise ImageError("empty file")
    if len(data) > settings.max_bytes:
        raise ImageError(f"{len(data):,} bytes, more than --max-bytes {settings.max_bytes:,}")
    kind = next((name for signature, name in SIGNATURES.items() if data.startswith(signature)), None)
    if kind in ("JPEG", "PNG"):
        return kind
    if kind:
        raise ImageError(f"{kind} is not supported: only JPEG and PNG are")
    raise ImageError("not an image: neither JPEG nor PNG by its content")


def _check_size(width: int, height: int, settings: ImageSettings) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"damaged: {width}x{height} pixels")
    if width * height > settings.max_pixels:
        raise ImageError(f"{width}x{height} is more than --max-pixels {settings.max_pixels:,}")


def _decode_jpeg(data: bytes, settings: ImageSettings) -> Decoded | None:
    """Decodes an ordinary JPEG by libjpeg-turbo; None if it is unusual or damaged, for the slow path to tell."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, settings)
    if colors not in ("YCbCr", "RGB", "Gray"):
        return None
    # Decoding at a half, a quarter or an eighth is enough for bicubic; area averaging weighs every pixel of the source.
    minimum = 2 * settings.resize_px if settings.resize_px and settings.filter == "bicubic" else 0
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            colorspace="GRAY" if settings.channels == 1 else "RGB",
            min_height=minimum,
            min_width=minimum,
            min_factor=2 if minimum else 1,
        )
    except ValueError:
        return None
    converted = ["gray to RGB"] if colors == "Gray" and settings.channels == 3 else []
    pixels = _upright(pixels, _jpeg_orientation(data), converted)
    return Decoded(pixels, width, height, tuple(converted))


def _decode_slowly(data: bytes, kind: str, settings: ImageSettings) -> Decoded:
    """Decodes by Pillow: PNG, and JPEGs that are CMYK or that libjpeg-turbo's strict mode refused."""
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
        _check_size(*image.size, settings)
        image.load()
    except ImageError:
        raise
    except Exception as error:  # hostile bytes make decoders fail in many ways; each is this image's reason, not ours
        raise ImageError(f"damaged {kind}: {error}".replace("\n", " ")) from None
    converted: list[str] = []
    pixels = _eight_bit(image, settings.channels, converted)
    pixels = _upright(pixels, _orientation(image), converted)
    return Decoded(pixels, image.width, image.height, tuple(converted))


def _eight_bit(image: Image.Image, channels: int, converted: list[str]) -> np.ndarray:
    """Any Pillow image as uint8 (H, W, channels); transparency is dropped, as DALI does."""
    target = "L" if channels == 1 else "RGB"
    names = {"1": "1-bit", "L": "gray", "LA": "gray with alpha", "P": "palette", "RGBA": "RGBA", "CMYK": "CMYK"}
    if image.mode.startswith("I"):  # 16-bit gray: Pillow would clip at 255 instead of scaling
        converted.append(f"16-bit gray to {target}")
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif image.mode != target:
        converted.append(f"{names.get(image.mode, image.mode)} to {target}")
    pixels = np.asarray(image if image.mode == target else image.convert(target))
    return pixels.reshape(image.height, image.width, channels)


def _upright(pixels: np.ndarray, orientation: int, converted: list[str]) -> np.ndarray:
    """Turns and mirrors pixels (H, W, C) as the EXIF orientation 1..8 says."""
    if orientation not in ORIENTATIONS:
        return pixels
    converted.append(f"EXIF orientation {orientation} applied")
    transpose, flip_rows, flip_columns = ORIENTATIONS[orientation]
    pixels = pixels.transpose(1, 0, 2) if transpose else pixels
    return np.ascontiguousarray(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def _jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 if it states none; walks the segments only as far as the first scan."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        if marker == 0xFF:
            position += 1
            continue
        if marker == 0xE1 and data.startswith(b"Exif\0\0", position + 4):
            return _exif_orientation(data[position + 4 : position + 2 + length])
        if marker == 0xDA:
            break
        position += 2 + length
    return 1


def _exif_orientation(segment: bytes) -> int:
    exif = Image.Exif()
    try:
        exif.load(segment)
        return _valid(exif.get(ORIENTATION_TAG))
    except Exception:  # broken EXIF says nothing about orientation; the image itself may be fine
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        return _valid(image.getexif().get(ORIENTATION_TAG))
    except Exception:  # as above
        return 1


def _valid(orientation: object) -> int:
    return orientation if isinstance(orientation, int) else 1


def _resize_rgb(pixels: np.ndarray, side_px: int) -> np.ndarray:
    """torch's vectorised uint8 resampling: Pillow's filter, within one gray level of it, 5 times as fast."""
    import torch  # takes 2 s to import, so only workers that resize RGB images load it

    channels_last = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(channels_last, (side_px, side_px), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())
