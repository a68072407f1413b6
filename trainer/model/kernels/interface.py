"""What compiled kernels do, whatever they are written in, and for which tensors."""

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}  # as by_type() in kernels.cpp numbers them
SIZES, BETA = (3, 5, 7), 0.75  # of the response normalization; the paper's are 5 and 0.75
MOST_POOL_PX = 15  # side of a pooling's window: a place in it, and "nowhere", fit into a byte
Factors = tuple[float, float, float]  # momentum, weight decay times rate, rate


class Norm(ctypes.Structure):
    """``struct Norm`` of ``kernels.cpp``."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("maps", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("k", ctypes.c_double),
        ("rectify", ctypes.c_bool),
    )


@dataclasses.dataclass(frozen=True)
class Pool:
    """Max pooling without padding.

    Attributes:
        px: side of the window, at most ``MOST_POOL_PX``.
        stride: of both directions, at most px.
        ceil: a window may hang over the bottom and right edge.
        rectify: pool ReLU(x).
    """

    px: int
    stride: int
    ceil: bool
    rectify: bool = False

    def side(self, side: int) -> int:
        """Outputs of a side of ``side`` px."""
        return (side - self.px + (self.stride - 1 if self.ceil else 0)) // self.stride + 1


@dataclasses.dataclass(frozen=True)
class TowerMaps:
    """Maps as a GPU keeps them between two layers: cut into towers where the next layer wants them so.

    Attributes:
        parts: all towers' maps (N, C, H, W), or each tower's (N, C / 2, H, W); channels_last.
        bias: (C,) of the convolution that has made them, still to be added; None where there is none.
    """

    parts: tuple[Tensor, ...]
    bias: Tensor | None = None

    @property
    def layout(self) -> "Layout":
        """What is known of them without their memory."""
        images, channels, *sides = self.parts[0].shape
        return Layout((images, channels * len(self.parts), *sides), len(self.parts), self.bias is not None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How :class:`TowerMaps` lie in memory.

    Attributes:
        shape: (N, C, H, W) of all parts.
        parts: 1 or 2.
        has_bias: one is to be added.
    """

    shape: tuple[int, ...]
    parts: int
    has_bias: bool


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What an image is cut into.

    Attributes:
        side: of a block, px.
        before: px of zeros above and left of the image.
        rows: of blocks; there are zeros below the image, too, or lines of it that are left out.
        columns: likewise.
    """

    side: int
    before: int
    rows: int
    columns: int


@dataclasses.dataclass(frozen=True)
class Drop:
    """Which units of a fully connected layer are kept: see :class:`trainer.model.layers.DropoutDraws`.

    Attributes:
        starts: where the words of each tower's mask begin; numbers, or int64 scalars on the device.
        first: first row, of the whole batch.
        words: random words of a row of one tower's whole mask.
        skipped: units of that row before the first that is here.
        least: a unit is kept where its 16 bits, as a signed number, are at least this minus 32768.
        factor: of what is kept.
    """

    starts: tuple[int | Tensor, ...]
    first: int
    words: int
    skipped: int
    least: int
    factor: float


@dataclasses.dataclass(frozen=True)
class Member:
    """A parameter and what its update needs; dense, float32, all of one layout.

    Attributes:
        w: weights.
        v: velocity.
        g: gradient.
        low: bfloat16 copy of the weights, written too; None where there is none.
        factors: momentum, decay times rate, rate.
    """

    w: Tensor
    v: Tensor
    g: Tensor
    low: Tensor | None
    factors: Factors


class Kernels(Protocol):
    """What compiled kernels do, in C++ or in Triton."""

    def norm_forward(self, x: Tensor, norm: Norm) -> Tensor:
        """The normalized maps, like x, which is dense: ``norm.rows`` rows of ``norm.maps`` maps."""

    def norm_backward(self, x: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
        """The gradient to x; ``gradient`` has x's dtype and strides."""

    def update(self, w: Tensor, v: Tensor, g: Tensor, factors: Factors, guard: Tensor | None) -> None:
        """``v = momentum v - decay w - rate g; w = w + v`` in place, of dense tensors of one dtype and layout.

        Args:
            w: weights.
            v: velocity.
            g: gradient.
            factors: momentum, decay times rate, rate.
            guard: a scalar on the same device; where it is 0, nothing is done.
        """


class UpdateAll(Protocol):
    """:meth:`Kernels.update` of many parameters in one launch."""

    def send(self, members: Sequence[Member]) -> None:
        """Tells the device where the members' memory is, and their factors; a launch finds what was sent last."""

    def __call__(self, members: Sequence[Member], guard: Tensor | None) -> None:
        """Updates them all, once they were sent; ``guard`` as there. A graph that holds this may be sent others."""


Parts = tuple[Tensor, ...]  # as TowerMaps has them, channels_last
Changes = tuple[Parts, Tensor | None]  # gradients: to the parts, and to the bias where there is one, float32


class GpuKernels(Kernels, Protocol):
    """What is written by hand for a GPU only: elsewhere torch's own are as good.

    What is to be written in ``parts`` is one tensor of all towers' maps, or two.
    """

    def norm_maps(self, maps: TowerMaps, norm: Norm) -> Tensor:
        """The normalized maps of all towers in one tensor, channels_last."""

    def pool_forward(self, maps: TowerMaps, pool: Pool, parts: int) -> tuple[Parts, Parts]:
        """Maxima, and their places (uint8)."""

    def pool_backward(self, gradients: Parts, places: Parts, layout: Layout, pool: Pool) -> Changes:
        """The gradients to maps of that layout."""

    def pooled_norm_backward(self, maps: TowerMaps, gradients: Parts, places: Parts, norm: Norm, pool: Pool) -> Changes:
        """The gradients to maps that were normalized then pooled; ``gradients`` and ``places`` are the pooling's."""

    def relu_forward(self, maps: TowerMaps, parts: int) -> Parts:
        """ReLU of the maps."""

    def relu_backward(self, outputs: Parts, gradients: Parts, layout: Layout) -> Changes:
        """The gradients to maps of that layout; ``outputs`` are the forward's."""

    def to_blocks(self, x: Tensor, blocks: Blocks) -> Tensor:
        """(N, C, H, W) -> (N, side * side * C, rows, columns), both channels_last; a block's channels row by row."""

    def from_blocks(self, gradient: Tensor, shape: torch.Size, blocks: Blocks) -> Tensor:
        """The gradient to x of shape ``shape``, channels_last as ``gradient`` is."""

    def drop_forward(self, x: Tensor, drop: Drop) -> Tensor:
        """``ReLU(x) * mask * drop.factor`` of x (N, units of all towers here), contiguous."""

    def drop_backward(self, gradient: Tensor, y: Tensor, drop: Drop) -> Tensor:
        """The gradient to x, from y as the forward gave it; ``gradient`` is contiguous."""

    def make_update(self, device: torch.device) -> UpdateAll:
        """One launch for all parameters on a device."""
