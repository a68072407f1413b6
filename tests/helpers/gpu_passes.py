"""What a step of a net moves through a GPU's memory, by count: run on tensors without memory, kernels written down."""

import contextlib
import dataclasses
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.helpers.gpu_launches import recorded
from trainer.config import ModelConfig
from trainer.model import gpu_layers, kernels, layers
from trainer.model.alexnet import AlexNet
from trainer.model.kernels.triton import TritonKernels
from trainer.model.layers import Conv2d, DropoutDraws, Linear

PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm")
NOTHING = ("empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "promote_types")  # is moved


@dataclasses.dataclass(frozen=True)
class Moved:
    """One operation of torch, or launch of a kernel, as it was called.

    Attributes:
        name: of the operation, or of the kernel.
        moved_bytes: read and written, each tensor once.
        shapes: of its tensors.
        is_product: its time is that of a matrix product.
    """

    name: str
    moved_bytes: int
    shapes: tuple[torch.Size, ...]
    is_product: bool


class _Counting(TorchDispatchMode):
    """Notes what torch does; a view does nothing. Convolutions give channels_last, as cuDNN does."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Moved] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name.startswith("convolution"):
            result = tree_map(_channels_last, result)
        given, made = _tensors((args, kwargs or {})), _tensors(result)
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not is_view and name not in NOTHING:
            tensors = {id(tensor): tensor for tensor in (*given, *made)}.values()
            moved = sum(map(_bytes, tensors))
            if name.endswith("_") and not name.startswith("_"):  # in place: read and written
                moved += _bytes(given[0])
            self.found.append(Moved(name, moved, tuple(tensor.shape for tensor in tensors), name in PRODUCTS))
        if name.startswith("convolution"):
            self.found += _hidden(name, args, given, made)
        return result


def _hidden(name: str, args: Any, given: list[Tensor], made: list[Tensor]) -> Iterator[Moved]:
    """What torch does around cuDNN: a pass for the bias, one for its gradient, copies of maps that are not dense."""
    if name == "convolution" and args[2] is not None:
        yield Moved("bias of a convolution", 2 * _bytes(made[0]), (made[0].shape,), is_product=False)
    if name == "convolution_backward" and args[-1][2]:
        yield Moved("gradient of a bias", _bytes(given[0]), (given[0].shape,), is_product=False)
    for tensor in given:
        if tensor.dim() == 4 and not tensor.is_contiguous(memory_format=torch.channels_last):
            yield Moved("copy before a convolution", 2 * _bytes(tensor), (tensor.shape,), is_product=False)


def count_step(config: ModelConfig, batch: int) -> list[Moved]:
    """Forward, loss and backward of a net in one process on a GPU, in bfloat16, from the second step on."""
    images = torch.empty(batch, config.in_channels, config.image_px, config.image_px, device="meta")
    images = images.bfloat16().contiguous(memory_format=torch.channels_last)  # as the loader gives them
    labels = torch.empty(batch, dtype=torch.int64, device="meta")
    with as_on_gpu(), recorded() as launches, contextlib.ExitStack() as stack:
        stack.enter_context(unittest.mock.patch.object(AlexNet, "_initialize", lambda *_: None))
        with torch.device("meta"):
            net = AlexNet(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for _ in range(2):
            net.zero_grad(set_to_none=True)
            launches.clear()
            with _Counting() as counting:
                net.loss(images, labels, DropoutDraws(seed=0, step=0)).backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
        ours = [
            Moved(
                launch.kernel.__name__,
                launch.moved_bytes,
                tuple(value.shape for value in launch.arguments.values() if isinstance(value, Tensor)),
                is_product=False,
            )
            for launch in launches
        ]
    return [*counting.found, *ours]


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, layers on tensors without memory go the ways of a GPU, in bfloat16."""

    def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.mm(a, b, out_dtype=dtype)

    def lowered(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
        return gpu_layers._Lowered.apply(parameter, gpu_layers.fresh_copy(parameter))

    functions = TritonKernels()
    with contextlib.ExitStack() as stack:
        for place, name, value in (
            (Conv2d, "forward", Conv2d.rearranged),
            (Linear, "forward", Linear.on_gpu),
            (layers, "lowered", lowered),
            (layers, "dtype_of_products", lambda x: torch.bfloat16),
            (gpu_layers, "lowered", lowered),
            (gpu_layers, "wide_product", wide_product),
            (kernels, "on_gpu", lambda x: functions),
            (kernels, "of", lambda x: functions),
        ):
            stack.enter_context(unittest.mock.patch.object(place, name, value))
        yield


def _channels_last(value: Any) -> Any:
    is_maps = isinstance(value, Tensor) and value.dim() == 4
    return torch.empty_like(value, memory_format=torch.channels_last) if is_maps else value


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
