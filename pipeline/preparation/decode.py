"""Bytes of an image file into upright 8-bit pixels, or the reason why not.

What a file is, its content tells, never its name. Ordinary JPEGs go through libjpeg-turbo, everything else through
Pillow. A reason is in our own words: those of a library change with its version, and some hold addresses of memory.
"""

import dataclasses
import io
import warnings
import zlib
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, features

from pipeline.config import ImageSettings
from pipeline.errors import ImageError
from pipeline.preparation.containers import (
    KINDS,
    LONGEST_TEXT,
    JpegHeader,
    PngHeader,
    count_scans,
    foreign_kind,
    kind_of,
    png_chunks,
    read_jpeg_header,
    read_png_header,
)
from pipeline.preparation.orientation import ORIENTATION_TAG, orientation_of, upright

Image.MAX_IMAGE_PIXELS = None  # our own cap (max_pixels) is checked before any pixel is decoded

KEPT = ("JPEG", "PNG")  # kinds whose bytes a data set may hold; those of the others are always converted
OPTIONAL = {"WebP": "webp", "AVIF": "avif"}  # kinds that a build of Pillow may lack
WIDTH_TAG, HEIGHT_TAG = 256, 257  # of a TIFF
NEW_SUBFILE_TAG, REDUCED = 254, 1  # TIFF: this image is a smaller version of another one in the file
# Bytes that decoding takes for each pixel, at most: measured, the upright pixels that come of it among them.
SEVERAL_SCANS = "JPEG of several scans"
UNUSUAL = "CMYK or damaged JPEG of several scans"
PIXEL_BYTES = {
    "JPEG": 10,
    SEVERAL_SCANS: 10,
    UNUSUAL: 13,
    "PNG": 9,
    "GIF": 10,
    "BMP": 10,
    "TIFF": 10,  # PNG: and its file
    "WebP": 18,
    "AVIF": 14,
}
ALLOWED_PIXEL_BYTES = 10
SCANS_AT_MOST_PIXELS = 20  # scans of an image of --max-pixels; of a smaller one more. Usual are 10, whatever the size
START_OF_SCAN_MARKER = b"\xff\xda"
SPARE_BYTES = 16 * 2**20  # a copy of a file that is no larger is nothing beside a worker's own memory
STRIP_PIXELS = 2**22
FIRST_FRAME = "first of several frames"
MODES = {"1": "1-bit", "L": "gray", "LA": "gray with alpha", "P": "palette", "PA": "palette with alpha"}


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Decoded pixels with what they were.

    Attributes:
        pixels: uint8 (H, W, C).
        width_px: width as the file states it.
        height_px: height as the file states it.
        converted: what was converted, in words.
        kind: one of :data:`~pipeline.preparation.containers.KINDS`; empty for pixels that were no file.
    """

    pixels: np.ndarray
    width_px: int
    height_px: int
    converted: tuple[str, ...]
    kind: str = ""


def decode(data: bytes, settings: ImageSettings) -> Decoded:
    """Decodes an image file into upright 8-bit pixels with ``settings.channels`` channels.

    A large JPEG is decoded at 1/2, 1/4 or 1/8, as long as its shorter side stays at least twice the target.

    Raises:
        ImageError: it is empty, of another kind, too large, or damaged.
    """
    kind = _checked_kind(data, settings)
    if kind != "JPEG":
        return _decode_slowly(data, kind, settings, None)
    header = read_jpeg_header(data)
    if header.variant:
        raise ImageError(header.variant)
    return _decode_jpeg(data, settings, header) or _decode_slowly(data, kind, settings, header)


def _checked_kind(data: bytes, settings: ImageSettings) -> str:
    if not data:
        raise ImageError("empty file")
    if len(data) > settings.max_bytes:
        raise ImageError(f"{len(data):,} bytes, more than --max-bytes {settings.max_bytes:,}")
    kind = kind_of(data)
    if kind is None:
        found = foreign_kind(data)
        problem = f"{found} is not supported" if found else "not an image by its content"
        raise ImageError(f"{problem}: expected {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if kind in OPTIONAL and not features.check(OPTIONAL[kind]):
        raise ImageError(f"{kind} is not supported by the Pillow that is installed here: its wheels have it")
    return kind


def _check_size(width: int, height: int, settings: ImageSettings) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"damaged: {width}x{height} pixels")
    if width * height > settings.max_pixels:
        raise ImageError(f"{width}x{height} is more than --max-pixels {settings.max_pixels:,}")


def _check_cost(width: int, height: int, settings: ImageSettings, kind: str, extra_bytes: int = 0) -> None:
    """Refuses what would take more memory than a worker has declared to Ray (:func:`decoding_bytes`)."""
    needed = width * height * PIXEL_BYTES[kind] + max(0, extra_bytes - SPARE_BYTES)
    if needed > decoding_bytes(settings):
        raise ImageError(
            f"{width}x{height} {kind} takes {PIXEL_BYTES[kind]} bytes a pixel to decode, in all "
            f"{needed // 2**20:,} MiB, and --max-pixels {settings.max_pixels:,} allows "
            f"{decoding_bytes(settings) // 2**20:,} MiB"
        )


def decoding_bytes(settings: ImageSettings) -> int:
    """Most memory that decoding one image takes, beside the file itself."""
    return settings.max_pixels * ALLOWED_PIXEL_BYTES


def _check_scans(data: bytes, width: int, height: int, settings: ImageSettings) -> None:
    """Refuses a JPEG of so many scans that decoding it would take minutes: each goes through all pixels."""
    most = SCANS_AT_MOST_PIXELS * settings.max_pixels // (width * height)
    if data.count(START_OF_SCAN_MARKER) > most and (found := count_scans(data)) > most:
        raise ImageError(f"{found:,} scans of {width}x{height}: --max-pixels {settings.max_pixels:,} allows {most:,}")


def _decode_jpeg(data: bytes, settings: ImageSettings, header: JpegHeader) -> Decoded | None:
    """Decodes an ordinary JPEG by libjpeg-turbo; None if it is unusual or damaged, for the slow path to tell."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, settings)
    if not header.one_scan:
        _check_scans(data, width, height, settings)
        _check_cost(width, height, settings, SEVERAL_SCANS)
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
    pixels = _turned(pixels, orientation_of(header.exif, header.xmp), converted)
    return Decoded(pixels, width, height, tuple(converted), "JPEG")


