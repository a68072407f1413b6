"""AlexNet as in 2012: two towers that see each other only at the inputs of conv3, fc6, fc7 and fc8.

Source: Krizhevsky, Sutskever, Hinton, "ImageNet classification with deep convolutional neural networks", 2012, section
3.5 and figure 2; ``layers-145.cfg`` of the authors' program (github.com/computerhistory/AlexNet-Source-Code). Shapes
in comments: the paper's net, both towers.

This file knows no processes. The net is written once; its layers are handed in. ``trainer.model.layers`` has those of a
process that holds all of it, ``trainer.parallel.crossing`` those of a process that holds one tower of a pair. A tower
has half of every layer's channels, tower a's first, so that its state dict is a slice of the whole net's.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import LAYERS, ModelConfig
from trainer.model.layers import Dropout, DropoutDraws, WholeNetLayers, post_ops, stable_seed


class Layers(Protocol):
    """Makes the layers of the towers that a process holds; ``inputs`` and ``outputs`` are channels *per tower*.

    Attributes:
        towers: the towers held: ("a", "b"), ("a",) or ("b",).
    """

    @property
    def towers(self) -> tuple[str, ...]:
        """See above."""

    def conv(self, layer: str, inputs: int, outputs: int, *, image: bool = False) -> nn.Module:
        """A convolution; with ``image`` every tower sees the whole input, which then has ``inputs`` channels."""

    def linear(self, layer: str, inputs: int, outputs: int) -> nn.Module:
        """A fully connected layer; all of fc8 lives on tower a."""


class AlexNet(nn.Module):
    """Figure 2 of the paper.

    Args:
        config: the net's shape.
        layers: of the towers that this process holds; None: of all.
        seed: of the initial weights; a tower's do not depend on which process holds it.

    Attributes:
        towers: the towers held.
    """

    def __init__(self, config: ModelConfig, layers: Layers | None = None, *, seed: int = 0) -> None:
        super().__init__()
        layers = layers or WholeNetLayers(config)
        self.config, self.towers = config, layers.towers
        channels, hidden, held = config.channels, config.hidden, layers.towers
        self.conv1 = layers.conv("conv1", config.in_channels, channels[0], image=True)  # both towers see the image
        self.post1 = post_ops(config, 0, len(held))
        self.conv2 = layers.conv("conv2", channels[0], channels[1])  # a tower sees its own half
        self.post2 = post_ops(config, 1, len(held))
        self.conv3 = layers.conv("conv3", channels[1], channels[2])  # sees both towers
        self.post3 = post_ops(config, 2, len(held))
        self.conv4 = layers.conv("conv4", channels[2], channels[3])
        self.post4 = post_ops(config, 3, len(held))
        self.conv5 = layers.conv("conv5", channels[3], channels[4])
        self.post5 = post_ops(config, 4, len(held))
        self.fc6 = layers.linear("fc6", channels[4] * config.final_side**2, hidden[0])  # sees both towers
        self.drop6 = Dropout(config, "fc6", held, config.activation)
        self.fc7 = layers.linear("fc7", hidden[0], hidden[1])  # sees both towers
        self.drop7 = Dropout(config, "fc7", held, config.activation)
        self.fc8 = layers.linear("fc8", hidden[1], config.classes)  # sees both towers, on tower a
        self._initialize(seed)

    def forward(self, x: Tensor, draws: DropoutDraws | None = None) -> Tensor:
        """Images to logits.

        Args:
            x: (N, in_channels, image_px, image_px) float32, as the recipe's ``[data]`` makes it (the paper's: mean
                subtracted, scale 0..255).
            draws: which units this step drops; needed where the net is in training mode and drops any.

        Returns:
            Logits (N, classes) where tower a is held; elsewhere a scalar zero from which backward must be run.
        """
        x = self.post1(self.conv1(x))  # (N, 96, 27, 27)
        x = self.post2(self.conv2(x))  # (N, 256, 13, 13)
        x = self.post3(self.conv3(x))  # (N, 384, 13, 13)  the towers cross
        x = self.post4(self.conv4(x))  # (N, 384, 13, 13)
        x = self.post5(self.conv5(x))  # (N, 256, 6, 6)
        x = x.flatten(1)  # (N, 9216)  tower a's channels, each row by row, then b's
        x = self.drop6(self.fc6(x), draws)  # (N, 4096)  activation and dropout; the towers cross
        x = self.drop7(self.fc7(x), draws)  # (N, 4096)  activation and dropout; the towers cross
        return self.fc8(x)  # (N, 1000)  tower b's half goes to tower a

    def loss(self, x: Tensor, labels: Tensor, draws: DropoutDraws | None = None) -> Tensor:
        """Mean cross entropy of a batch, nats, a scalar; labels (N,) int64. Without tower a: see :meth:`forward`."""
        output = self(x, draws)
        if "a" not in self.towers:
            return output
        return functional.cross_entropy(output.to(torch.promote_types(output.dtype, torch.float32)), labels)

    def split_towers(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """A tower's part of each tensor: ``{tower: {name: view}}``.

        Args:
            tensors: weights, gradients or velocities of this net, keyed by its parameters' names, with or without a
                prefix.
        """
        parts: dict[str, dict[str, Tensor]] = {tower: {} for tower in self.towers}
        for name, tensor in tensors.items():
            owners = ("a",) if "fc8." in name else self.towers
            for tower, part in zip(owners, tensor.chunk(len(owners)), strict=True):
                parts[tower][name] = part
        return parts

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        """Gaussian weights, constant biases (paper section 5). The seed of a draw names layer and tower."""
        for tower, parameters in self.split_towers(dict(self.named_parameters())).items():
            for layer, std, bias in zip(LAYERS, self.config.init_std, self.config.init_bias, strict=True):
                if f"{layer}.weight" in parameters:
                    if self.config.init == "he":
                        std = (2 / parameters[f"{layer}.weight"][0].numel()) ** 0.5
                    generator = torch.Generator().manual_seed(stable_seed(seed, "init", tower, layer))
                    parameters[f"{layer}.weight"].normal_(0.0, std, generator=generator)
                    parameters[f"{layer}.bias"].fill_(bias)


def layer_of(name: str) -> str:
    """The layer that a tensor of the state dict belongs to: conv1 of ``conv1.weight`` and ``post1.batch_norm.bias``."""
    return name.partition(".")[0].replace("post", "conv")
