"""Every random decision about an image, as a pure function of (seed, epoch, position of the sample in the epoch).

A counter-based generator (Philox) makes that cheap: sample p of an epoch always owns counter p, so nothing has to be
remembered to resume, both towers draw the same, CPU and GPU draw the same, and the tests recompute it with NumPy.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from pipeline.errors import ConfigError
from pipeline.loader.config import LoaderConfig

_GEOMETRY, _COLOR = 0, 1  # streams: the second half of Philox' key, so color on or off never changes a crop
MAX_SEED = (1 << 63) - 1


@dataclasses.dataclass(frozen=True)
class Draws:
    """The decisions for n consecutive samples.

    Attributes:
        geometry: (n, 3) int32: crop x, crop y (pixels from the left and the top of the stored image), mirror (0/1).
        shift: (n, C) float32: what the color recipe adds to each channel, gray levels of 0..255.
    """

    geometry: np.ndarray
    shift: np.ndarray


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a recipe needs from the training set, pixels on 0..255 (``statistics.npz``).

    Attributes:
        mean: (C,) float64.
        std: (C,) float64, square roots of the covariance's diagonal.
        mean_image: (H, W, C) float64, or None where the images have different sizes.
        eigenvalues: (C,) float64, descending.
        eigenvectors: (C, C) float64, in columns.
    """

    mean: np.ndarray
    std: np.ndarray
    mean_image: np.ndarray | None
    eigenvalues: np.ndarray
    eigenvectors: np.ndarray


def color_steps(config: LoaderConfig, statistics: Statistics) -> np.ndarray:
    """The color shift for normal numbers of 1, as a (C, C) matrix: shift = matrix @ normals, gray levels of 0..255."""
    if config.color == "none":
        return np.zeros_like(statistics.eigenvectors)
    values = np.maximum(statistics.eigenvalues, 0.0)  # a rounding error below zero is no variance
    lengths = np.sqrt(values) if config.color == "deviation" else values / 255.0
    return np.asarray(statistics.eigenvectors * (config.color_sigma * lengths), dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The draws of one training run.

    Attributes:
        config: the recipe.
        seed: 0..2**63 - 1.
        height_px, width_px: size of the stored images.
        steps: (C, C) matrix of :func:`color_steps`.
    """

    config: LoaderConfig
    seed: int
    height_px: int
    width_px: int
    steps: np.ndarray

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed is {self.seed!r}: expected a whole number, 0..{MAX_SEED}")
        check_crop(self.config, self.height_px, self.width_px)

    def draw(self, epoch: int, first: int, count: int) -> Draws:
        """Draws for the samples at positions first .. first + count - 1 of an epoch, 0-based."""
        config = self.config
        groups = np.arange(first, first + count) // config.crop_shared_by
        words = _uniform(self.seed, epoch, _GEOMETRY, int(groups[0]), int(groups[-1] - groups[0]) + 1)
        uniform = words[groups - groups[0]]
        geometry = np.empty((count, 3), np.int32)
        geometry[:, 0] = uniform[:, 0] * (self.width_px - config.crop_px + 1)
        geometry[:, 1] = uniform[:, 1] * (self.height_px - config.crop_px + 1)
        geometry[:, 2] = uniform[:, 2] < config.mirror
        return Draws(geometry, self._shift(epoch, first, count))

    def color_is_on(self, epoch: int) -> bool:
        """Whether the images of an epoch get color noise."""
        config = self.config
        return config.color != "none" and config.color_sigma > 0 and not 0 <= config.color_off_epoch <= epoch

    def divisor(self, epoch: int) -> float:
        """What the images of an epoch are divided by: part of the color noise, as in the original's convdata.py."""
        return self.config.color_divisor if self.color_is_on(epoch) else 1.0

    def _shift(self, epoch: int, first: int, count: int) -> np.ndarray:
        channels = len(self.steps)
        if not self.color_is_on(epoch):
            return np.zeros((count, channels), np.float32)
        normals = _normal(_uniform(self.seed, epoch, _COLOR, first, count))[:, :channels]
        return (normals @ self.steps.T).astype(np.float32)


def check_crop(config: LoaderConfig, height_px: int, width_px: int) -> None:
    """Raises ConfigError for a crop larger than the stored images."""
    if config.crop_px > min(height_px, width_px):
        raise ConfigError(
            f"data.crop_px is {config.crop_px}, but the images are {width_px}x{height_px}: "
            "use a smaller crop, or prepare with a larger --resize"
        )


def _uniform(seed: int, epoch: int, stream: int, first: int, count: int) -> np.ndarray:
    """(count, 4) float64 in [0, 1): row i belongs to counter first + i, whatever first and count are."""
    key = np.array([seed, 2 * epoch + stream], dtype=np.uint64)
    counter = np.array([first, 0, 0, 0], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(4 * count)
    return (np.asarray(words, np.uint64).reshape(count, 4) >> np.uint64(11)) * 2.0**-53


def _normal(uniform: np.ndarray) -> np.ndarray:
    """Box-Muller: (n, 4) uniform to (n, 4) standard normal."""
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:, 0::2]))
    angle = 2.0 * np.pi * uniform[:, 1::2]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def center_geometry(count: int, *, height_px: int, width_px: int, crop_px: int) -> np.ndarray:
    """(count, 3) int32 geometry of the center crop, not mirrored."""
    row = [(width_px - crop_px) // 2, (height_px - crop_px) // 2, 0]
    return np.tile(np.array(row, np.int32), (count, 1))


def ten_views(*, height_px: int, width_px: int, crop_px: int) -> np.ndarray:
    """(10, 3) int32 geometry: top left, top right, center, bottom left, bottom right, then the same mirrored."""
    right, bottom = width_px - crop_px, height_px - crop_px
    corners = [(0, 0), (right, 0), (right // 2, bottom // 2), (0, bottom), (right, bottom)]
    return np.array([(x, y, mirror) for mirror in (0, 1) for x, y in corners], np.int32)


def fingerprint(keys: Sequence[str], draws: Draws, *, epoch: int, position: int) -> int:
    """63-bit hash of a batch: keys, geometry and color (to 1/1000 gray level, above any difference of libm)."""
    digest = hashlib.blake2b(f"{epoch} {position} ".encode(), digest_size=8)
    digest.update(" ".join(keys).encode())
    digest.update(np.ascontiguousarray(draws.geometry, dtype="<i4").tobytes())
    digest.update(np.rint(draws.shift.astype(np.float64) * 1000).astype("<i8").tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1