def _decode_slowly(data: bytes, kind: str, settings: ImageSettings, header: JpegHeader | None) -> Decoded:
    """Decodes by Pillow: JPEGs that are CMYK or that libjpeg-turbo's strict mode refused, and every other kind."""
    png = read_png_header(data) if kind == "PNG" else None
    converted: list[str] = [] if kind in KEPT else [f"{kind} converted"]
    image = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            image = Image.open(io.BytesIO(png.pixels if png else data), formats=[kind.upper()])
            _check_size(*image.size, settings)
            several_scans = header is not None and not header.one_scan
            _check_cost(*image.size, settings, UNUSUAL if several_scans else kind, len(png.pixels) if png else 0)
            if several_scans:
                _check_scans(data, *image.size, settings)
            _check_variant(image)
            size, orientation = _stated_size(image), _stated_orientation(image, header or png)
            several = png.animated if png else _has_frames(image, kind)
            image.load()
            pixels, deep = _eight_bit(image, settings.channels, converted), image.mode.startswith("I")
            image.close()
    except ImageError:
        raise
    except Exception:  # hostile bytes make decoders fail in many ways; each is this image's reason, not ours
        raise ImageError(_damage(data, kind, opened=image is not None)) from None
    if png and png.bits == 16 and not deep:
        converted.insert(0, "16 bits a sample to 8")
    if several:
        converted.append(FIRST_FRAME)
    pixels = _turned(pixels, orientation, converted, already=kind == "TIFF" and orientation[1] == "EXIF")
    return Decoded(pixels, *size, tuple(converted), kind)


def _check_variant(image: Image.Image) -> None:
    """Refuses what Pillow would decode into something that the image is not."""
    if image.mode in ("F", "I") and image.format != "PNG":
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ImageError(f"{kind} samples in a {image.format} have no range: expected samples of at most 16 bits")
    tags = getattr(image, "tag_v2", {})
    if tags.get(NEW_SUBFILE_TAG, 0) & REDUCED:
        raise ImageError("a TIFF that begins with a preview, as a camera's raw files do: develop it into a JPEG or PNG")


