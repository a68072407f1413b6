"""AlexNet as in 2012: two towers that see each other only at the inputs of conv3, fc6, fc7 and fc8.

Source: Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural networks", 2012,
section 3.5 and figure 2; the authors' layer file ``layers-145.cfg``. Shapes in comments: the paper's, a tower.

This file knows no processes. Where a layer sees both towers, a tower hands its half of the maps and the layer to a
:class:`Join`, and gets the layer's sums over both halves back. The other half is in this process (:class:`LocalJoin`)
or comes from another one (``trainer.parallel.crossing``), which computes the own half's part of the sums meanwhile.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import LAYERS, ModelConfig
from trainer.model.response_norm import response_norm, spatial_norm

TOWERS = ("a", "b")
BATCH_NORM_MOMENTUM = 0.1  # share of a new batch in the running statistics
BATCH_NORM_EPSILON = 1e-5  # of Ioffe and Szegedy 2015


class Join(Protocol):
    """Where the towers meet. ``halves`` holds the maps of the towers of this process, in tower order."""

    def both(self, layer: str, halves: Sequence[Tensor], modules: Sequence["Summing"]) -> list[Tensor]:
        """The sums of every tower's ``layer`` (``modules``) over a's maps followed by b's along dimension 1."""

    def onto_a(self, layer: str, halves: Sequence[Tensor], modules: Sequence["Summing"]) -> Tensor:
        """The same on tower a only. Where a is elsewhere ``modules`` is empty: a scalar to run backward from."""


class LocalJoin:
    """Both towers in this process."""

    def both(self, layer: str, halves: Sequence[Tensor], modules: Sequence["Summing"]) -> list[Tensor]:
        """See :class:`Join`."""
        joined = torch.cat(tuple(halves), dim=1)
        return [module.sums(joined) for module in modules]

    def onto_a(self, layer: str, halves: Sequence[Tensor], modules: Sequence["Summing"]) -> Tensor:
        """See :class:`Join`."""
        (module,) = modules
        return module.sums(torch.cat(tuple(halves), dim=1))


@dataclasses.dataclass(frozen=True)
class DropoutDraws:
    """Which units are dropped: a pure function of these numbers, so every process and a resumed run draw the same mask.

    The mask is that of the step's whole batch; a process that takes some rows at a time takes those rows of it.

    Attributes:
        seed: seed of the run.
        step: step of the run, from 0.
        first: first row, of the whole batch, of the pictures at hand.
        total: rows of the whole batch; 0: the pictures at hand are all.
    """

    seed: int
    step: int
    first: int = 0
    total: int = 0

    def mask(self, tower: str, layer: str, like: Tensor, rate: float) -> Tensor:
        """0/1 mask with the shape, dtype and device of ``like``; 1 keeps a unit, with probability 1 - rate."""
        generator = torch.Generator(like.device).manual_seed(stable_seed(self.seed, self.step, tower, layer))
        rows = self.total or len(like)
        whole = like.new_empty((rows, *like.shape[1:])).bernoulli_(1 - rate, generator=generator)
        return whole[self.first : self.first + len(like)]


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; the same in every process and version of Python."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Summing(nn.Module):
    """A layer with weight (outputs, inputs, ...) and bias (outputs,): weighted sums first, then what bends them."""

    weight: nn.Parameter
    bias: nn.Parameter

    def sums(self, x: Tensor) -> Tensor:
        """The weighted sums, linear in x (N, inputs, ...): what it makes of two halves is what it makes of each."""
        raise NotImplementedError


