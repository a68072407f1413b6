"""Images from anywhere, made into what the network sees, exactly as those of a data set: for predictions.

A picture is decoded, turned upright and resized with the settings that the data set's manifest records, and cropped
and normalized as :class:`pipeline.loader.batches.EvaluationLoader` does. Three things that ``prepare`` does for speed
and size are left out, so that any program can do the same from an exported file: a large JPEG is decoded whole, not at
a half or a quarter; bicubic resizing is Pillow's, from which prepare's differs by a gray level in a few pixels of a
thousand; and no JPEG's loss is added. A data set's own stored image is seen exactly as in an evaluation.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from pipeline.config import FILTERS, ImageSettings
from pipeline.errors import ConfigError, ImageError
from pipeline.loader.augmentation import Draws, center_geometry, check_crop, ten_views
from pipeline.loader.config import LoaderConfig
from pipeline.loader.net_input import NetInput
from pipeline.loader.normalize import Normalizer, check_statistics
from pipeline.loader.open_split import read_statistics
from pipeline.loader.staging import refuse_url
from pipeline.manifest import Manifest, read_manifest

Picture = Path | str | bytes | np.ndarray | Image.Image


class ImageReader:
    """Reads image files as if they were samples of a data set.

    Only the data set's manifest and statistics are read, never its tars.

    Args:
        data: the data set whose preparation applies.
        config: the recipe; its random parts are off.
        views: ``center``, or ``ten`` for corners and center, then the same mirrored.
        device: ``cpu`` or ``cuda:N``, where the images go.
        statistics: as of :class:`pipeline.loader.batches.EvaluationLoader`.

    Attributes:
        manifest: record of the data set.
        settings: how its images were made.
        height_px, width_px: of its images.

    Raises:
        ConfigError: the recipe cannot be used with this data set.
        DatasetError: there is no complete data set.
    """

    def __init__(
        self,
        data: Path,
        config: LoaderConfig,
        *,
        views: str = "center",
        device: str = "cpu",
        statistics: Path | None = None,
    ) -> None:
        if views not in ("center", "ten"):
            raise ConfigError(f"views is {views!r}: expected center or ten")
        refuse_url(data)
        folder = Path(data)
        self.manifest = read_manifest(folder)
        self.settings = settings_of(self.manifest)
        image = self.manifest.image
        if image.height_px is None or image.width_px is None:
            raise ConfigError(f"{data} holds images of different sizes: prepare it with --resize to feed a network")
        self.height_px, self.width_px = image.height_px, image.width_px
        known = self.manifest if statistics is None else read_manifest(statistics)
        subtracted = read_statistics(folder if statistics is None else statistics, known)
        check_crop(config, self.height_px, self.width_px)
        check_statistics(config, subtracted, (self.height_px, self.width_px, image.channels))
        size = {"height_px": self.height_px, "width_px": self.width_px, "crop_px": config.crop_px}
        self._center = center_geometry(1, **size)
        self._views = ten_views(**size) if views == "ten" else self._center
        self._crop_px = config.crop_px
        self._normalize = Normalizer(config, subtracted)
        self._device = device
        self._net_input = NetInput(self._normalize, device=device) if device.startswith("cuda") else None

    def read(self, picture: Picture) -> np.ndarray:
        """One picture as the data set would store it, before a JPEG's loss: uint8 (H, W, C).

        Args:
            picture: a file's path or its bytes, a Pillow image, or uint8 pixels (H, W), (H, W, 1) or (H, W, 3).

        Raises:
            ImageError: it cannot be used; says why, without the file's name.
        """
        from pipeline.preparation.decode import decode  # image codecs, which nothing else here needs

        settings = self.settings
        if isinstance(picture, np.ndarray | Image.Image):
            pixels = _pixels_of(picture, settings.channels)
        else:
            data = picture if isinstance(picture, bytes) else _read(Path(picture), settings.max_bytes)
            pixels = decode(data, dataclasses.replace(settings, resize_px=None)).pixels
        if settings.resize_px:
            pixels = _resized(pixels, settings)
        if pixels.shape[:2] != (self.height_px, self.width_px):
            found = f"{pixels.shape[1]}x{pixels.shape[0]} px"
            raise ImageError(f"{found}, and the data set's images are {self.width_px}x{self.height_px} px")
        return pixels

    def at_center(self) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`pipeline.loader.normalize.Normalizer.at_center`."""
        return self._normalize.at_center(self.height_px, self.width_px)

    def images(self, stored: Sequence[np.ndarray]) -> torch.Tensor:
        """Stored images, uint8 (H, W, C), as the net sees them: float32 (N, C, S, S), or (N, 10, C, S, S)."""
        count, side, views = len(self._views), self._crop_px, self._views
        if self._net_input:  # which mirrors, too
            views = views * (1, 1, 0)
        crops = np.stack([_cut(image, view, side) for image in stored for view in views])  # (N * views, S, S, C)
        geometry = np.tile(self._views, (len(stored), 1))
        draws = Draws(geometry, np.zeros((len(geometry), crops.shape[-1]), np.float32))
        if self._net_input:
            images = self._net_input(torch.from_numpy(crops).to(self._device), draws)
        else:
            images = self._normalize(torch.from_numpy(np.ascontiguousarray(crops.transpose(0, 3, 1, 2))), draws)
        return images.unflatten(0, (-1, count)) if count > 1 else images

    def center(self, image: np.ndarray) -> np.ndarray:
        """The center crop of a stored image, uint8 (S, S, C): what the net looks at, for people."""
        return _cut(image, self._center[0], self._crop_px)


