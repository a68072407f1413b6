"""Half by half is the whole: sums and every gradient; and a peer that is lost meanwhile is named with its crossing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainer.errors import PeerError
from trainer.parallel.halves import ConvolutionProduct, MatrixProduct, Product, split
from trainer.parallel.mesh import MeshCoord
from trainer.planning.scale import _fake_world

pytestmark = pytest.mark.numeric

CASES = (
    (MatrixProduct(), (3, 8), (5, 8)),
    (ConvolutionProduct(1, 1, 1), (2, 6, 7, 7), (4, 6, 3, 3)),
    (ConvolutionProduct(2, 0, 3), (2, 6, 9, 8), (4, 6, 3, 3)),
    (ConvolutionProduct(3, 2, 1), (2, 6, 9, 9), (4, 6, 5, 5)),
)


def whole_sums(product: Product, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What autograd sees: the layer on both halves at once."""
    if not isinstance(product, ConvolutionProduct):
        return functional.linear(x, weight, bias)
    x = functional.pad(x, (product.before, product.after) * 2)
    return functional.conv2d(x, weight, bias, product.stride)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("product", "shape", "weights"), CASES)
def test_halves_equal_the_whole(product: Any, shape: Any, weights: Any, layout: torch.memory_format) -> None:
    """float64, against autograd on the joined halves."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, weights, weights[:1])]
    x, weight, bias = (t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in numbers)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    expected = whole_sums(product, x, weight, bias)
    gradient = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected.backward(gradient)
    with torch.no_grad():
        halves, parts, found = split(x), split(weight), torch.full_like(weight, torch.nan)
        sums = product.sums(halves[0], parts[0], bias)
        product.add(sums, halves[1], parts[1])
        torch.testing.assert_close(sums, expected)
        of_x = [product.input_gradient(gradient, *pair) for pair in zip(halves, parts, strict=True)]
        torch.testing.assert_close(torch.cat(of_x, dim=1), x.grad)
        for half, out in zip(halves, split(found), strict=True):
            torch.testing.assert_close(product.weight_gradient(gradient, half, out), bias.grad)
        torch.testing.assert_close(found, weight.grad)


class Broken:
    """A message to a peer that is gone."""

    def wait(self) -> None:
        raise RuntimeError("Connection closed by peer\nand a trace")


def test_a_lost_peer_is_named_with_the_crossing_that_was_waited_for() -> None:
    """Not with the one that was started last."""
    half = torch.zeros(2, 3)
    with _fake_world(MeshCoord(0, 2)) as mesh:
        link = mesh.link
        first, second = (link.swap(layer, "backward", half, half.shape) for layer in ("fc6", "conv3"))
        first.works = [Broken()]
        with pytest.raises(PeerError, match=r"tower b \(rank 1\) is lost at fc6 backward: Connection closed by peer$"):
            link.wait(first)
        assert link.wait(second).shape == half.shape


def test_a_message_that_nobody_waits_for_is_looked_after_by_the_next() -> None:
    """Tower a sends fc8's gradient and goes on; if it does not arrive, that is what is said."""
    half = torch.zeros(2, 3)
    with _fake_world(MeshCoord(0, 2)) as mesh:
        mesh.link.send("fc8", "backward", half).works = [Broken()]
        with pytest.raises(PeerError, match="is lost at fc8 backward"):
            mesh.link.swap("fc7", "backward", half, half.shape)
