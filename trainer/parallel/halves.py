"""A layer's weighted sums from one half of its inputs at a time, with their gradients.

The sums are linear: ``y = W_a x_a + W_b x_b + bias``; where the halves come from is not known here
(:mod:`.crossing`). Written out, because autograd would pad the gradient of each half of the weights with zeros
and then add the two: fc6's weights are 75 MB a tower.
"""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from trainer.model.alexnet import Convolution, Summing

Halves = tuple[Tensor, Tensor]  # tower a's, tower b's: views of one tensor, along its inputs (dimension 1)


class Product(Protocol):
    """What a layer does with one half of its inputs: x (N, inputs, ...), weight (outputs, inputs, ...)."""

    def sums(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The half's part of the sums, and the bias: (N, outputs, ...)."""

    def add(self, sums: Tensor, x: Tensor, weight: Tensor) -> None:
        """Adds the other half's part to ``sums``."""

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of x, from that of the sums."""

    def weight_gradient(self, gradient: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """Writes the gradient of the half's weight to ``out``, a view of the whole layer's; returns the bias's."""


class MatrixProduct:
    """A fully connected layer's, see :class:`Product`."""

    def sums(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(N, inputs) -> (N, units)."""
        return torch.addmm(bias, x, weight.t())

    def add(self, sums: Tensor, x: Tensor, weight: Tensor) -> None:
        """In the product itself: no pass over the sums."""
        sums.addmm_(x, weight.t())

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """(N, units) -> (N, inputs)."""
        return gradient.mm(weight)

    def weight_gradient(self, gradient: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """Straight into its columns of the whole layer's gradient."""
        torch.mm(gradient.t(), x, out=out)
        return gradient.sum(0)


@dataclasses.dataclass(frozen=True)
class ConvolutionProduct:
    """A convolution's, see :class:`Product`.

    Attributes:
        stride: px.
        before, after: zeros at top and left, at bottom and right, px.
    """

    stride: int
    before: int
    after: int

    def sums(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(N, inputs, H, W) -> (N, maps, H', W')."""
        return functional.conv2d(self._padded(x), weight, bias, self.stride, self._zeros)

    def add(self, sums: Tensor, x: Tensor, weight: Tensor) -> None:
        """A convolution, and a pass over the sums."""
        sums.add_(self.sums(x, weight, None))

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """(N, maps, H', W') -> (N, inputs, H, W)."""
        padded = self._backward(gradient, self._padded(x), weight, (True, False, False))[0]
        if self.before == self.after:
            return padded
        return padded[:, :, self.before : self.before + x.shape[2], self.before : self.before + x.shape[3]]

    def weight_gradient(self, gradient: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """A copy of what is small: conv3's weights are 1.8 MB a tower."""
        _, weight, bias = self._backward(gradient, self._padded(x), out, (False, True, True))
        out.copy_(weight)
        return bias

    @property
    def _zeros(self) -> int:
        """What the convolution itself pads."""
        return self.before if self.before == self.after else 0

    def _padded(self, x: Tensor) -> Tensor:
        """Zeros that are not the same on all sides."""
        if self.before == self.after:
            return x
        return functional.pad(x, (self.before, self.after, self.before, self.after))

    def _backward(self, gradient: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> list[Tensor]:
        """Gradients of x, weight and bias, those ``wanted``; only that of x looks at the weight's values."""
        strides, zeros, maps = [self.stride] * 2, [self._zeros] * 2, [len(weight)]
        return torch.ops.aten.convolution_backward(
            gradient, x, weight, maps, strides, zeros, [1, 1], False, [0, 0], 1, wanted
        )


def product_of(module: Summing) -> Product:
    """How a layer of the net multiplies one half."""
    if not isinstance(module, Convolution):
        return MatrixProduct()
    return ConvolutionProduct(module.config.strides[module.index], *module.config.pads[module.index])


def split(whole: Tensor) -> Halves:
    """The inputs' two halves, or their weights', as views: tower a's, then tower b's."""
    first, second = whole.chunk(2, dim=1)
    return first, second


def product_dtype(x: Tensor) -> torch.dtype:
    """In which dtype a layer multiplies now: autocast's where it is on, that of x elsewhere."""
    device = x.device.type
    lowered = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if lowered else x.dtype
