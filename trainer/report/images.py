"""Pictures of the report: conv1 kernels as a sheet, test pictures as data addresses."""

import base64
import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SMALL_PX = 96  # pictures up to this side stay exact (PNG), larger ones become JPEG


@dataclasses.dataclass(frozen=True)
class PictureRow:
    """One test picture and what the net said.

    Attributes:
        image: uint8, shape (H, W, 1 or 3).
        label: name of the true class.
        predicted: name of the class with the greatest probability.
        confidence: that probability, 0..1.
    """

    image: NDArray[np.uint8]
    label: str
    predicted: str
    confidence: float

    @property
    def wrong(self) -> bool:
        """Whether the prediction is not the label."""
        return self.label != self.predicted


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """What was predicted for a split.

    Attributes:
        first: the first pictures of the split, right or wrong: not a selection.
        wrong: pictures predicted wrongly, the most confident first.
        num_wrong: wrong ones in all.
        num_samples: pictures predicted, from the start of the split.
        num_in_split: pictures in the split.
        confusion: pictures of class i taken for class j, shape (C, C); None where there are too many classes to draw.
        classes: names of the classes in label order.
    """

    first: Sequence[PictureRow]
    wrong: Sequence[PictureRow]
    num_wrong: int
    num_samples: int
    num_in_split: int
    confusion: NDArray[np.int64] | None = None
    classes: Sequence[str] = ()


def picture_address(image: NDArray[np.uint8]) -> str:
    """A ``data:`` address of a picture, uint8 (H, W, 1, 3 or 4): PNG where small or with alpha, else JPEG."""
    pixels = image[:, :, 0] if image.shape[2] == 1 else image
    file = io.BytesIO()
    if image.shape[2] == 4 or max(image.shape[:2]) <= SMALL_PX:
        Image.fromarray(pixels).save(file, "PNG", optimize=True)
        kind = "png"
    else:
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def kernel_sheet(weight: NDArray[np.float32], *, columns: int = 8, kernel_px: int = 66) -> NDArray[np.uint8]:
    """Kernels of a first layer as one picture, as in figure 3 of the paper.

    Each kernel is shown on its own scale: zero is middle gray, its greatest absolute weight is black or full colour.

    Args:
        weight: shape (maps, 1 or 3, k, k).
        columns: kernels a row.
        kernel_px: at most this many pixels a kernel's side; each weight is a whole number of pixels.

    Returns:
        uint8 (H, W, 4); transparent between kernels.
    """
    maps, channels, side, _ = weight.shape
    most = np.abs(weight).reshape(maps, -1).max(axis=1).reshape(-1, 1, 1, 1)
    shown = 127.5 + 127.5 * weight / np.where(most > 0, most, 1)
    shown = np.broadcast_to(shown, (maps, 3, side, side)) if channels == 1 else shown
    zoom = max(1, kernel_px // side)
    pixels = (
        shown.round().astype(np.uint8).transpose(0, 2, 3, 1).repeat(zoom, axis=1).repeat(zoom, axis=2)
    )  # (maps, S, S, 3)
    gap, cell = max(2, zoom // 2), side * zoom
    rows = -(-maps // columns)
    sheet = np.zeros((rows * (cell + gap) - gap, min(columns, maps) * (cell + gap) - gap, 4), np.uint8)
    for index, kernel in enumerate(pixels):
        top, left = (cell + gap) * (index // columns), (cell + gap) * (index % columns)
        sheet[top : top + cell, left : left + cell, :3] = kernel
        sheet[top : top + cell, left : left + cell, 3] = 255
    return sheet


def colour_share(weight: NDArray[np.float32]) -> float:
    """How much of a first layer is colour: the energy left without each kernel's gray part, median over kernels.

    0 where every kernel weighs red, green and blue alike, towards 1 where kernels look at colour differences only.

    Args:
        weight: shape (maps, 3, k, k).
    """
    gray = weight.mean(axis=1, keepdims=True)
    energy = (weight**2).sum(axis=(1, 2, 3))
    colour = ((weight - gray) ** 2).sum(axis=(1, 2, 3))
    return float(np.median(colour / np.where(energy > 0, energy, 1)))