class Convolution(Summing):
    """A convolution and what follows it: weight (maps, inputs, k, k), bias (maps,).

    A batch normalisation adds scale and shift (maps,), and the running statistics that testing uses.
    """

    def __init__(self, config: ModelConfig, index: int, inputs: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        side = config.kernels[index]
        self.weight = nn.Parameter(torch.empty(config.maps[index], inputs, side, side))
        self.bias = nn.Parameter(torch.empty(config.maps[index]))
        if "batch_norm" in config.after[index].split():
            self.scale = nn.Parameter(torch.ones(config.maps[index]))
            self.shift = nn.Parameter(torch.zeros(config.maps[index]))
            self.register_buffer("running_mean", torch.zeros(config.maps[index]))
            self.register_buffer("running_variance", torch.ones(config.maps[index]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, maps, H', W')."""
        return self.follow(self.sums(x))

    def sums(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, maps, H', W')."""
        return self.convolve(x, self.weight, self.bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor, groups: int = 1) -> Tensor:
        """The convolution alone, with this layer's stride and zeros."""
        before, after = self.config.pads[self.index]
        if before != after:  # conv1: the original rounds up, so its last windows hang over the bottom and right edge
            x = functional.pad(x, (before, after, before, after))
            before = 0
        return functional.conv2d(x, weight, bias, self.config.strides[self.index], before, groups=groups)

    def follow(self, x: Tensor) -> Tensor:
        """What follows the convolution; x may hold one tower's maps or both towers'."""
        for name in self.config.after[self.index].replace("relu norm", "relu+norm").split():
            x = self._then(name, x)
        return x

    def _then(self, name: str, x: Tensor) -> Tensor:
        """One operation of ``ModelConfig.after``."""
        config, norm = self.config, self.config.norm
        if name == "relu":
            return x.relu_()  # in place: neither convolution, pooling nor normalisation needs its output again
        if name == "tanh":
            return x.tanh_()
        if name == "pool":
            return functional.max_pool2d(x, config.pool_px, config.pool_stride, ceil_mode=config.pool_ceil)
        if name == "batch_norm":  # over this tower's maps; the towers' statistics never meet
            mean, variance = cast(Tensor, self.running_mean), cast(Tensor, self.running_variance)
            momentum, epsilon = BATCH_NORM_MOMENTUM, BATCH_NORM_EPSILON
            return functional.batch_norm(x, mean, variance, self.scale, self.shift, self.training, momentum, epsilon)
        if name in ("norm", "relu+norm"):  # in one pass over memory
            maps, rectify = config.maps[self.index], name == "relu+norm"
            return response_norm(
                x, size=norm.size, alpha=norm.alpha, beta=norm.beta, k=norm.k, maps=maps, rectify=rectify
            )
        return spatial_norm(x, size=norm.spatial_size, alpha=norm.spatial_alpha, beta=norm.beta)


class FullyConnected(Summing):
    """A fully connected layer: weight (units, inputs), bias (units,); activation and dropout except in fc8."""

    def __init__(self, config: ModelConfig, layer: str, tower: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.config, self.layer, self.tower = config, layer, tower
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor, draws: DropoutDraws | None) -> Tensor:
        """(N, inputs) -> (N, units). Without ``draws`` the net is being tested and nothing is dropped."""
        return self.follow(self.sums(x), draws)

    def sums(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, units)."""
        return functional.linear(x, self.weight, self.bias)

    def follow(self, x: Tensor, draws: DropoutDraws | None) -> Tensor:
        """Activation and dropout of the sums (N, units)."""
        x = x.relu_() if self.config.activation == "relu" else x.tanh_()
        return self._dropout(x, draws)

    def _dropout(self, x: Tensor, draws: DropoutDraws | None) -> Tensor:
        """Paper section 4.2: half of the units are set to zero in training, all outputs are halved in testing."""
        rate, inverted = self.config.dropout, self.config.dropout_kind == "inverted"
        if rate == 0:
            return x
        if draws is None:
            return x if inverted else x * (1 - rate)
        x = x * draws.mask(self.tower, self.layer, x, rate)
        return x / (1 - rate) if inverted else x


class Tower(nn.Module):
    """One tower: half of every layer, and tower a has all of fc8."""

    def __init__(self, config: ModelConfig, name: str, *, seed: int) -> None:
        super().__init__()
        self.name = name
        maps, towers = config.maps, config.towers
        seen = {layer: towers if layer in config.crossings else 1 for layer in LAYERS}  # towers whose maps a layer sees
        convolution = functools.partial(Convolution, config)
        connected = functools.partial(FullyConnected, config)
        self.conv1 = convolution(0, config.channels)
        self.conv2 = convolution(1, maps[0])
        self.conv3 = convolution(2, maps[1] * seen["conv3"])
        self.conv4 = convolution(3, maps[2])
        self.conv5 = convolution(4, maps[3])
        self.fc6 = connected("fc6", name, maps[4] * config.final_side**2 * seen["fc6"], config.units[0])
        self.fc7 = connected("fc7", name, config.units[0] * seen["fc7"], config.units[1])
        if name == "a":
            self.fc8 = connected("fc8", name, config.units[1] * towers, config.classes)
        self._initialise(config, seed)

    def _initialise(self, config: ModelConfig, seed: int) -> None:
        """Gaussian weights, constant biases (paper section 5); each layer draws from a seed that names it."""
        for index, layer in enumerate(LAYERS):
            module = getattr(self, layer, None)
            if module is not None:
                generator = torch.Generator().manual_seed(stable_seed(seed, "init", self.name, layer))
                nn.init.normal_(module.weight, 0.0, config.init_std[index], generator=generator)
                nn.init.constant_(module.bias, config.init_bias[index])

    def see(self, images: Tensor) -> Tensor:
        """conv1, conv2: (N, 3, 224, 224) -> (N, 128, 13, 13)."""
        x = self.conv1(images)  # (N, 48, 27, 27)
        return self.conv2(x)  # (N, 128, 13, 13)

    def recognise(self, sums: Tensor) -> Tensor:
        """The rest of conv3, conv4, conv5: conv3's sums (N, 192, 13, 13) -> (N, 4608)."""
        x = self.conv3.follow(sums)  # (N, 192, 13, 13)
        x = self.conv4(x)  # (N, 192, 13, 13)
        x = self.conv5(x)  # (N, 128, 6, 6)
        return x.flatten(1)  # (N, 4608), map by map


class TwoTowerNet(nn.Module):
    """The net, or the one tower of it that this process holds.

    Args:
        config: the net's shape.
        held: towers of this process: ("a", "b"), ("a",) or ("b",).
        join: where the towers meet.
        seed: of the initial weights; a tower's do not depend on which process holds it.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        held: Sequence[str] = TOWERS,
        join: Join | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.held = tuple(name for name in held if name in TOWERS[: config.towers])
        self.join = join or LocalJoin()
        self.towers = nn.ModuleDict({name: Tower(config, name, seed=seed) for name in self.held})

    def forward(self, images: Tensor, draws: DropoutDraws | None = None) -> Tensor:
        """Runs the towers side by side.

        Args:
            images: (N, channels, image_px, image_px) float32, mean subtracted, on the scale of 0..255.
            draws: dropout draws of a training step; None in testing.

        Returns:
            Logits (N, classes) where tower a is held; elsewhere a scalar zero from which backward must be run.
        """
        self.train(draws is not None)  # what batch normalisation goes by
        towers = [self.tower(name) for name in self.held]
        units = self.convolutions(images)  # (N, 4608)
        sums = self._meet("fc6", units)  # (N, 2048): over the 9216 units of both
        units = [tower.fc6.follow(x, draws) for tower, x in zip(towers, sums, strict=True)]  # (N, 2048)
        sums = self._meet("fc7", units)  # (N, 2048): over the 4096 units of both
        units = [tower.fc7.follow(x, draws) for tower, x in zip(towers, sums, strict=True)]  # (N, 2048)
        if self.config.towers == 1:
            return towers[0].fc8.sums(units[0])  # (N, 1000)
        fc8 = [self.tower("a").fc8] if "a" in self.held else []
        return self.join.onto_a("fc8", units, fc8)  # (N, 1000) on tower a

    def convolutions(self, images: Tensor) -> list[Tensor]:
        """conv1 to conv5 of every tower held: (N, 3, 224, 224) -> (N, 4608) each."""
        towers = [self.tower(name) for name in self.held]
        maps = [tower.see(images) for tower in towers]  # (N, 128, 13, 13)
        sums = self._meet("conv3", maps)  # (N, 192, 13, 13): over the 256 maps of both
        return [tower.recognise(x) for tower, x in zip(towers, sums, strict=True)]  # (N, 4608)

    def tower(self, name: str) -> Tower:
        """A tower that this process holds."""
        return cast(Tower, self.towers[name])

    def _meet(self, layer: str, halves: list[Tensor]) -> list[Tensor]:
        """The sums of ``layer``: over both towers' maps where the towers cross, over its own where they do not."""
        modules: list[Summing] = [getattr(self.tower(name), layer) for name in self.held]
        if self.config.towers == 1 or layer not in self.config.crossings:
            return [module.sums(half) for module, half in zip(modules, halves, strict=True)]
        return self.join.both(layer, halves, modules)

    def loss(self, images: Tensor, labels: Tensor, draws: DropoutDraws | None = None) -> Tensor:
        """Mean cross entropy of a batch, a scalar; labels (N,) int64. Tower b: the scalar to run backward from."""
        output = self(images, draws)
        if "a" not in self.held:
            return output
        return functional.cross_entropy(output.to(torch.promote_types(output.dtype, torch.float32)), labels)
