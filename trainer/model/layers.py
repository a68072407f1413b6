"""The layers of a process that holds the whole net, and what follows each layer, whoever holds it.

Both towers live in one tensor, tower a's channels before tower b's. A layer that sees both towers is then dense, one
that sees its own tower is grouped: the usual way to write two towers down, and on a CPU the fastest. A GPU computes
the same otherwise: see :mod:`trainer.model.gpu_layers`.
"""

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import LAYERS, TOWERS, ModelConfig
from trainer.model import kernels
from trainer.model.gpu_layers import (
    LowLinear,
    block_conv2d,
    dtype_of_products,
    fresh_copy,
    has_blocks,
    lowered,
    part_conv2d,
    tower_parts,
)
from trainer.model.kernels.interface import Drop, GpuKernels, TowerMaps
from trainer.model.pooling import PostOps
from trainer.model.response_norm import LocalResponseNorm, WithinChannelNorm

BATCH_NORM_MOMENTUM = 0.1  # share of a new batch in the running statistics
BATCH_NORM_EPSILON = 1e-5  # of Ioffe and Szegedy 2015
LANES = 4  # units that share a random word, 16 bits each
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": functional.relu_, "tanh": torch.tanh}


class Conv2d(nn.Conv2d):
    """A convolution with its own number of zeros at top and left, and at bottom and right.

    conv1 needs that: the original rounds up, so its last windows hang over the bottom and right edge.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        kernel_px: side of the window.
        stride_px: of both directions.
        zeros: px at top and left, px at bottom and right.
        groups: parts of the channels that do not see each other.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel_px: int, stride_px: int, zeros: tuple[int, ...], *, groups: int = 1
    ) -> None:
        before, after = zeros
        padding = before if before == after else 0  # else by hand, in :meth:`pad`
        super().__init__(inputs, outputs, kernel_px, stride_px, padding, groups=groups)
        self.zeros = zeros
        self.has_blocks = has_blocks(inputs, stride_px, groups)

    def reset_parameters(self) -> None:
        """Leaves the memory as it is: :class:`trainer.model.alexnet.AlexNet` fills it."""

    def pad(self, x: Tensor) -> Tensor:
        """x with the zeros that the convolution itself cannot add."""
        before, after = self.zeros
        return x if before == after else functional.pad(x, (before, after, before, after))

    def forward(self, x: Tensor | TowerMaps) -> Tensor | TowerMaps:  # type: ignore[override]
        """(N, inputs, H, W) -> (N, outputs, H', W'); on a GPU its bias is left to what follows."""
        if isinstance(x, TowerMaps) or x.is_cuda:
            return self.rearranged(x)
        return super().forward(self.pad(x))

    def rearranged(self, x: Tensor | TowerMaps) -> TowerMaps:
        """The same as a GPU computes it (see :mod:`trainer.model.gpu_layers`)."""
        assert self.bias is not None and not isinstance(self.padding, str)
        parts = tower_parts(x, self.groups)
        dtype = dtype_of_products(parts[0])
        parts, weight = tuple(part.to(dtype) for part in parts), lowered(self.weight, dtype)
        if self.has_blocks:
            return TowerMaps((block_conv2d(parts[0], weight, self.stride[0], self.zeros),), self.bias)
        padded = [self.pad(part) for part in parts]
        return TowerMaps(part_conv2d(padded, weight, self.stride, self.padding), self.bias)


class Linear(nn.Linear):
    """A fully connected layer: weight (outputs, inputs / groups), bias (outputs,).

    Args:
        inputs: units of the input.
        outputs: units of the output.
        groups: parts of the units that do not see each other.
    """

    def __init__(self, inputs: int, outputs: int, *, groups: int = 1) -> None:
        super().__init__(inputs // groups, outputs)
        self.groups = groups

    def reset_parameters(self) -> None:
        """As of :class:`Conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs)."""
        if self.groups == 1:
            return self.on_gpu(x) if x.is_cuda else super().forward(x)
        chunks = (x.chunk(self.groups, dim=1), self.weight.chunk(self.groups), self.bias.chunk(self.groups))
        return torch.cat([functional.linear(*parts) for parts in zip(*chunks, strict=True)], dim=1)

    def on_gpu(self, x: Tensor) -> Tensor:
        """The same as a GPU computes it (see :mod:`trainer.model.gpu_layers`)."""
        dtype = dtype_of_products(x)
        if dtype != torch.bfloat16 or self.weight.dtype != torch.float32:
            return super().forward(x)
        return LowLinear.apply(x.to(dtype), self.weight, self.bias, fresh_copy(self.weight), fresh_copy(self.bias))


class WholeNetLayers:
    """The layers of a process that holds all towers: see :class:`trainer.model.alexnet.Layers`."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self.towers = TOWERS[: config.towers]

    def conv(self, layer: str, inputs: int, outputs: int, *, image: bool = False) -> Conv2d:
        """All towers' convolution: grouped where a tower sees its own channels only."""
        num, config = len(self.towers), self._config
        index = int(layer.removeprefix("conv")) - 1
        groups = 1 if image else self._groups(layer)
        shape = config.kernel_sizes[index], config.strides[index], config.paddings[index]
        return Conv2d(inputs if image else inputs * num, outputs * num, *shape, groups=groups)

    def linear(self, layer: str, inputs: int, outputs: int) -> Linear:
        """All towers' layer; fc8 has its outputs once."""
        num = len(self.towers)
        return Linear(inputs * num, outputs if layer == "fc8" else outputs * num, groups=self._groups(layer))

    def _groups(self, layer: str) -> int:
        return 1 if layer in self._config.crossings else len(self.towers)


def post_ops(config: ModelConfig, index: int, num_towers: int) -> PostOps:
    """What follows convolution ``index`` (0: conv1), for the channels of ``num_towers`` towers: see ``ModelConfig``."""
    channels = config.channels[index]
    modules: list[tuple[str, nn.Module]] = []
    for name in config.post_ops[index]:
        if name == "relu":  # in place: neither convolution, pooling nor normalization needs its output again
            module: nn.Module = nn.ReLU(inplace=True)
        elif name == "tanh":
            module = nn.Tanh()
        elif name == "maxpool":
            module = nn.MaxPool2d(config.pool_px, config.pool_stride, ceil_mode=config.pool_ceil)
        elif name == "batch_norm":  # per channel, so the towers' statistics never meet
            module = BatchNorm2d(channels * num_towers)
        elif name == "lrn":  # within a tower: channels 47 and 48 of conv1 are no neighbors
            rectify = bool(modules) and modules[-1][0] == "relu"
            if rectify:
                modules.pop()  # ReLU and normalization in one pass over memory
            module = LocalResponseNorm(channels, config.lrn, rectify=rectify)
        else:
            module = WithinChannelNorm(config.lrn)
        modules.append((name, module))
    taken = [name for name, _ in modules]
    names = [name if taken.count(name) == 1 else f"{name}{number}" for number, name in enumerate(taken)]
    following = LAYERS[index + 1]
    is_grouped = following.startswith("conv") and following not in config.crossings
    named = OrderedDict(zip(names, (module for _, module in modules), strict=True))
    return PostOps(named, parts=num_towers if is_grouped else 1)


class BatchNorm2d(nn.BatchNorm2d):
    """Without torch's count of batches: nothing reads it, and no slice of it is a tower's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=BATCH_NORM_EPSILON, momentum=BATCH_NORM_MOMENTUM)
        self.num_batches_tracked = None
        self.frozen = False

    def freeze(self) -> None:
        """Normalizes by the running statistics from now on, in training too, and leaves them as they are."""
        self.frozen = True
        self.eval()

    def train(self, mode: bool = True) -> "BatchNorm2d":
        """As of any module; a frozen one stays in testing mode."""
        return super().train(mode and not self.frozen)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *more: Any) -> None:
        """A plain dict says no version, and torch would add the count for one that is older than it."""
        super()._load_from_state_dict(state_dict, prefix, {**metadata, "version": 2}, *more)


def freeze_statistics(net: nn.Module, layers: Sequence[str]) -> None:
    """Freezes the batch normalization after some convolutions, given as conv1 ... conv5."""
    for layer in layers:
        for module in getattr(net, layer.replace("conv", "post")).modules():
            if isinstance(module, BatchNorm2d):
                module.freeze()


@dataclasses.dataclass(frozen=True)
class DropoutDraws:
    """Which units are dropped: a pure function of these numbers, so every process and a resumed run draw the same mask.

    The mask is that of the step's whole batch; a process that has some of its rows draws those and no others, so its
    work does not grow with the replicas. For that the draws are counted: four units share a number, which is a hash of
    its place in the batch. A generator of torch has only a beginning: one must draw all rows before one's own, or pay
    for a generator a row; and its numbers are others on a GPU, and in another build of torch.

    Attributes:
        seed: seed of the run.
        step: step of the run, from 0.
        first: first row, of the whole batch, of the images at hand.
        starts: what :meth:`start` would give, as scalars on the device: a captured step is given others each time.
    """

    seed: int
    step: int
    first: int = 0
    starts: Mapping[tuple[str, str], Tensor] | None = None

    def start(self, tower: str, layer: str) -> int:
        """Where the words of a tower's mask begin, 0..2**63 - 1."""
        return stable_seed(self.seed, self.step, tower, layer)

    def begin(self, tower: str, layer: str) -> int | Tensor:
        """The start of this step, or where it is to be found."""
        return self.starts[tower, layer] if self.starts else self.start(tower, layer)

    def mask(self, tower: str, layer: str, like: Tensor, rate: float) -> Tensor:
        """0/1 mask with the shape, dtype and device of ``like``; 1 keeps a unit, with probability 1 - rate.

        ``rate`` counts in steps of 1 / 65536, and the mask is the same on every device.
        """
        units = like[:1].numel()
        words = words_of(units)  # the same row has the same words whoever draws it
        begin = self.begin(tower, layer)
        numbers = _counted(begin, self.first * words, len(like) * words, like.device)
        lanes = numbers.view(torch.int16).view(len(like), LANES * words)[:, :units]
        least = least_kept(rate) - 32768  # int16 goes from -32768 to 32767
        return (lanes >= least).to(like.dtype).view_as(like)


def words_of(units: int) -> int:
    """Random words of a row of units."""
    return -(-units // LANES)


def least_kept(rate: float) -> int:
    """Of the 65536 values of a unit's 16 bits, the first that keeps it."""
    return min(round(rate * 65536), 65535)


class Dropout(nn.Module):
    """Paper section 4.2: half of the units are set to zero in training, all outputs are halved in testing.

    On a GPU a ReLU and the dropout behind it are one pass, if there is a kernel, and so is their gradient.

    Args:
        config: rate and kind; ``inverted`` divides by what is kept in training instead, and does nothing in testing.
        layer: fc6 or fc7.
        towers: whose units x holds, in this order along dimension 1.
        activation: what is done before it, ``relu`` (in place) or ``tanh``; empty: nothing.
    """

    def __init__(self, config: ModelConfig, layer: str, towers: tuple[str, ...], activation: str = "") -> None:
        super().__init__()
        self.rate, self.inverted = config.dropout, config.dropout_kind == "inverted"
        self.layer, self.towers, self.activation = layer, towers, activation

    def forward(self, x: Tensor, draws: DropoutDraws | None) -> Tensor:
        """(N, units) -> (N, units)."""
        fuses = self.training and self.rate > 0 and self.activation == "relu"
        functions = kernels.on_gpu(x) if fuses else None
        if functions is not None and draws is not None:
            return _ReluDropout.apply(x, self.drop(x, draws), functions)
        x = ACTIVATIONS[self.activation](x) if self.activation else x
        if self.rate == 0:
            return x
        if not self.training:
            return x if self.inverted else x * (1 - self.rate)
        assert draws is not None, "a net in training mode needs to know what to drop; .eval() drops nothing"
        x = x * self.mask(x, draws)
        return x / (1 - self.rate) if self.inverted else x

    def mask(self, x: Tensor, draws: DropoutDraws) -> Tensor:
        """0/1 mask (N, units)."""
        halves = zip(self.towers, x.chunk(len(self.towers), dim=1), strict=True)
        masks = [draws.mask(tower, self.layer, half, self.rate) for tower, half in halves]
        return masks[0] if len(masks) == 1 else torch.cat(masks, dim=1)

    def drop(self, x: Tensor, draws: DropoutDraws) -> Drop:
        """The same for a kernel."""
        starts = tuple(draws.begin(tower, self.layer) for tower in self.towers)
        factor = 1 / (1 - self.rate) if self.inverted else 1.0
        words = words_of(x.shape[1] // len(starts))
        return Drop(starts, draws.first, words, 0, least_kept(self.rate), factor)


class _ReluDropout(torch.autograd.Function):
    """Keeps its output, which the next layer keeps in any case."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: Drop, functions: GpuKernels) -> Tensor:
        y = functions.drop_forward(x.contiguous(), drop)
        ctx.save_for_backward(y)
        ctx.arguments = (drop, functions)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (y,), (drop, functions) = ctx.saved_tensors, ctx.arguments
        return functions.drop_backward(gradients[0].contiguous(), y, drop), None, None


def _counted(seed: int | Tensor, first: int, count: int, device: torch.device) -> Tensor:
    """Random words number ``first`` to ``first + count`` of a seed: splitmix64 (Steele, Lea, Flood 2014), int64.

    For four units it is three products and three shifts: a CPU needs a seventh of the time of ``bernoulli_``. torch
    shifts the sign in, which the constants with ``&`` take away again; products and sums wrap around as they should.
    """
    words = torch.arange(first, first + count, device=device)
    words.mul_(_signed(0x9E3779B97F4A7C15)).add_(seed)
    words.bitwise_xor_((words >> 30).bitwise_and_((1 << 34) - 1)).mul_(_signed(0xBF58476D1CE4E5B9))
    words.bitwise_xor_((words >> 27).bitwise_and_((1 << 37) - 1)).mul_(_signed(0x94D049BB133111EB))
    return words.bitwise_xor_((words >> 31).bitwise_and_((1 << 33) - 1))


def _signed(word: int) -> int:
    """A word of 64 bits as int64 holds it."""
    return word - (1 << 64) if word >> 63 else word


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; the same in every process and version of Python."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
