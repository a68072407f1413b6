"""What image files say before their pixels: their kind, a JPEG's frame, a PNG's chunks, where EXIF and XMP stand.

Written by hand because Pillow reads too much and too little: it refuses sound PNGs for long texts and color profiles,
and it does not tell how a JPEG is coded. Only lengths and markers are followed here, inside the bytes that are there.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}
KINDS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF")
# Files that people have among their images and that are not read, by how they begin.
FOREIGN = {
    b"\0\0\0\x0cjP  \r\n\x87\n": "a JPEG 2000 image",
    b"\xff\x4f\xff\x51": "a JPEG 2000 image",
    b"\0\0\0\x0cJXL \r\n\x87\n": "a JPEG XL image",
    b"\xff\x0a": "a JPEG XL image",
    b"8BPS": "a Photoshop document",
    b"%PDF": "a PDF document",
    b"<svg": "an SVG drawing",
    b"<!DOCTYPE": "a web page",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"version https://git-lfs": "a Git LFS pointer (git lfs pull fetches the file)",
    b"PK\x03\x04": "a zip archive",
}
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
CODINGS = {  # start-of-frame markers that no decoder here takes
    0xC3: "lossless",
    0xC5: "hierarchical",
    0xC6: "hierarchical",
    0xC7: "hierarchical",
    0xC9: "arithmetic-coded",
    0xCA: "arithmetic-coded",
    0xCB: "arithmetic-coded",
    0xCD: "arithmetic-coded",
    0xCE: "arithmetic-coded",
    0xCF: "arithmetic-coded",
}
SEQUENTIAL = {0xC0, 0xC1}
FRAMES = {0xC0, 0xC1, 0xC2, *CODINGS}
STANDALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
START_OF_SCAN, END_OF_IMAGE, APP1 = 0xDA, 0xD9, 0xE1
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # none of a scan's own bytes
EXIF_HEAD, XMP_HEAD, XMP_KEYWORD = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"XML:com.adobe.xmp"
MOST_SEGMENTS = 2**16  # of a JPEG before its pixels; decoders take minutes over 256 MiB of markers of one byte
MOST_CHUNKS = 2**18  # of a PNG: 256 MiB in pieces of a kilobyte
TEXTS, MOST_TEXTS = (b"iTXt", b"zTXt", b"tEXt"), 64  # further ones are not unpacked
LONGEST_CHUNK = 2**22  # of what is looked at for orientation: twice a text in hexadecimal digits
LONGEST_TEXT = 2**20  # of XMP that is unpacked; what follows says nothing about orientation


class JpegHeader(NamedTuple):
    """What stands before a JPEG's first scan.

    Attributes:
        frame: its start-of-frame marker, 0 if it has none.
        precision: bits a sample, 0 without a frame.
        exif: EXIF as Pillow loads it, empty if there is none.
        xmp: the XMP packet, empty if there is none.
        endless: so many segments come first that no decoder should be asked.
        one_scan: its first scan holds all that it shows, so a decoder needs no more than a row of blocks at a time.
    """

    frame: int
    precision: int
    exif: bytes
    xmp: bytes
    endless: bool
    one_scan: bool = False

    @property
    def variant(self) -> str:
        """Why no decoder here takes it, in words; empty for the usual codings."""
        if self.endless:
            return f"damaged JPEG: more than {MOST_SEGMENTS:,} markers before its pixels"
        if self.frame in CODINGS:
            return f"{CODINGS[self.frame]} JPEG is not supported: only Huffman-coded baseline and progressive JPEG is"
        if self.frame and self.precision != 8:
            return f"{self.precision}-bit JPEG is not supported: only JPEG of 8 bits a sample is"
        return ""


class PngChunk(NamedTuple):
    """One chunk of a PNG.

    Attributes:
        kind: its four letters.
        start: its first byte in the file, which is that of its length.
        end: the byte after its checksum; behind the file's end if it is truncated.
    """

    kind: bytes
    start: int
    end: int


class PngHeader(NamedTuple):
    """What a PNG says beside its pixels.

    Attributes:
        pixels: the file without chunks that its pixels do not need.
        exif: EXIF as Pillow loads it, empty if there is none.
        xmp: the XMP packet, empty if there is none.
        bits: bits a sample.
        animated: it holds further frames.
    """

    pixels: bytes
    exif: bytes
    xmp: bytes
    bits: int
    animated: bool


def kind_of(data: bytes) -> str | None:
    """One of :data:`KINDS` by the content, None if it is none of them."""
    for signature, kind in SIGNATURES.items():
        if data.startswith(signature):
            return kind
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    return "AVIF" if _brands(data) & {b"avif", b"avis"} else None


def foreign_kind(data: bytes) -> str | None:
    """What a file is that is no image we read, in words; None where its content does not tell."""
    if _brands(data) & set(HEIC_BRANDS):
        return "a HEIC image"
    if _brands(data):
        return "a video, or an image of a camera's own kind"
    head = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((words for start, words in FOREIGN.items() if data.startswith(start) or head.startswith(start)), None)


def _brands(data: bytes) -> set[bytes]:
    """The brands in the ``ftyp`` box of an ISO media file."""
    if data[4:8] != b"ftyp":
        return set()
    box = data[8 : min(int.from_bytes(data[:4]), 512)]
    return {box[:4], *(box[start : start + 4] for start in range(8, len(box) - 3, 4))}


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Follows the segments as far as the first scan."""
    frame = precision = components = 0
    exif = xmp = b""
    one_scan = False
    position = 2
    for _ in range(MOST_SEGMENTS):
        if position + 4 > len(data) or data[position] != 0xFF:
            break
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        if marker == 0xFF or marker in STANDALONE:
            position += 1 if marker == 0xFF else 2
            continue
        if marker == APP1:
            body = data[position + 4 : position + 2 + length]
            exif = exif or (body if body.startswith(EXIF_HEAD) else b"")
            xmp = xmp or (body.removeprefix(XMP_HEAD) if body.startswith(XMP_HEAD) else b"")
        elif marker in FRAMES and not frame:
            frame, precision = marker, data[position + 4] if position + 4 < len(data) else 0
            components = data[position + 9] if position + 9 < len(data) else 0
        elif marker == START_OF_SCAN:
            one_scan = frame in SEQUENTIAL and position + 4 < len(data) and data[position + 4] == components
            break
        position += 2 + length
    else:
        return JpegHeader(frame, precision, exif, xmp, endless=True)
    return JpegHeader(frame, precision, exif, xmp, endless=False, one_scan=one_scan)


