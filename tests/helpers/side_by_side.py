"""The reference for all that joins or splits towers: both here, each with weights of its own, in plain operations.

Nothing of it is grouped, sliced or sent; its gradients are autograd's own.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import LAYERS, TOWERS, ModelConfig
from trainer.model.alexnet import AlexNet
from trainer.model.layers import Dropout, DropoutDraws, post_ops
from trainer.parallel.crossing import TowerLayers
from trainer.parallel.mesh import MeshCoord
from trainer.planning.scale import fake_world


def lone_tower(model: ModelConfig, tower: str, seed: int = 0) -> AlexNet:
    """One tower of a pair; nobody is at the other end."""
    with fake_world(MeshCoord(TOWERS.index(tower), 2)) as mesh:
        return AlexNet(model, TowerLayers(model, mesh.link), seed=seed)


class SideBySide(nn.Module):
    """Takes the weights of a net that holds both towers.

    Args:
        net: copied from; no batch normalization.
        comm_dtype: dtype in which the other tower's half, and its gradient, would have traveled.
    """

    def __init__(self, net: AlexNet, comm_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config, self.towers, self.comm_dtype = net.config, net.towers, comm_dtype
        parts = net.split_towers(dict(net.named_parameters()))
        self.weights = {
            tower: {name: nn.Parameter(part.detach().clone()) for name, part in part.items()}
            for tower, part in parts.items()
        }
        for tower, named in self.weights.items():
            for name, parameter in named.items():
                self.register_parameter(f"{tower}_{name}".replace(".", "_"), parameter)
        self.post = nn.ModuleList(post_ops(self.config, index, 1) for index in range(5))
        self.drop = nn.ModuleDict({t + layer: Dropout(self.config, layer, (t,)) for t in TOWERS for layer in LAYERS})

    def forward(self, images: Tensor, draws: DropoutDraws | None = None) -> Tensor:
        """Logits (N, classes)."""
        halves = [images, images]
        for index, layer in enumerate(LAYERS[:5]):
            halves = [self.post[index](self._layer(layer, halves, own)) for own in (0, 1)]
        halves = [half.flatten(1) for half in halves]
        for layer in ("fc6", "fc7"):
            sums = [self._layer(layer, halves, own) for own in (0, 1)]
            bent = [x.relu() if self.config.activation == "relu" else x.tanh() for x in sums]
            halves = [self.drop[tower + layer](x, draws) for tower, x in zip(TOWERS, bent, strict=True)]
        return self._layer("fc8", halves, 0)

    def loss(self, images: Tensor, labels: Tensor, draws: DropoutDraws | None = None) -> Tensor:
        """As of the net."""
        logits = self(images, draws)
        return functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)

    def by_tower(self, *, gradients: bool = False) -> dict[str, Tensor]:
        """Weights or gradients: ``{tower.name: tensor}``."""
        return {
            f"{tower}.{name}": parameter.grad if gradients else parameter.detach()
            for tower, named in self.weights.items()
            for name, parameter in named.items()
        }

    def _layer(self, layer: str, halves: list[Tensor], own: int) -> Tensor:
        """Its own half's part and the bias, then the other half's."""
        named = self.weights[TOWERS[own]]
        weight, bias = named[f"{layer}.weight"], named[f"{layer}.bias"]
        if layer not in self.config.crossings:
            return self._product(layer, halves[own], weight, bias)
        mine, theirs = weight.chunk(2, dim=1)[:: 1 if own == 0 else -1]
        remote = halves[1 - own]
        remote = remote.to(self.comm_dtype).to(remote.dtype) if self.comm_dtype else remote
        return self._product(layer, halves[own], mine, bias) + self._product(layer, remote, theirs, None)

    def _product(self, layer: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if layer.startswith("fc"):
            return functional.linear(x, weight, bias)
        index = LAYERS.index(layer)
        before, after = self.config.paddings[index]
        x = functional.pad(x, (before, after, before, after))
        return functional.conv2d(x, weight, bias, self.config.strides[index])
