"""What can be asked of ``prepare``: typed, checked, and the part of it that decides the bytes."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, require
from pipeline.files import AnyPath

ENCODINGS = ("jpeg", "png", "raw", "original")
MAX_SHARD_SIZE = 10_000_000  # sums of 8-bit values per position stay below 2^32
ON_ERROR = ("quarantine", "fail")
CHROMA = "420"  # half of the chroma samples each way: what nearly every photo source has, and the fastest to decode
MAX_ERRORS = re.compile(r"\d+|\d+(\.\d+)?%")
FILTER = "centre square, then antialiased bicubic"  # spelled so in every manifest there is: its bytes stay
FILTERS = {"bicubic": FILTER, "area": "center square, then area averaging, halves rounded up"}  # as manifests say it
ORIENTATION = "that of EXIF, else of XMP, applied to the pixels, tags removed"
LEFT_ORIENTATION = "that of EXIF as the stored bytes state it, for the loader to apply; else applied to the pixels"


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How one image is checked, resized and stored.

    Attributes:
        resize_px: side of the stored square, or None to keep the size.
        encoding: ``jpeg``, ``png``, ``raw`` (uint8 HWC) or ``original`` (the source's bytes,
            if DALI's decoder takes them).
        quality: JPEG quality, 1 to 100.
        channels: 3 for RGB, 1 for gray.
        filter: of resizing, one of :data:`FILTERS`: ``bicubic``, or ``area`` as cuda-convnet2's preparation has it.
        max_pixels: an image of more pixels is refused before it is decoded.
        max_bytes: a file of more bytes is refused before it is read.
    """

    resize_px: int | None = 256
    encoding: str = "jpeg"
    quality: int = 90
    channels: int = 3
    max_pixels: int = 100_000_000
    max_bytes: int = 256 * 2**20
    filter: str = "bicubic"


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Everything that ``python -m pipeline prepare`` takes.

    Attributes:
        source: name of the source, see :data:`pipeline.sources.SOURCES`.
        output: folder of the data set.
        input: folder of the source, or its URL; None where the source brings its own images.
        workers: shards in work at once; 0 means every core (on a cluster: every CPU of it).
        seed: seed of the split and of the global shuffle.
        shard_size: most samples in one tar, 1 to 10,000,000; the shards of a split differ by at most one sample.
        resize: ``default`` (the source's own), ``none`` or a side in pixels.
        encoding: ``default`` or one of :data:`ENCODINGS`.
        quality: JPEG quality, 1 to 100.
        val_fraction: share of each class that goes to ``val`` where the source has no split, 0 <= share < 1.
        address: address of a Ray cluster, None for this machine.
        on_error: ``quarantine`` lists images that cannot be used and goes on, ``fail`` stops at the first.
        max_pixels: size cap in pixels.
        max_bytes: size cap in bytes.
        splits: only these splits; empty for all that the source has.
        limit: only the first images of each split's shuffled order, for a trial; None for all.
        label_order: ``default`` (the source's own), ``alphabetical`` or ``ilsvrc``.
        max_errors: stop when more images than this cannot be used, ``N`` or ``P%``; None for no limit.
        verify_source: check the published md5 of the input before anything else.
        filter: of resizing, one of :data:`FILTERS`.
        labels: file with the classes of pictures that lie in no class folders (source ``folder``).
        follow_links: links are followed also where they lead out of the input.
    """

    source: str
    output: Path
    input: AnyPath | None = None
    workers: int = 0
    seed: int = 0
    shard_size: int = 2048
    resize: str = "default"
    encoding: str = "default"
    quality: int = 90
    val_fraction: float = 0.1
    address: str | None = None
    on_error: str = "quarantine"
    max_pixels: int = 100_000_000
    max_bytes: int = 256 * 2**20
    splits: tuple[str, ...] = ()
    limit: int | None = None
    label_order: str = "default"
    max_errors: str | None = None
    verify_source: bool = False
    filter: str = "bicubic"
    labels: AnyPath | None = None
    follow_links: bool = False

    def __post_init__(self) -> None:
        require(self.workers >= 0, "--workers", self.workers, "0 (all cores) or more")
        require(self.seed >= 0, "--seed", self.seed, "0 or more")
        require(1 <= self.shard_size <= MAX_SHARD_SIZE, "--shard-size", self.shard_size, f"1 to {MAX_SHARD_SIZE:,}")
        require(1 <= self.quality <= 100, "--quality", self.quality, "1 to 100")
        require(0 <= self.val_fraction < 1, "--val-fraction", self.val_fraction, "a share from 0 to below 1")
        require(self.on_error in ON_ERROR, "--on-error", self.on_error, " or ".join(ON_ERROR))
        require(self.encoding in (*ENCODINGS, "default"), "--encoding", self.encoding, ", ".join(ENCODINGS))
        require(self.filter in FILTERS, "--filter", self.filter, " or ".join(FILTERS))
        require(self.max_pixels >= 1, "--max-pixels", self.max_pixels, "1 or more")
        require(self.max_bytes >= 1, "--max-bytes", self.max_bytes, "1 or more")
        require(self.limit is None or self.limit >= 1, "--limit", self.limit, "1 or more")
        orders = ("default", "alphabetical", "ilsvrc")
        require(self.label_order in orders, "--label-order", self.label_order, "alphabetical or ilsvrc")
        if self.label_order != "default":
            require(self.source == "imagenet", "--label-order", self.label_order, "it with --source imagenet only")
        if self.labels is not None:
            require(self.source == "folder", "--labels", self.labels, "it with --source folder only")
        if self.max_errors is not None:
            require(MAX_ERRORS.fullmatch(self.max_errors) is not None, "--max-errors", self.max_errors, "N or P%")
        if self.resize not in ("default", "none"):
            side = int(self.resize) if self.resize.isdecimal() else 0
            require(1 <= side <= 4096, "--resize", self.resize, "none or a side in pixels from 1 to 4096")
        if self.encoding == "original":
            require(
                self.resize == "none", "--encoding", "original", "--resize none beside it (bytes are kept as they are)"
            )

    def image_settings(self, *, encoded: bool, channels: int) -> ImageSettings:
        """Resolves the defaults that depend on the source.

        Args:
            encoded: the source holds JPEG or PNG files; otherwise it holds pixels.
            channels: channels of the source's images.

        Raises:
            ConfigError: ``original`` was asked of a source that holds pixels, or a filter where nothing is resized.
        """
        resize_px = 256 if encoded else None
        if self.resize != "default":
            resize_px = None if self.resize == "none" else int(self.resize)
        require(bool(resize_px) or self.filter == "bicubic", "--filter", self.filter, "--resize N beside it")
        encoding = self.encoding
        if encoding == "default":
            encoding = ("original" if resize_px is None else "jpeg") if encoded else "png"
        if encoding == "original" and not encoded:
            raise ConfigError(
                f"--encoding original: source {self.source} holds pixels, not files; use png, jpeg or raw"
            )
        return ImageSettings(
            resize_px=resize_px,
            encoding=encoding,
            quality=self.quality,
            channels=channels,
            max_pixels=self.max_pixels,
            max_bytes=self.max_bytes,
            filter=self.filter,
        )

    def error_limit(self, total: int) -> float:
        """Images of ``total`` that may be left out."""
        if self.max_errors is None:
            return float("inf")
        if self.max_errors.endswith("%"):
            return total * float(self.max_errors[:-1]) / 100
        return int(self.max_errors)

    def num_workers(self) -> int:
        """Shards in work at once on this machine."""
        return self.workers or len(os.sched_getaffinity(0))


def byte_settings(image: ImageSettings) -> dict[str, Any]:
    """The image settings that decide the stored bytes, as the manifest records them."""
    jpeg = image.encoding == "jpeg"
    return {
        "resize_px": image.resize_px,
        "encoding": image.encoding,
        "quality": image.quality if jpeg else None,
        "chroma": CHROMA if jpeg and image.channels == 3 else None,
        "filter": FILTERS[image.filter] if image.resize_px else None,
        "orientation": LEFT_ORIENTATION if image.encoding == "original" else ORIENTATION,
        "max_pixels": image.max_pixels,
        "max_bytes": image.max_bytes,
    }