def _stated_size(image: Image.Image) -> tuple[int, int]:
    """Width and height before any turn; Pillow's size of a TIFF is that after it."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(WIDTH_TAG, image.width), tags.get(HEIGHT_TAG, image.height)


def _stated_orientation(image: Image.Image, header: JpegHeader | PngHeader | None) -> tuple[int, str]:
    """As :func:`orientation_of`."""
    if header is not None:
        return orientation_of(header.exif, header.xmp)
    xmp = image.info.pop("xmp", b"")[
        :LONGEST_TEXT
    ]  # taken away, so that Pillow does not turn a TIFF by it in its own way
    if image.format == "TIFF":  # its tags are EXIF, and Pillow turns it by them
        stated: Any = getattr(image, "tag_v2", {}).get(ORIENTATION_TAG)
        return (int(stated), "EXIF") if stated in range(1, 9) else orientation_of(b"", xmp)
    # An AVIF has an orientation of its own, which Pillow puts into EXIF; by its standard nothing else may turn it.
    return orientation_of(image.info.get("exif", b""), b"" if image.format == "AVIF" else xmp)


def _has_frames(image: Image.Image, kind: str) -> bool:
    if kind == "JPEG":
        return False  # further images in a JPEG are previews and depth maps
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # what follows the first frame is damaged; that is nothing to it
        return True


def _eight_bit(image: Image.Image, channels: int, converted: list[str]) -> np.ndarray:
    """Any Pillow image as uint8 (H, W, channels); transparency is dropped, as DALI does."""
    target = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I"):
        converted.append(f"16-bit gray to {target}")
    elif image.mode != target:
        converted.append(f"{MODES.get(image.mode, image.mode)} to {target}")
    rows = max(1, STRIP_PIXELS // image.width)
    if rows >= image.height:
        return _converted(image, target).reshape(image.height, image.width, channels)
    pixels = np.empty((image.height, image.width, channels), np.uint8)
    for top in range(0, image.height, rows):  # a copy of all of a large image in between would double its memory
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = _converted(strip, target).reshape(-1, image.width, channels)
    return pixels


def _converted(image: Image.Image, target: str) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit gray: Pillow would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return np.asarray(image if image.mode == target else image.convert(target))


def _turned(pixels: np.ndarray, stated: tuple[int, str], converted: list[str], *, already: bool = False) -> np.ndarray:
    """Upright pixels, and the words that say so; ``already``: the decoder has turned them."""
    orientation, said_by = stated
    if orientation == 1:
        return pixels
    converted.append(f"{said_by} orientation {orientation} applied")
    return pixels if already else upright(pixels, orientation)


def _damage(data: bytes, kind: str, *, opened: bool) -> str:
    """What is wrong with a file that could not be decoded, found out without the decoder."""
    if kind == "JPEG":
        if not read_jpeg_header(data).frame:
            return "damaged JPEG: no frame header before its first scan"
        if b"\xff\xd9" not in data[data.rfind(b"\xff\xda") :]:
            return "truncated JPEG: it ends without its end marker"
    if kind == "PNG":
        return _png_damage(data)
    return f"damaged {kind}: its {'pixels' if opened else 'header'} cannot be decoded"


def _png_damage(data: bytes) -> str:
    kinds = set()
    for chunk in png_chunks(data):
        name = chunk.kind.decode("ascii", "backslashreplace")
        if chunk.end > len(data):
            return f"truncated PNG: it ends inside its chunk {name}"
        checksum = int.from_bytes(data[chunk.end - 4 : chunk.end])
        if chunk.kind[:1].isupper() and zlib.crc32(data[chunk.start + 4 : chunk.end - 4]) != checksum:
            return f"damaged PNG: its chunk {name} does not match its checksum"
        kinds.add(chunk.kind)
    for name in ("IHDR", "IDAT", "IEND"):
        if name.encode() not in kinds:
            return f"{'truncated' if name == 'IEND' else 'damaged'} PNG: no chunk {name}"
    return "damaged PNG: its pixels cannot be decoded"
