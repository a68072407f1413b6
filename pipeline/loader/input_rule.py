"""How uint8 crops become the net's input: the definition, in torch operations, for every device and in every precision.

It is tested in float64 against the CPU's way (DALI and :mod:`pipeline.loader.normalize`) for all recipes.
"""

import dataclasses

import torch

from pipeline.loader.normalize import STANDARDIZE_EPSILON

GEOMETRY = 3  # numbers of a row before those of the channels: crop x, crop y, mirror


@dataclasses.dataclass(frozen=True)
class InputRule:
    """What is done to all images alike.

    Attributes:
        mean_image: (H, W, C), on the device, or None: subtracted under each crop and mirrored with it.
        center: x and y of the piece of it that is subtracted from every crop instead, never mirrored; None: see above.
        standardize: each image is brought to mean 0 and deviation 1 over all its values, last of all.
        dtype: of the result.
    """

    mean_image: torch.Tensor | None
    center: tuple[int, int] | None
    standardize: bool
    dtype: torch.dtype


def by_torch(crops: torch.Tensor, rows: torch.Tensor, rule: InputRule) -> torch.Tensor:
    """The definition: ``((crop - mean image) - subtracted) * factor`` per channel, mirrored; then standardized.

    Args:
        crops: (N, S, S, C) uint8, not mirrored.
        rows: (N, 3 + 2 C): crop x, crop y, mirror, what is subtracted and then multiplied by, per channel; in float64
            all of it is computed in float64.
        rule: of all images.

    Returns:
        (N, C, S, S) of ``rule.dtype``, channels_last.
    """
    count, side, _, channels = crops.shape
    steps = torch.arange(side, device=crops.device)
    x, y, mirror = rows[:, :GEOMETRY].long().unbind(1)
    columns = torch.where(mirror[:, None] == 1, steps.flip(0), steps)[:, None, :]  # of the crop, (N, 1, S)
    images = torch.arange(count, device=crops.device)[:, None, None]
    values = crops[images, steps[None, :, None], columns].to(rows.dtype)  # (N, S, S, C)
    if rule.mean_image is not None and rule.center is not None:
        left, top = rule.center
        values -= rule.mean_image[top : top + side, left : left + side]
    elif rule.mean_image is not None:
        lines = y[:, None, None] + steps[None, :, None]
        values -= rule.mean_image[lines, x[:, None, None] + columns]
    subtracted, factor = rows[:, None, None, GEOMETRY:].split(channels, dim=3)
    values = (values - subtracted) * factor
    if rule.standardize:
        values -= values.mean(dim=(1, 2, 3), keepdim=True)
        variance = values.square().mean(dim=(1, 2, 3), keepdim=True)
        values *= torch.rsqrt(variance + STANDARDIZE_EPSILON)
    return values.to(rule.dtype).permute(0, 3, 1, 2)
