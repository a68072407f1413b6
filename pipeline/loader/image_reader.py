"""Images from anywhere, made into what the network sees, exactly as those of a data set: for predictions.

An image is checked, resized and encoded with the settings that the data set's manifest records, decoded again, so that
JPEG's loss is the same, and cropped and normalized as :class:`pipeline.loader.batches.EvaluationLoader` does.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.config import FILTERS, ImageSettings
from pipeline.errors import ConfigError, ImageError
from pipeline.loader.augmentation import Draws, center_geometry, check_crop, ten_views
from pipeline.loader.config import LoaderConfig
from pipeline.loader.normalize import Normalizer
from pipeline.loader.open_split import read_statistics
from pipeline.loader.staging import refuse_url
from pipeline.manifest import Manifest, read_manifest


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
        self._height_px, self._width_px = image.height_px, image.width_px
        known = self.manifest if statistics is None else read_manifest(statistics)
        subtracted = read_statistics(folder if statistics is None else statistics, known)
        check_crop(config, self._height_px, self._width_px)
        size = {"height_px": self._height_px, "width_px": self._width_px, "crop_px": config.crop_px}
        self._center = center_geometry(1, **size)
        self._views = ten_views(**size) if views == "ten" else self._center
        self._crop_px = config.crop_px
        self._normalize = Normalizer(config, subtracted, device=device)
        self._device = device

    def read(self, path: Path) -> np.ndarray:
        """One file as the data set would store it: uint8 (H, W, C).

        Raises:
            ImageError: it cannot be used; says why, without the file's name.
        """
        from pipeline.preparation.decode import decode  # image codecs, which nothing else here needs
        from pipeline.preparation.image import make_image

        limit = self.settings.max_bytes
        try:
            with path.open("rb") as file:
                data = file.read(limit + 1)  # not to the end: a device has none
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}") from None
        if len(data) > limit:
            raise ImageError(f"more than {limit:,} bytes, the data set's --max-bytes")
        if self.settings.encoding == "original":  # stored are bytes that decode to these pixels, or the pixels as PNG
            pixels = decode(data, self.settings).pixels
        else:
            image = make_image(data, self.settings)
            pixels = image.pixels
            if self.settings.encoding == "jpeg":
                pixels = decode(image.data, dataclasses.replace(self.settings, resize_px=None)).pixels
        if pixels.shape[:2] != (self._height_px, self._width_px):
            found = f"{pixels.shape[1]}x{pixels.shape[0]} px"
            raise ImageError(f"{found}, and the data set's images are {self._width_px}x{self._height_px} px")
        return pixels

    def images(self, stored: Sequence[np.ndarray]) -> torch.Tensor:
        """Stored images, uint8 (H, W, C), as the net sees them: float32 (N, C, S, S), or (N, 10, C, S, S)."""
        count, side = len(self._views), self._crop_px
        crops = np.stack([_cut(image, view, side) for image in stored for view in self._views])  # (N * views, S, S, C)
        geometry = np.tile(self._views, (len(stored), 1))
        draws = Draws(geometry, np.zeros((len(geometry), crops.shape[-1]), np.float32))
        tensor = torch.from_numpy(np.ascontiguousarray(crops.transpose(0, 3, 1, 2))).to(self._device)
        images = self._normalize(tensor, draws)
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


def _cut(image: np.ndarray, view: np.ndarray, side_px: int) -> np.ndarray:
    """One view (x, y, mirror) of an image (H, W, C)."""
    x, y, mirror = (int(number) for number in view)
    crop = image[y : y + side_px, x : x + side_px]
    return crop[:, ::-1] if mirror else crop