def count_scans(data: bytes) -> int:
    """How many scans a JPEG has, as far as its end marker; what lies behind that (a preview, a film) has others."""
    count, position = 0, 2
    while found := MARKER.search(data, position):
        marker, position = data[found.start() + 1], found.end()
        if marker == END_OF_IMAGE:
            break
        count += marker == START_OF_SCAN
        if marker not in STANDALONE:
            position += int.from_bytes(data[position : position + 2])
    return count


def read_png_header(data: bytes) -> PngHeader:
    """Follows the chunks. Chunks that the pixels do not need are left out, whatever their length and checksum."""
    view = memoryview(data)
    pieces, exif, xmp, animated = [view[:8]], b"", b"", False
    bits, texts = data[24] if len(data) > 24 else 0, 0
    for chunk in png_chunks(data):
        if chunk.kind[:1].isupper() or chunk.kind == b"tRNS":
            pieces.append(view[chunk.start : chunk.end])
            continue
        texts += chunk.kind in TEXTS
        if texts > MOST_TEXTS:
            continue
        body = data[chunk.start + 8 : min(chunk.end - 4, chunk.start + 8 + LONGEST_CHUNK)]
        if chunk.kind == b"eXIf":
            exif = exif or EXIF_HEAD + body
        elif chunk.kind == b"acTL":
            animated = int.from_bytes(body[:4]) > 1
        elif chunk.kind == b"iTXt" and body.startswith(XMP_KEYWORD + b"\0"):
            xmp = xmp or _international_text(body)
        elif chunk.kind in (b"zTXt", b"tEXt") and body.startswith(b"Raw profile type "):
            exif = exif or _raw_profile(body, compressed=chunk.kind == b"zTXt")
    return PngHeader(b"".join(pieces), exif, xmp, bits, animated)


def png_chunks(data: bytes) -> Iterator[PngChunk]:
    """The chunks of a PNG in order, the last of them perhaps truncated."""
    position = 8
    for _ in range(MOST_CHUNKS):
        if position + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        yield PngChunk(kind, position, end)
        if kind == b"IEND":
            return
        position = end


def _international_text(body: bytes) -> bytes:
    """The text of an iTXt chunk."""
    compressed, text = body[len(XMP_KEYWORD) + 1 : len(XMP_KEYWORD) + 2] == b"\1", body[len(XMP_KEYWORD) + 3 :]
    text = text.split(b"\0", 2)[-1]  # behind language and translated keyword
    return _inflated(text) if compressed else text[:LONGEST_TEXT]


def _raw_profile(body: bytes, *, compressed: bool) -> bytes:
    """EXIF as ImageMagick writes it into a text chunk: in hexadecimal digits, behind three lines."""
    keyword, _, text = body.partition(b"\0")
    if keyword not in (b"Raw profile type exif", b"Raw profile type APP1"):
        return b""
    lines = (_inflated(text[1:]) if compressed else text[:LONGEST_TEXT]).split(b"\n", 3)
    try:
        found = bytes.fromhex(lines[3].decode("ascii")) if len(lines) == 4 else b""
    except ValueError:
        return b""
    return found if found.startswith(EXIF_HEAD) else b""


def _inflated(data: bytes) -> bytes:
    """At most :data:`LONGEST_TEXT` of a zlib stream; nothing of a damaged one."""
    try:
        return zlib.decompressobj().decompress(data, LONGEST_TEXT)
    except zlib.error:
        return b""
