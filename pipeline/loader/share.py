"""Parts of a batch: replicas that train on rows of it, and towers that share its decoding.

``feed = "split"``: each tower decodes half of a batch, uint8 crops are exchanged, then normalised with torch.

The exchange itself is the trainer's: it is handed in as a function, so that nothing here knows about process groups,
and its bytes are booked by the trainer as ``input``, never as a crossing.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from pipeline.errors import ConfigError
from pipeline.loader.augmentation import Draws, Statistics, centre_geometry
from pipeline.loader.graph import STANDARDISE_EPSILON, Normaliser
from pipeline.loader.mean_image import MeanImage

Exchange = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class BatchShare:
    """The rows of every batch that a data-parallel replica takes: an equal part, parts in order.

    All replicas read the same batches, so order, draws and state do not depend on how many they are, and a run can go
    on with another number of them. Each decodes its own rows only, and with ``mmap`` leaves the others' bytes alone.

    Attributes:
        part: number of this replica, 0-based.
        parts: how many there are; must divide the batch size.
    """

    part: int = 0
    parts: int = 1

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch of ``batch_size``.

        Raises:
            ConfigError: it cannot be divided evenly.
        """
        _check_part(self.part, self.parts)
        if batch_size % self.parts:
            raise ConfigError(f"batch size {batch_size} cannot be divided among {self.parts} replicas: use a multiple")
        size = batch_size // self.parts
        return slice(self.part * size, (self.part + 1) * size)


@dataclasses.dataclass(frozen=True)
class SplitFeed:
    """This process' share of the decoding.

    Attributes:
        part: number of this process, 0-based: it decodes part ``part`` of each batch.
        parts: processes that share a batch; must divide the batch size.
        exchange: gets this part's crops, (N / parts, C, S, S) uint8 on the loader's device, and returns those of all
            rows that this process trains on, parts in order. Called once a batch, by every process.
    """

    part: int
    parts: int
    exchange: Exchange

    def check(self, batch_size: int) -> None:
        """Raises ConfigError for a batch that cannot be split evenly."""
        _check_part(self.part, self.parts)
        if batch_size % self.parts:
            raise ConfigError(
                f"batch size {batch_size} cannot be split among {self.parts}: use a multiple, or feed = 'each'"
            )


def _check_part(part: int, parts: int) -> None:
    if not 0 <= part < parts:
        raise ConfigError(f"part {part} of {parts}: expected 0..{parts - 1}")


class TorchNormaliser:
    """What :class:`pipeline.loader.graph.Normaliser` does, on uint8 crops that are already mirrored, in torch."""

    def __init__(self, normaliser: Normaliser, statistics: Statistics, device: str) -> None:
        self._config = normaliser.config
        self._size = {"height_px": normaliser.height_px, "width_px": normaliser.width_px}
        self._device = device
        self._std = normaliser.std
        self._mean = normaliser.mean
        self._mean_image: torch.Tensor | None = None
        self._views: MeanImage | None = None
        if self._config.mean in ("pixel", "centre"):
            assert statistics.mean_image is not None
            image = np.ascontiguousarray(statistics.mean_image.transpose(2, 0, 1), dtype=np.float32)
            self._mean_image = torch.from_numpy(image).to(device)  # (C, H, W)
            centre = self._config.mean == "centre"
            self._views = MeanImage(
                statistics.mean_image, np.ones(len(image), np.float32), self._config.crop_px, centre=centre
            )

    def __call__(self, crops: torch.Tensor, draws: Draws, divisor: float = 1.0) -> torch.Tensor:
        """(N, C, S, S) uint8 to float32; ``divisor`` is that of the colour noise."""
        result = self._less_mean_image(crops, draws.geometry)
        offset = draws.shift - self._mean
        if offset.any():
            result += torch.from_numpy(offset).to(self._device, non_blocking=True)[:, :, None, None]
        std = self._std * np.float32(divisor)
        if (std != 1).any():
            result /= torch.from_numpy(std).to(self._device, non_blocking=True)[:, None, None]
        if self._config.scale == "standardise":
            result -= result.mean(dim=(1, 2, 3), keepdim=True)
            variance = result.square().mean(dim=(1, 2, 3), keepdim=True)
            result *= torch.rsqrt(variance + STANDARDISE_EPSILON)
        return result

    def _less_mean_image(self, crops: torch.Tensor, geometry: np.ndarray) -> torch.Tensor:
        """Float32 crops less the mean image under each, mirrored with it; or less its centre; or as they are."""
        if self._mean_image is None:
            return crops.to(torch.float32)
        if self._views and not crops.is_cuda:  # gathering is slow on the CPU
            result = torch.empty(crops.shape, dtype=torch.float32)
            self._views.subtract(crops.numpy(), geometry, out=result.numpy())
            return result
        if self._config.mean == "centre":
            geometry = centre_geometry(1, **self._size, crop_px=self._config.crop_px)
        return crops - self._gather(self._mean_image, geometry)

    def _gather(self, image: torch.Tensor, geometry: np.ndarray) -> torch.Tensor:
        """The mean image under each crop, (N, C, S, S)."""
        steps = np.arange(self._config.crop_px)
        rows = torch.from_numpy(geometry[:, 1:2] + steps).to(self._device)
        columns = geometry[:, 0:1] + np.where(geometry[:, 2:3] == 1, steps[::-1], steps)
        return image[:, rows[:, :, None], torch.from_numpy(columns).to(self._device)[:, None, :]].transpose(0, 1)