def settings_of(manifest: Manifest) -> ImageSettings:
    """How a data set's images were made, from its manifest.

    A source of pixels (digits, CIFAR-10) may have had nothing to resize; its images' own side then applies.
    """
    recorded, image = manifest.settings, manifest.image
    square = image.width_px if image.width_px == image.height_px else None
    standard = ImageSettings()
    return ImageSettings(
        resize_px=recorded.get("resize_px") or (None if image.encoding == "original" else square),
        encoding=image.encoding,
        quality=recorded.get("quality") or standard.quality,
        channels=image.channels,
        max_pixels=recorded.get("max_pixels") or standard.max_pixels,
        max_bytes=recorded.get("max_bytes") or standard.max_bytes,
        filter=next((name for name, words in FILTERS.items() if words == recorded.get("filter")), standard.filter),
    )


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)  # not to the end: a device has none
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from None
    if len(data) > limit:
        raise ImageError(f"more than {limit:,} bytes, the data set's --max-bytes")
    return data


def _pixels_of(picture: np.ndarray | Image.Image, channels: int) -> np.ndarray:
    """Upright 8-bit pixels (H, W, channels) of an array or a Pillow image; transparency is dropped.

    Raises:
        ImageError: they are none.
    """
    if isinstance(picture, np.ndarray):
        fits = picture.dtype == np.uint8 and picture.size and picture.shape[2:] in ((), (1,), (3,))
        if picture.ndim not in (2, 3) or not fits:
            found = f"an array of {picture.dtype}, shape {picture.shape}"
            raise ImageError(f"{found}: expected uint8, shape (H, W), (H, W, 1) or (H, W, 3), values of 0..255")
        picture = Image.fromarray(picture[..., 0] if picture.shape[2:] == (1,) else picture)
    elif picture.mode[0] in "IF":
        raise ImageError(f"a Pillow image of mode {picture.mode}: expected 8 bits a channel, or the file itself")
    picture = ImageOps.exif_transpose(picture)
    pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _resized(pixels: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """The center square at ``settings.resize_px``, uint8 (H, W, C)."""
    from pipeline.preparation.image import resize

    side, square = settings.resize_px, min(pixels.shape[:2])
    assert side is not None
    if settings.filter != "bicubic" or square == side:
        return resize(pixels, side, settings.filter)
    top, left = (pixels.shape[0] - square) // 2, (pixels.shape[1] - square) // 2
    cut = pixels[top : top + square, left : left + square]
    whole = Image.fromarray(np.ascontiguousarray(cut[..., 0] if cut.shape[2] == 1 else cut))
    return np.asarray(whole.resize((side, side), Image.Resampling.BICUBIC)).reshape(side, side, -1)


def _cut(image: np.ndarray, view: np.ndarray, side_px: int) -> np.ndarray:
    """One view (x, y, mirror) of an image (H, W, C)."""
    x, y, mirror = (int(number) for number in view)
    crop = image[y : y + side_px, x : x + side_px]
    return crop[:, ::-1] if mirror else crop
