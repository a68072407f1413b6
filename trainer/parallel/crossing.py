"""The layers of one tower beside another process: where it sees both towers, halves cross while it computes.

A layer that sees both towers is linear in each: ``y = W_local x_local + W_remote x_remote + bias``. So

- forward: send ``x_local``, receive ``x_remote``; meanwhile ``W_local x_local + bias``; then add ``W_remote x_remote``;
- backward, the mirror image: the gradient of ``x_remote`` is what the other tower waits for, so it is computed first
  and sent; meanwhile the gradients of ``x_local``, of the weight and of the bias; then add what the other tower sends
  for ``x_local``.

At fc8, which lives on tower a with the loss, tower b only sends in the forward and only receives in the backward.
Nothing else passes between towers in a training step but one control message of 48 bytes, and half of the pixels where
``data.decode = "sharded"``.

The gradients are written out, because autograd would pad each half's weight gradient with zeros and add the two: fc6's
weights are 75 MB per tower. Here each half is written straight into its columns of the whole.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

from trainer.config import Config, ModelConfig
from trainer.model.alexnet import AlexNet
from trainer.model.gpu_layers import dtype_of_products, lowered
from trainer.model.layers import Conv2d, Linear, WholeNetLayers
from trainer.parallel.link import COMM_DTYPES, Link


class _Halves:
    """One layer that sees both towers: what it does with one half of its inputs, and what travels.

    Args:
        link: to the other tower.
        layer: its name.
        module: the layer; of a convolution its stride and padding are used.
        comm_dtype: in which halves travel; None for their own.
        one_way: the layer lives here alone, so that nothing is sent in the forward or received in the backward.
    """

    def __init__(
        self, link: Link, layer: str, module: nn.Module, comm_dtype: torch.dtype | None, *, one_way: bool = False
    ) -> None:
        self.link, self.layer, self.comm_dtype, self.one_way = link, layer, comm_dtype, one_way
        self.conv = module if isinstance(module, Conv2d) else None

    def split(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Local and remote half of inputs or of weights, views along dimension 1; tower a's half stands first."""
        a, b = whole.chunk(2, dim=1)
        return (a, b) if self.link.tower == "a" else (b, a)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(N, inputs, ...) -> (N, outputs, ...)."""
        if self.conv is None:
            return functional.linear(x, weight, bias)
        return functional.conv2d(self.conv.pad(x), weight, bias, self.conv.stride, self.conv.padding)

    def add_product(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        """Adds the other half's part to ``y``; of a fully connected layer without a pass over y."""
        if self.conv is None:
            y.addmm_(x, weight.t())
        else:
            y.add_(self.product(x, weight, None))

    def grad_input(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of a half x from that of y."""
        if self.conv is None:
            return grad.mm(weight)
        padded = self.conv.pad(x)
        found = conv2d_input(padded.shape, weight, grad, self.conv.stride, self.conv.padding)
        if padded is x:
            return found
        before = self.conv.zeros[0]
        return found[:, :, before : before + x.shape[2], before : before + x.shape[3]]

    def grad_weight(self, grad: Tensor, x: Tensor, out: Tensor) -> None:
        """Writes the gradient of a half's weight to ``out``, its columns of the whole layer's."""
        if self.conv is None:
            torch.mm(grad.t(), x, out=out)
        else:  # a copy of what is small: conv3's weights are 1.8 MB per tower
            x = self.conv.pad(x)
            out.copy_(conv2d_weight(x, out.shape, grad, self.conv.stride, self.conv.padding))


class _SeeBoth(torch.autograd.Function):
    """A layer over both towers' inputs, of which this process has one half; see the head of this file."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, halves: _Halves) -> Tensor:
        link, layer, dtype = halves.link, halves.layer, halves.comm_dtype
        if halves.one_way:
            transfer = link.irecv(layer, "forward", x.shape, x, dtype)
        else:
            transfer = link.exchange(layer, "forward", x, dtype)
        local, (weight_local, weight_remote) = x.to(weight.dtype), halves.split(weight)
        y = halves.product(local, weight_local, bias)
        remote = link.wait(transfer).to(weight.dtype)
        halves.add_product(y, remote, weight_remote)
        ctx.save_for_backward(local, remote, weight)
        ctx.halves, ctx.dtype = halves, x.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), halves = grads, ctx.halves
        local, remote, weight = ctx.saved_tensors
        weight_local, weight_remote = halves.split(weight)
        grad_remote = halves.grad_input(grad, remote, weight_remote).to(ctx.dtype)
        send = halves.link.isend if halves.one_way else halves.link.exchange
        transfer = send(halves.layer, "backward", grad_remote, halves.comm_dtype)
        grad_local = halves.grad_input(grad, local, weight_local).to(ctx.dtype)
        grad_weight = torch.empty_like(weight)
        columns_local, columns_remote = halves.split(grad_weight)
        halves.grad_weight(grad, local, columns_local)
        halves.grad_weight(grad, remote, columns_remote)
        grad_bias = grad.sum([0, *range(2, grad.dim())])
        if not halves.one_way:
            grad_local.add_(halves.link.wait(transfer))
        return grad_local, grad_weight, grad_bias, None


class _SendToA(torch.autograd.Function):
    """Tower b's end of fc8. Forward: sends its half, returns a scalar zero. Backward: receives the half's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, link: Link, layer: str, dtype: torch.dtype | None) -> Tensor:
        ctx.arguments, ctx.shape, ctx.like = (link, layer, dtype), x.shape, x.new_empty(0)
        link.isend(layer, "forward", x, dtype)
        return x.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        link, layer, dtype = ctx.arguments
        transfer = link.irecv(layer, "backward", ctx.shape, ctx.like, dtype)
        return link.wait(transfer), None, None, None


class CrossingConv2d(Conv2d):
    """A convolution over both towers' channels: weight (outputs, inputs of both, k, k)."""

    halves: _Halves

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """This tower's half (N, inputs, H, W) -> (N, outputs, H', W')."""
        return _SeeBoth.apply(x, *lowered_parameters(self, x), self.halves)


class CrossingLinear(Linear):
    """A fully connected layer over both towers' units: weight (outputs, inputs of both)."""

    halves: _Halves

    def forward(self, x: Tensor) -> Tensor:
        """This tower's half (N, inputs) -> (N, outputs)."""
        return _SeeBoth.apply(x, *lowered_parameters(self, x), self.halves)


class SendToA(nn.Module):
    """fc8 as tower b has it: no weights, a message."""

    def __init__(self, link: Link, layer: str, comm_dtype: torch.dtype | None) -> None:
        super().__init__()
        self._arguments = (link, layer, comm_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """This tower's half (N, inputs) -> a scalar zero from which backward must be run."""
        return _SendToA.apply(x, *self._arguments)


def lowered_parameters(module: Conv2d | Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias in the dtype that the layer multiplies in."""
    assert module.bias is not None
    dtype = dtype_of_products(x)
    return lowered(module.weight, dtype), lowered(module.bias, dtype)


class TowerLayers:
    """The layers of one tower whose peer is another process: see :class:`trainer.model.alexnet.Layers`.

    Args:
        config: the net's shape.
        link: to the other tower.
        comm_dtype: in which halves travel; None for their own.
    """

    def __init__(self, config: ModelConfig, link: Link, comm_dtype: torch.dtype | None = None) -> None:
        self._config, self._link, self._comm_dtype = config, link, comm_dtype
        self.towers: tuple[str, ...] = (link.tower,)

    def conv(self, layer: str, inputs: int, outputs: int, *, image: bool = False) -> Conv2d:
        """This tower's convolution."""
        config, index = self._config, int(layer.removeprefix("conv")) - 1
        shape = config.kernel_sizes[index], config.strides[index], config.paddings[index]
        if image or layer not in config.crossings:
            return Conv2d(inputs, outputs, *shape)
        module = CrossingConv2d(2 * inputs, outputs, *shape)
        module.halves = _Halves(self._link, layer, module, self._comm_dtype)
        return module

    def linear(self, layer: str, inputs: int, outputs: int) -> nn.Module:
        """This tower's fully connected layer; of fc8, tower b has a message only."""
        if layer not in self._config.crossings:
            return Linear(inputs, outputs)
        if layer == "fc8" and self._link.tower == "b":
            return SendToA(self._link, layer, self._comm_dtype)
        return crossing_linear(self._link, layer, 2 * inputs, outputs, self._comm_dtype, one_way=layer == "fc8")


def crossing_linear(
    link: Link, layer: str, inputs: int, outputs: int, comm_dtype: torch.dtype | None = None, *, one_way: bool = False
) -> CrossingLinear:
    """A fully connected layer with ``outputs`` units here, over ``inputs`` units of which this process has half."""
    module = CrossingLinear(inputs, outputs)
    module.halves = _Halves(link, layer, module, comm_dtype, one_way=one_way)
    return module


def make_net(config: Config, link: Link | None, *, device: str = "cpu") -> AlexNet:
    """The net as this process trains it: all of it, or one tower of a pair; channels_last, in training mode.

    Args:
        config: the recipe.
        link: to the other tower, or None where this process holds the whole net.
        device: ``cpu`` or ``cuda:N``.
    """
    model = config.model
    layers = TowerLayers(model, link, COMM_DTYPES[config.train.comm_dtype]) if link else WholeNetLayers(model)
    net = AlexNet(model, layers, seed=config.train.seed)
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
