"""Image files as people have them: every kind that is read, and every kind of bad file with the words of its reason."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

ORIENTATION_TAG = 0x0112
XMP_TAG = 700  # of a TIFF
OTHER_KINDS = ("WebP", "GIF", "BMP", "TIFF", "AVIF")  # beside JPEG and PNG
KINDS_EXPECTED = "expected JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"


def photo(height: int = 60, width: int = 80, seed: int = 0) -> Image.Image:
    """A smooth image whose four corners differ."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file, by Pillow; the test is skipped where this Pillow lacks the kind."""
    need(kind)
    buffer = io.BytesIO()
    image.save(buffer, kind.upper(), **options)
    return buffer.getvalue()


def need(kind: str) -> None:
    """Skips the test where this Pillow lacks the kind."""
    if kind in ("WebP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow is built without {kind}")


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG with one chunk more, behind its header."""
    return png[:33] + chunk(kind, body) + png[33:]


def wide_png(color_type: int, samples: np.ndarray) -> bytes:
    """A PNG of 16 bits a sample, (H, W, C) uint16, which Pillow only writes in gray."""
    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def packet(orientation: object, *, element: bool = False, prefix: str = "tiff", quote: str = '"') -> bytes:
    """XMP that states an orientation."""
    name = f"{prefix}:Orientation"
    inside = f"<{name}>{orientation}</{name}>" if element else ""
    stated = "" if element else f" {name}={quote}{orientation}{quote}"
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:{prefix}="http://ns.adobe.com/tiff/1.0/"{stated}>{inside}</rdf:Description>'
        "</rdf:RDF></x:xmpmeta>"
    ).encode()


def turned(image: Image.Image, kind: str, *, exif: int | None = None, xmp: bytes = b"") -> bytes:
    """A file of ``kind`` that states an orientation in EXIF, in XMP or in both."""
    tags = Image.Exif()
    if exif is not None:
        tags[ORIENTATION_TAG] = exif
    if kind == "TIFF":
        stated = ({ORIENTATION_TAG: exif} if exif is not None else {}) | ({XMP_TAG: xmp} if xmp else {})
        return saved(image, kind, tiffinfo=stated)
    options: dict[str, Any] = {"exif": tags} if exif is not None else {}
    if kind == "PNG":
        data = saved(image, kind, **options)
        return with_chunk(data, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp) if xmp else data
    if kind in ("JPEG", "WebP"):
        options |= {"quality": 95}
    return saved(image, kind, **options | ({"xmp": xmp} if xmp else {}))


def patched(data: bytes, find: bytes, at: int, value: int) -> bytes:
    """The bytes with one changed, ``at`` behind the first ``find``."""
    changed = bytearray(data)
    changed[data.index(find) + at] = value
    return bytes(changed)


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Name -> a file that cannot be used, and its reason, word by word."""
    jpeg, png, gif, bmp, tiff = (saved(photo(), kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF"))
    frame = b"\xff\xc0"
    found: dict[str, tuple[bytes, str]] = {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"I am text", f"not an image by its content: {KINDS_EXPECTED}"),
        "sound.webp": (b"RIFF\x24\0\0\0WAVEfmt ", f"not an image by its content: {KINDS_EXPECTED}"),
        "page.jpg": (b"\n<!DOCTYPE html><title>404</title>", f"a web page is not supported: {KINDS_EXPECTED}"),
        "pointer.jpg": (
            b"version https://git-lfs.github.com/spec/v1\n",
            f"a Git LFS pointer (git lfs pull fetches the file) is not supported: {KINDS_EXPECTED}",
        ),
        "phone.heic": (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
            f"a HEIC image is not supported: {KINDS_EXPECTED}",
        ),
        "phone.jpg": (
            b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99),
            f"a HEIC image is not supported: {KINDS_EXPECTED}",
        ),
        "film.jpg": (
            b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(99),
            f"a video, or an image of a camera's own kind is not supported: {KINDS_EXPECTED}",
        ),
        "twelve.jpg": (
            patched(jpeg, frame, 4, 12),
            "12-bit JPEG is not supported: only JPEG of 8 bits a sample is",
        ),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated JPEG: it ends without its end marker"),
        "head.jpg": (jpeg[:30], "damaged JPEG: no frame header before its first scan"),
        "cut.png": (png[: len(png) // 2], "truncated PNG: it ends inside its chunk IDAT"),
        "header.png": (patched(png, b"IHDR", 7, 1), "damaged PNG: its chunk IHDR does not match its checksum"),
        "pixels.png": (patched(png, b"IDAT", 40, 1), "damaged PNG: its chunk IDAT does not match its checksum"),
        "headless.png": (png[:8], "damaged PNG: no chunk IHDR"),
        "cut.gif": (gif[: len(gif) // 2], "damaged GIF: its pixels cannot be decoded"),
        "cut.bmp": (bmp[: len(bmp) // 2], "damaged BMP: its pixels cannot be decoded"),
        "head.bmp": (b"BM" + bytes(60), "damaged BMP: its header cannot be decoded"),
        "cut.tif": (tiff[: len(tiff) - 9], "damaged TIFF: its pixels cannot be decoded"),
        "head.tif": (b"II*\0" + bytes(60), "damaged TIFF: its header cannot be decoded"),
        "float.tif": (
            saved(Image.new("F", (8, 8)), "TIFF"),
            "floating-point samples in a TIFF have no range: expected samples of at most 16 bits",
        ),
        "raw.tif": (
            saved(photo(), "TIFF", tiffinfo={254: 1}),
            "a TIFF that begins with a preview, as a camera's raw files do: develop it into a JPEG or PNG",
        ),
    }
    for marker, coding in ((0xC3, "lossless"), (0xC9, "arithmetic-coded"), (0xCA, "arithmetic-coded")):
        found[f"{coding} {marker:x}.jpg"] = (
            patched(jpeg, frame, 1, marker),
            f"{coding} JPEG is not supported: only Huffman-coded baseline and progressive JPEG is",
        )
    for kind in ("WebP", "AVIF"):
        if features.check(kind.lower()):
            data = saved(photo(), kind)
            found[f"cut.{kind.lower()}"] = (data[: len(data) // 2], f"damaged {kind}: its header cannot be decoded")
    return found


def good_files() -> dict[str, tuple[bytes, str]]:
    """Name -> a sound file of 80x60 px upright, and what ``prepare`` says that it converted."""
    image = photo()
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    found = {
        "plain.jpg": (saved(image, "JPEG"), ""),
        "gray.jpg": (saved(image.convert("L"), "JPEG"), "gray to RGB"),
        "cmyk.jpg": (saved(image.convert("CMYK"), "JPEG"), "CMYK to RGB"),
        "ycck.jpg": (patched(saved(image.convert("CMYK"), "JPEG"), b"Adobe", 11, 2), "CMYK to RGB"),
        "progressive.jpg": (saved(image, "JPEG", progressive=True), ""),
        "plain.png": (saved(image, "PNG"), ""),
        "palette.png": (saved(image.convert("P"), "PNG", transparency=3), "palette to RGB"),
        "one bit.png": (saved(image.convert("1"), "PNG"), "1-bit to RGB"),
        "gray alpha.png": (saved(alpha.convert("LA"), "PNG"), "gray with alpha to RGB"),
        "alpha.png": (saved(alpha, "PNG"), "RGBA to RGB"),
        "sixteen gray.png": (saved(Image.fromarray(_sixteen(image)[..., 0]), "PNG"), "16-bit gray to RGB"),
        "sixteen.png": (wide_png(2, _sixteen(image)), "16 bits a sample to 8"),
        "animated.png": (saved(image, "PNG", save_all=True, append_images=[photo(seed=1)]), "first of several frames"),
    }
    for kind in OTHER_KINDS:
        if kind in ("WebP", "AVIF") and not features.check(kind.lower()):
            continue
        words = f"{kind} converted" + ("; palette to RGB" if kind == "GIF" else "")
        found[f"plain.{kind.lower()}"] = (saved(image, kind), words)
        if kind != "BMP":
            several = saved(image, kind, save_all=True, append_images=[photo(seed=1), photo(seed=2)])
            found[f"several.{kind.lower()}"] = (several, f"{words}; first of several frames")
    turned_right = image.transpose(Image.Transpose.ROTATE_90)  # orientation 6 turns it back
    for kind in ("JPEG", "PNG", "WebP", "TIFF", "AVIF"):
        if kind in ("WebP", "AVIF") and not features.check(kind.lower()):
            continue
        before = "" if kind in ("JPEG", "PNG") else f"{kind} converted; "
        found[f"exif.{kind.lower()}"] = (turned(turned_right, kind, exif=6), f"{before}EXIF orientation 6 applied")
        if kind == "AVIF":
            continue  # nothing but its own property turns it
        found[f"xmp.{kind.lower()}"] = (turned(turned_right, kind, xmp=packet(6)), f"{before}XMP orientation 6 applied")
    return found


def _sixteen(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint16 whose high bytes are the image."""
    return np.asarray(image).astype(np.uint16) * 256 + 77
