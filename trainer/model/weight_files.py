"""Weights of other files, and of our own, as merged weights: see :mod:`trainer.model.weights` for their layout.

- ``export``'s safetensors, with the recipe and the classes in its metadata.
- torchvision's AlexNet (``features.0.weight`` ... ``classifier.6.bias``): a state dict, .pth or .safetensors.
- CaffeNet-style names (``conv1.weight`` or ``conv1_w`` ... ``fc8.bias``): .pth, .safetensors or .npz. Caffe's nets see
  blue, green, red: conv1's channels are turned. Its groups are this layout's towers.
- checkpoints of the 2012 program: see :mod:`trainer.model.files_2012`.

No file runs code: torch's are read with ``weights_only``, pickles of 2012 by a reader that makes arrays only.
"""

import dataclasses
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import PipelineError
from trainer.config import Config, from_toml
from trainer.errors import ExportError, TrainerError
from trainer.model.files_2012 import MOST_BYTES, check_zip, is_checkpoint, read_checkpoint
from twotower.typed import build
from twotower.untrusted import open_regular, parse_json
from twotower.words import one_line, shortened

TORCHVISION = {
    **{f"features.{place}": f"conv{number}" for number, place in enumerate((0, 3, 6, 8, 10), 1)},
    **{f"classifier.{place}": layer for place, layer in ((1, "fc6"), (4, "fc7"), (6, "fc8"))},
}
CAFFE_NAME = re.compile(r"(?:.*\.)?(conv[1-5]|fc[678])[._/](weight|bias|w|b)")
LEVELS, DEVIATIONS = "levels", "deviations"
NOT_WEIGHTS = ("input.", "statistics.")  # tensors of an export that belong to its input


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A net's weights, and what is known of it.

    Attributes:
        tensors: merged weights, float32.
        kind: where they are from, for people: ``export``, ``run``, ``torchvision``, ``CaffeNet`` or ``2012``.
        unit: of the pixels that conv1 was trained on: ``levels`` (of 0..255) or ``deviations`` (divided by them).
        config: the recipe, where it is known.
        classes: names of the classes in the order of labels, where they are known.
        converted: what was changed to make them fit this project's layout, in words.
        facts: the metadata of an export.
    """

    tensors: dict[str, Tensor]
    kind: str
    unit: str
    config: Config | None = None
    classes: tuple[str, ...] | None = None
    converted: tuple[str, ...] = ()
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)


def unit_of(config: Config) -> str:
    """What a recipe's net sees: gray levels, or deviations."""
    return LEVELS if config.data.normalize == "none" else DEVIATIONS


def read_weight_file(path: Path) -> WeightFile:
    """Reads any of the files named above; what a file is, its content tells.

    Raises:
        ExportError: there is none, it is damaged, or it has no weights that are known here.
    """
    try:
        with open_regular(path) as handle:
            head, size = os.pread(handle, 16, 0), os.fstat(handle).st_size
        if size > MOST_BYTES:
            raise ExportError(f"{path} has {size:,} bytes, and at most {MOST_BYTES:,} are read")
    except FileNotFoundError:
        raise ExportError(f"no weights at {path}") from None
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror or error}") from None
    tensors, facts = _read_tensors(path, head)
    if tensors is None:
        tensors = read_checkpoint(path)
        _check_tensors(path, tensors)
        return WeightFile(tensors, "2012", LEVELS)
    _check_tensors(path, tensors)
    if facts.get("format", "").startswith("twotower"):
        return _own(path, tensors, facts)
    return _foreign(path, tensors)


def _read_tensors(path: Path, head: bytes) -> tuple[dict[str, Tensor] | None, Mapping[str, str]]:
    """Every tensor of a file and its metadata; None for a checkpoint of 2012."""
    try:
        if path.suffix == ".safetensors" or head[8:9] == b"{":
            with safe_open(path, "pt") as file:
                names = file.keys()  # no dict: it cannot be iterated itself
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        if head[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                check_zip(archive, path.stat().st_size)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}, {}
        if is_checkpoint(path):
            return None, {}
        found = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ExportError(f"{path} cannot be read as safetensors: {str(error).splitlines()[0]}") from None
    except Exception as error:  # a stranger's bytes fail in any way
        known = str(error) and not isinstance(error, pickle.UnpicklingError)  # torch's own text is advice for others
        text = shortened(str(error).splitlines()[0], 200) if known else type(error).__name__
        raise ExportError(f"{path} cannot be read as safetensors, .npz or a torch state dict: {text}") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise ExportError(f"{path} holds no state dict: expected names and tensors")
    return found, {}


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses what is no weight: numbers that are none, and tensors of more values than the file has.

    Raises:
        ExportError: names the tensor.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise ExportError(f"{path}: {one_line(name)} is no plain tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ExportError(f"{path}: {one_line(name)} has {tensor.numel():,} values, and the file has fewer")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ExportError(f"{path}: {one_line(name)} has values that are NaN or infinite: expected a net's weights")


def _own(path: Path, tensors: dict[str, Tensor], facts: Mapping[str, str]) -> WeightFile:
    """A file of ``export``."""
    try:
        config = from_toml(facts["config"])
        names = parse_json(facts["class_names"]) if "class_names" in facts else None
        classes = None if names is None else build(tuple[str, ...], names, "class_names")
    except (LookupError, ValueError, TrainerError, PipelineError) as error:
        raise ExportError(f"{path}: its recipe cannot be read by this version ({error}): export it anew") from None
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(NOT_WEIGHTS)}
    return WeightFile(weights, "export", unit_of(config), config, classes, facts=facts)


def _foreign(path: Path, tensors: Mapping[str, Tensor]) -> WeightFile:
    """A state dict with torchvision's or Caffe's names."""
    if any(name.startswith("velocity/") for name in tensors):
        raise ExportError(
            f"{path} is one tower of a checkpoint: name the run's folder, or a file that export made of it"
        )
    found, from_caffe = {}, False
    for name, tensor in tensors.items():
        prefix, _, what = name.removeprefix("module.").rpartition(".")
        caffe = CAFFE_NAME.fullmatch(name)
        if prefix in TORCHVISION:
            target = f"{TORCHVISION[prefix]}.{what}"
        elif caffe:
            target, from_caffe = f"{caffe[1]}.{'weight' if caffe[2][0] == 'w' else 'bias'}", True
        else:
            continue
        found[target] = _squeezed(target, tensor).float().contiguous()
    if not found:
        raise ExportError(
            f"{path} has no weights that are known here: expected those of export, torchvision's AlexNet "
            f"(features.0.weight ...), CaffeNet's names (conv1.weight ... fc8.bias) or a checkpoint of 2012; it has "
            f"{', '.join(list(tensors)[:3]) or 'nothing'}"
        )
    if not from_caffe:
        return WeightFile(found, "torchvision", DEVIATIONS)
    converted: tuple[str, ...] = ()
    if found.get("conv1.weight") is not None and found["conv1.weight"].shape[1:2] == (3,):
        found["conv1.weight"] = found["conv1.weight"].flip(1).contiguous()
        converted = ("conv1.weight: its channels turned from blue, green, red to red, green, blue",)
    return WeightFile(found, "CaffeNet", LEVELS, converted=converted)


def _squeezed(name: str, tensor: Tensor) -> Tensor:
    """Without the leading dimensions of 1 that Caffe's older blobs have."""
    wanted = 1 if name.endswith("bias") else 4 if name.startswith("conv") else 2
    while tensor.dim() > wanted and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor
