"""The weights of the two towers as one net's: their layout, and the way back.

Layout of merged weights, ``conv1.weight`` ... ``fc8.bias``:

- Tower a's channels (units) come before tower b's, along dimension 0 of every weight and bias. fc8 is tower a's alone.
- A layer that sees all (conv1 the image; conv3, fc6, fc7, fc8 both towers) is dense: (channels, inputs of both, k, k).
- A layer that sees its own tower only (conv2, conv4, conv5) is grouped, ``groups=2``: (channels, inputs per tower,
  k, k).
- fc6's input is flattened tower-major: a's channels, each row by row, then b's, as ``flatten(1)`` of the whole
  net gives.
- Response normalization stays within a tower: channels 47 and 48 of conv1 are not neighbors.
- Batch normalization, where a recipe has it, adds ``post1.batch_norm.weight``, ``.bias``, ``.running_mean`` and
  ``.running_var``, one number per channel.
- The program of 2012 orders one layer otherwise: its fc7 of tower b takes b's units before a's (``fc2048bb`` has
  ``inputs=hs1b,hs1a``). Weights of that program need the two halves of those columns swapped.
- Weights are as trained. Dropout of the original kind multiplies fc6's and fc7's outputs, after their activation, by
  ``test_factor`` in testing.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.config import ModelConfig
from trainer.errors import ExportError
from trainer.model.alexnet import AlexNet


def groups_of(config: ModelConfig, layer: str) -> int:
    """Groups of a merged layer: 1 where it sees both towers, 2 where each half sees its own."""
    return 1 if config.towers == 1 or layer == "conv1" or layer in config.crossings else 2


def testing_factor(config: ModelConfig) -> float:
    """What fc6's and fc7's outputs are multiplied by in testing (paper section 4.2)."""
    return 1.0 if config.dropout_kind == "inverted" else 1.0 - config.dropout


def merge_towers(net: AlexNet) -> dict[str, Tensor]:
    """Weights of a net whose towers are all in this process; copies, contiguous, on the CPU."""
    assert len(net.towers) == net.config.towers
    return {
        name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in net.state_dict().items()
    }


@torch.no_grad()
def fill_towers(net: AlexNet, merged: Mapping[str, Tensor]) -> None:
    """Copies merged weights into a net; the inverse of :func:`merge_towers`, to the bit.

    Raises:
        ExportError: a tensor is missing, superfluous, not float32, or of another shape; names it.
    """
    targets = net.state_dict()
    for name in [*targets, *merged]:
        found, wanted = (tuple(of[name].shape) if name in of else None for of in (merged, targets))
        if found != wanted:
            raise ExportError(f"{name} is {_shown(found)} in the file, and {_shown(wanted)} in this recipe's net")
        if merged[name].dtype != torch.float32:
            raise ExportError(f"{name} is {merged[name].dtype} in the file: expected float32")
    for name, target in targets.items():
        target.copy_(merged[name])


def block_diagonal(config: ModelConfig, layer: str, weight: Tensor) -> Tensor:
    """A fully connected layer's merged weight as one dense matrix, with zeros where a grouped layer does not look."""
    return weight if groups_of(config, layer) == 1 else torch.block_diag(*weight.chunk(2))


def _shown(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"of shape {shape}"
