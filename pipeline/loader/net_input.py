"""What a GPU makes of uint8 crops: the net's input, in one pass over memory.

A GPU's graph ends at the crops as they were decoded, (N, S, S, C) uint8, neither mirrored nor normalized: float32
images and the mean image in DALI took half of the rate at which raw shards are read (48,600 of 94,500 images/s on an
H100). One kernel of ours does the rest: mirror, mean image, color noise, scale, layout and, for a net that multiplies
in bfloat16, the rounding to it. What differs from image to image is a row of numbers, which follows the batch from
pinned memory. All of it runs on torch's current stream, and the host waits for nothing.

What is to be done is defined in :mod:`pipeline.loader.input_rule`; the kernel (:mod:`pipeline.loader.triton_input`) is
tested against that. Where it cannot be had, the definition's torch operations do the work.
"""

import os
from collections.abc import Callable

import numpy as np
import torch

from pipeline.loader.augmentation import Draws, center_geometry
from pipeline.loader.input_rule import GEOMETRY, InputRule, by_torch
from pipeline.loader.normalize import Normalizer
from twotower.verbosity import remark

SWITCH = "TWOTOWER_KERNELS"  # "off": torch operations only, as in the trainer

Kernel = Callable[[torch.Tensor, torch.Tensor, InputRule], torch.Tensor]


class NetInput:
    """Makes the net's input of crops on a device.

    Args:
        normalizer: the recipe, as the CPU computes it.
        device: ``cpu`` or ``cuda:N``, where the crops are.
        dtype: of the images: float32, or bfloat16, rounded once, at the end.
    """

    def __init__(self, normalizer: Normalizer, *, device: str, dtype: torch.dtype = torch.float32) -> None:
        config, image = normalizer.config, normalizer.mean_image
        self._affine, self._device, center = normalizer.affine, device, None
        if image is not None and config.mean == "image_center":
            size = {"height_px": image.shape[0], "width_px": image.shape[1], "crop_px": config.crop_px}
            x, y, _ = center_geometry(1, **size)[0].tolist()
            center = (x, y)
        on_device = None if image is None else torch.from_numpy(image.astype(np.float32)).to(device)
        self._rule = InputRule(on_device, center, config.normalize == "per_image", dtype)
        self._kernel = find_kernel(self._rule, config.crop_px, normalizer.num_channels, device)

    def __call__(self, crops: torch.Tensor, draws: Draws, divisor: float = 1.0) -> torch.Tensor:
        """Images, (N, C, S, S), channels_last: new memory, so the crops' may be given back.

        Args:
            crops: (N, S, S, C) uint8, not mirrored.
            draws: what was decided for them.
            divisor: see :meth:`pipeline.loader.augmentation.Augmentation.divisor`.
        """
        rows = to_device(self.rows(draws, divisor), self._device)
        return (self._kernel or by_torch)(crops, rows, self._rule)

    def rows(self, draws: Draws, divisor: float = 1.0) -> torch.Tensor:
        """(N, 3 + 2 C) float32: crop x, crop y, mirror, what is subtracted and then multiplied by, per channel."""
        subtracted, divided = self._affine(draws.shift, divisor)
        return torch.from_numpy(np.concatenate([draws.geometry, subtracted, 1 / divided], 1, dtype=np.float32))


def to_device(host: torch.Tensor, device: str) -> torch.Tensor:
    """A small tensor of the CPU on a device, behind the work of its stream: the host does not wait.

    torch keeps the pinned memory until the copy is done.
    """
    return host.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else host


def find_kernel(rule: InputRule, crop_px: int, channels: int, device: str) -> Kernel | None:
    """The kernel of a GPU, compiled and tried; None on a CPU, or after a line that says why there is none."""
    if not device.startswith("cuda") or os.environ.get(SWITCH) == "off":
        return None
    try:
        from pipeline.loader.triton_input import net_input

        crops = torch.zeros(1, crop_px, crop_px, channels, dtype=torch.uint8, device=device)
        net_input(crops, torch.zeros(1, GEOMETRY + 2 * channels, dtype=torch.float32, device=device), rule)
    except Exception as error:  # Triton needs a C compiler and a GPU that it knows, and says so in many ways
        if os.environ.get("RANK", "0") == "0":
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            remark(f"note: torch operations instead of a compiled kernel make the net's input, slower: {why}")
        return None
    return net_input
