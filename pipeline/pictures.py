"""What counts as a picture: by its name, so that a million files need not be opened, else by its first bytes."""

# Also kinds that cannot be decoded: such a file is a picture that was left out with a reason, not one passed over.
EXTENSIONS = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "bmp", "dib", "webp", "tif", "tiff", "avif", "avifs"),
        *("heic", "heif", "jp2", "j2k", "jxl", "ppm", "pgm", "pbm", "pnm", "tga", "psd", "svg", "exr", "hdr", "ico"),
        *("dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf"),
    )
)
HEAD_BYTES = 32
MAGICS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"8BPS", b"\0\0\0\x0cjP  ")
BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")


def has_picture_name(name: str) -> bool:
    """Tells whether the extension is that of pictures, in any case."""
    _, dot, extension = name.rpartition(".")
    return extension.lower() in EXTENSIONS and dot == "."


def has_picture_head(head: bytes) -> bool:
    """Tells whether the first :data:`HEAD_BYTES` bytes of a file are those of a picture."""
    return (
        head.startswith(MAGICS)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in BRANDS)
        or (head[:2] == b"BM" and head[6:10] == bytes(4) and len(head) >= 26)  # 14 bytes, then a header of 12 or more
    )
