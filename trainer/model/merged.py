"""Both towers in one process, convolved together: one grouped convolution where two small ones would run.

The weights stay where they are, in their towers, and are joined for each step: a copy of 2 of 61 million parameters.
Equal to the towers side by side (``tests/trainer/model/test_merged.py``).
"""

import torch
from torch import Tensor

from trainer.model.alexnet import TOWERS, Convolution, TwoTowerNet


class MergedNet(TwoTowerNet):
    """:class:`trainer.model.alexnet.TwoTowerNet` with its convolutions merged; it must hold both towers."""

    def convolutions(self, images: Tensor) -> list[Tensor]:
        """See :meth:`trainer.model.alexnet.TwoTowerNet.convolutions`. Tower a's maps stand before b's."""
        x = self._convolution("conv1", images, groups=1)  # (N, 96, 27, 27)
        x = self._convolution("conv2", x, groups=2)  # (N, 256, 13, 13)
        x = self._convolution("conv3", x, groups=1 if "conv3" in self.config.crossings else 2)  # (N, 384, 13, 13)
        x = self._convolution("conv4", x, groups=2)  # (N, 384, 13, 13)
        x = self._convolution("conv5", x, groups=2)  # (N, 256, 6, 6)
        return [half.flatten(1) for half in x.chunk(2, dim=1)]  # (N, 4608), map by map

    def _convolution(self, layer: str, x: Tensor, *, groups: int) -> Tensor:
        """One layer of both towers."""
        a, b = (getattr(self.tower(name), layer) for name in TOWERS)
        assert isinstance(a, Convolution)
        weight, bias = torch.cat((a.weight, b.weight)), torch.cat((a.bias, b.bias))
        return a.follow(a.convolve(x, weight, bias, groups))
