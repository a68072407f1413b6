"""How a picture becomes what a net sees, as numbers and words for programs that have only the exported file.

The rule is the image reader's (``pipeline.loader.image_reader``), which predictions, features and the Python API use:
nothing here computes it a second time, it is asked for its numbers.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from pipeline.loader.image_reader import ImageReader
from pipeline.loader.normalize import STANDARDIZE_EPSILON
from trainer.config import Config


@dataclasses.dataclass(frozen=True)
class InputRule:
    """From an uint8 crop to the net's input: ``(crop - mean) / std``, then each image standardized where asked for.

    Attributes:
        mean: (C, S, S) or (C, 1, 1) float32, gray levels.
        std: (C, 1, 1) float32.
        per_image: each image is brought to mean 0 and deviation 1 over all its values, last of all.
        epsilon: of that, added to the variance.
        stored_px: (height, width) of the upright, resized image that the crop is the center of.
        resize: side of the center square's bicubic or area resizing, px; None: images have that size already.
        filter: ``bicubic`` (antialiased, a = -0.5) or ``area``.
        crop_px: side of the crop.
        channels: 3 (red, green, blue) or 1 (gray).
    """

    mean: np.ndarray
    std: np.ndarray
    per_image: bool
    epsilon: float
    stored_px: tuple[int, int]
    resize: int | None
    filter: str
    crop_px: int
    channels: int

    def facts(self) -> dict[str, str]:
        """The rule as metadata."""
        color = "RGB" if self.channels == 3 else "gray"
        height, width = self.stored_px
        resized = (
            f"cut out the center square and resize it to {self.resize}x{self.resize} px ({self.filter}, antialiased)"
            if self.resize
            else f"the image has {width}x{height} px"
        )
        sentence = (
            f"decode to 8-bit {color}, turn upright as EXIF says; {resized}; cut out the center {self.crop_px}x"
            f"{self.crop_px} px, whose top left corner is at ({(width - self.crop_px) // 2}, "
            f"{(height - self.crop_px) // 2})"
        )
        return {
            "crop_px": str(self.crop_px),
            "resize_px": str(self.resize or ""),
            "resize_filter": self.filter,
            "resize": sentence,
            "color": color,
            "views": "center",
            "standardize": json.dumps({"per_image": self.per_image, "epsilon": self.epsilon}),
        }


def input_rule(data: Path, config: Config, statistics: Path | None = None) -> InputRule:
    """The rule of a recipe on a data set.

    Args:
        data: folder with the manifest and the statistics: a data set, or what a run keeps of one.
        config: the recipe.
        statistics: folder of the statistics where they are another data set's.
    """
    return rule_of(ImageReader(data, config.data, statistics=statistics), config)


def rule_of(reader: ImageReader, config: Config) -> InputRule:
    """The rule that an image reader follows."""
    mean, std = reader.at_center()
    return InputRule(
        mean,
        std,
        per_image=config.data.normalize == "per_image",
        epsilon=STANDARDIZE_EPSILON,
        stored_px=(reader.height_px, reader.width_px),
        resize=reader.settings.resize_px,
        filter=reader.settings.filter,
        crop_px=config.model.image_px,
        channels=config.model.in_channels,
    )
