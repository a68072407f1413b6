"""How a GPU computes the same layers: dense convolutions of multiples of 8 channels, and weights that are bf16 already.

cuDNN has no good grouped bf16 convolution in channels_last: four weight gradients took 5.0 of a step's 13.7 ms (batch
128, H100), and each group is cut out and padded around the kernel. Two towers are therefore two dense convolutions, and
their maps stay two tensors from one to the next (:class:`.kernels.interface.TowerMaps`): joined and cut apart again,
those of conv2, conv4 and conv5 would move 3 GB in a step of 1,024. A bias is left to whoever reads the maps next
(:mod:`.pooling`): added by torch's convolution it is a pass of its own, 2.7 GB over the five.

conv1's three channels would leave the matrix units empty: the image's blocks of 4 x 4 px become 48 channels, the window
of 11 x 11 px one of 3 x 3 blocks. The sums are the same, with 23 zeros among 144 weights.

On a CPU this does not pay: conv1 over blocks had 0.81 times the plain rate in float32 and 1.11 in bfloat16
(``benchmarks/gpu_kernels.py --cpu``). So it is for a GPU; it runs on any device, and is tested in float64.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainer.model import kernels
from trainer.model.kernels.interface import Blocks, GpuKernels, TowerMaps

MOST_IMAGE_CHANNELS = 4  # more fill the matrix units better as they are


def tower_parts(x: Tensor | TowerMaps, groups: int) -> tuple[Tensor, ...]:
    """What each group of a convolution sees: (N, C / groups, H, W), channels_last.

    Where the layer before has left the towers apart, nothing is copied; else once, so that neither the forward nor the
    weight's gradient has to.
    """
    if isinstance(x, TowerMaps) and len(x.parts) == groups and x.bias is None:
        return x.parts
    whole = join(x)
    if groups == 1:
        return (whole,)
    return tuple(part.contiguous(memory_format=torch.channels_last) for part in whole.chunk(groups, dim=1))


def join(x: Tensor | TowerMaps) -> Tensor:
    """All towers' maps in one tensor (N, C, H, W), the bias added: what no kernel has done on the way."""
    if isinstance(x, Tensor):
        return x
    whole = x.parts[0] if len(x.parts) == 1 else torch.cat(x.parts, dim=1)
    return whole if x.bias is None else whole + lowered(x.bias, whole.dtype)[:, None, None]


def part_conv2d(
    parts: Sequence[Tensor], weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """A grouped convolution as dense ones, without bias; (N, inputs of a group, H, W) each -> outputs of a group."""
    weights = weight.chunk(len(parts)) if len(parts) > 1 else (weight,)
    return tuple(functional.conv2d(part, w, None, stride, padding) for part, w in zip(parts, weights, strict=True))


def has_blocks(inputs: int, stride: int, groups: int) -> bool:
    """Whether a convolution is better computed over blocks of stride x stride px: it sees few channels, in steps."""
    return groups == 1 and stride > 1 and inputs <= MOST_IMAGE_CHANNELS


def block_conv2d(x: Tensor, weight: Tensor, stride: int, zeros: tuple[int, ...]) -> Tensor:
    """A convolution with a stride as one without, over blocks of stride x stride px; no bias.

    Args:
        x: (N, C, H, W).
        weight: (outputs, C, k, k).
        stride: of both directions, s.
        zeros: px at top and left, px at bottom and right.

    Returns:
        (N, outputs, H', W') as ``conv2d`` of x with its zeros gives it.
    """
    kernel = weight.shape[-1]
    window = -(-kernel // stride)  # in blocks
    rows, columns = ((side + sum(zeros) - kernel) // stride + window for side in x.shape[2:])
    cut = to_blocks(x, Blocks(stride, zeros[0], rows, columns))
    return functional.conv2d(cut, to_blocks(weight, Blocks(stride, 0, window, window)))


def to_blocks(x: Tensor, blocks: Blocks) -> Tensor:
    """(N, C, H, W) -> (N, side * side * C, rows, columns), channels_last, with zeros where there is no image.

    A block's channels are row by row, pixel by pixel: a block's row is one piece of channels_last memory.
    """
    if functions := kernels.on_gpu(x):
        return _ToBlocks.apply(x.contiguous(memory_format=torch.channels_last), blocks, functions)
    side, before, rows, columns = dataclasses.astuple(blocks)
    count, channels, height, width = x.shape
    after = rows * side - height - before, columns * side - width - before  # negative: what no window sees
    padded = functional.pad(x, (before, after[1], before, after[0]))
    cut = padded.reshape(count, channels, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(count, rows, columns, side * side * channels).permute(0, 3, 1, 2)


class _ToBlocks(torch.autograd.Function):
    """The same in one pass each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Blocks, functions: GpuKernels) -> Tensor:
        ctx.arguments = (x.shape, blocks, functions)
        return functions.to_blocks(x, blocks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        shape, blocks, functions = ctx.arguments
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        return functions.from_blocks(gradient, shape, blocks), None, None


@dataclasses.dataclass
class LowCopy:
    """A parameter in bfloat16, as of one of its versions.

    Attributes:
        tensor: the copy, in the parameter's layout.
        version: of the parameter, when it was copied; any change in place makes another one.
    """

    tensor: Tensor
    version: int


def low_copy(parameter: Tensor) -> LowCopy | None:
    """The copy that a parameter's layers have asked for, if they have; the optimizer writes it with the weights."""
    return getattr(parameter, "low_copy", None)


class _Lowered(torch.autograd.Function):
    """The copy stands for the parameter, whose gradient comes back in its own dtype."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return copy.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0].to(ctx.dtype), None


def lowered(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in the dtype that it is multiplied in; on a GPU bfloat16 is cast once, then kept by the optimizer."""
    if dtype != torch.bfloat16 or parameter.dtype != torch.float32 or not parameter.is_cuda:
        return parameter.to(dtype)
    return _Lowered.apply(parameter, fresh_copy(parameter))


def fresh_copy(parameter: Tensor) -> Tensor:
    """The bfloat16 of a parameter as it is now; cast only where somebody else than the optimizer has changed it."""
    found = low_copy(parameter)
    if found is None or found.tensor.device != parameter.device:
        with torch.no_grad():
            found = LowCopy(parameter.detach().to(torch.bfloat16), parameter._version)
        parameter.low_copy = found  # type: ignore[attr-defined]
    elif found.version != parameter._version:  # in place: a CUDA graph reads the copy where it was
        with torch.no_grad():
            found.tensor.copy_(parameter)
        found.version = parameter._version
    return found.tensor


class LowLinear(torch.autograd.Function):
    """A fully connected layer multiplied in bfloat16, whose weight gradient leaves the product in float32.

    The product sums in float32 anyway; rounded to bfloat16 it would have to be cast back, 366 MB for the paper's net.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, low_weight: Tensor, low_bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, low_weight)
        ctx.dtypes = weight.dtype, bias.dtype
        return functional.linear(x, low_weight, low_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight), (wide, of_bias) = gradients, ctx.saved_tensors, ctx.dtypes
        gradient_x = gradient.mm(weight) if ctx.needs_input_grad[0] else None
        return gradient_x, wide_product(gradient.t(), x, wide), gradient.sum(0, dtype=of_bias), None, None


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in a wider dtype than a's and b's; on a GPU straight from the product's sums."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.mm(b).to(dtype)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype that a layer multiplies x in: autocast's where it is on, that of x elsewhere."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype
