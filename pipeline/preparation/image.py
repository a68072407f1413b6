"""One image: the source's bytes or pixels in, checked and resized bytes out.

Oddities are converted and reported: WebP, GIF, BMP, TIFF and AVIF, CMYK, gray, palette, 16-bit and alpha become 8-bit
RGB, the orientation that EXIF or XMP states is applied to the pixels. A 1x1 image is an image: it is kept, and enlarged
like any small one.
"""

import dataclasses
import io
from collections.abc import Iterable, Iterator

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.config import CHROMA, ImageSettings
from pipeline.errors import ImageError
from pipeline.preparation.decode import FIRST_FRAME, KEPT, Decoded, decode

BATCH_IMAGES = 16
BATCH_BYTES = (
    8 * 2**20
)  # of files and decoded pixels: a batch of large images ends early, so that memory stays what it was
SAME_LEVELS = 4  # two builds of libjpeg-turbo differ by so many gray levels; another rotation or color by more
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


def make_image(payload: Payload, settings: ImageSettings) -> StoredImage:
    """Checks, resizes and encodes one image.

    Args:
        payload: bytes of an image file, or uint8 pixels (H, W, C).
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
        size_bytes += len(payload) if isinstance(payload, bytes) else 0  # a small image may lie in a large file
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
    """Keeps the source's bytes where the loader makes the same pixels of them, else stores ours as PNG."""
    why = _why_not_kept(data, decoded)
    if why:
        converted = (*decoded.converted, f"stored as PNG{why}")
        data = encode(decoded.pixels, dataclasses.replace(settings, encoding="png"))
    else:
        converted = tuple(words for words in decoded.converted if words == FIRST_FRAME)  # the file is as it was
    return StoredImage(data, decoded.pixels, decoded.width_px, decoded.height_px, converted)


def _why_not_kept(data: bytes, decoded: Decoded) -> str:
    from pipeline.preparation.decoder_check import (
        dali_pixels,
    )  # loads the codec library, which only this encoding needs

    if decoded.kind not in KEPT:
        return ": only bytes of JPEGs and PNGs are kept"
    found = dali_pixels(data)
    if found is None:
        return ": the loader's decoder refuses its bytes"
    if found.shape != decoded.pixels.shape:
        return ": the loader's decoder does not turn it"
    if np.array_equal(found, decoded.pixels):
        return ""
    difference = np.maximum(found, decoded.pixels) - np.minimum(found, decoded.pixels)
    return "" if difference.max() <= SAME_LEVELS else ": the loader's decoder shows it otherwise"


def _resize_rgb(pixels: np.ndarray, side_px: int) -> np.ndarray:
    """torch's vectorised uint8 resampling: Pillow's filter, within one gray level of it, 5 times as fast."""
    import torch  # takes 2 s to import, so only workers that resize RGB images load it

    channels_last = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(channels_last, (side_px, side_px), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())
