"""Training that begins with weights learned before: what of them is taken, what is changed to fit, what is left.

The weights become the run's checkpoint of step 0, so two processes, torchrun and a resumed run begin alike.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.manifest import Manifest
from trainer.config import LAYERS, TOWERS, Config, LayerOverride, to_toml
from trainer.errors import RecipeError, RunError
from trainer.training.fit import resolve
from trainer.training.kept_data import kept_manifest
from trainer.training.run_folder import read_run_config

if TYPE_CHECKING:  # options are checked without torch
    import numpy as np
    from torch import Tensor

    from trainer.model.alexnet import AlexNet
    from trainer.model.weight_files import WeightFile

DECIDE = ("post_ops", "pool_px", "pool_stride", "pool_ceil", "crossings", "activation", "lrn")  # what weights mean


@dataclasses.dataclass(frozen=True)
class Initial:
    """The weights that a run begins with.

    Attributes:
        net: the whole net, filled.
        taken: layers that are as they were in the source, to the bit.
        changed: what was taken and changed so that it does here what it did there, in words.
        left: layers that begin new, and why.
        notes: in what the two recipes differ besides.
        source: where the weights are from.
    """

    net: "AlexNet"
    taken: tuple[str, ...]
    changed: tuple[str, ...]
    left: tuple[str, ...]
    notes: tuple[str, ...]
    source: str

    def lines(self) -> list[str]:
        """For people."""
        rows = [("taken", ", ".join(self.taken)), ("changed", "; ".join(self.changed)), ("new", "; ".join(self.left))]
        rows += [("differs", "; ".join(self.notes))]
        return [f"begins with {self.source}", *(f"  {name}: {text}" for name, text in rows if text)]


def freeze(config: Config, layers: Sequence[str]) -> Config:
    """The recipe with layers that never change: rates of 0 from the first epoch on.

    Raises:
        RecipeError: there is no such layer.
    """
    for layer in layers:
        if layer not in LAYERS:
            raise RecipeError(f"--freeze {layer}: expected layers out of {', '.join(LAYERS)}, separated by commas")
    others = tuple(own for own in config.optimizer.layer_overrides if own.layer not in layers)
    frozen = tuple(LayerOverride(layer, 0.0, 0.0, 0.0) for layer in LAYERS if layer in layers)
    optimizer = dataclasses.replace(config.optimizer, layer_overrides=(*frozen, *others))
    return dataclasses.replace(config, optimizer=optimizer)


def frozen_layers(config: Config) -> tuple[str, ...]:
    """Layers that a recipe never changes."""
    own = config.optimizer.layer_overrides
    return tuple(row.layer for row in own if row.epoch == 0 and row.learning_rate == 0 and row.bias_learning_rate == 0)


def read_source(path: Path) -> "WeightFile":
    """The weights of a run's newest checkpoint, or of a file.

    Raises:
        TrainerError: there are none, or they cannot be read.
    """
    from trainer.model.weight_files import WeightFile, read_weight_file, unit_of
    from trainer.model.weights import merge_towers
    from trainer.training.evaluate import load_network

    if not path.is_dir():
        return read_weight_file(path)
    config, manifest = read_run_config(path), kept_manifest(path)
    classes = tuple(record.name for record in manifest.classes) if manifest else None
    return WeightFile(merge_towers(load_network(path).net), "run", unit_of(config), config, classes)


def initial_weights(config: Config, path: Path, manifest: Manifest, std: "np.ndarray", *, new_head: bool) -> Initial:
    """Fills a recipe's net with what fits of a run's or a file's weights.

    Args:
        config: the recipe.
        path: run folder or file.
        manifest: of the data set to be trained on.
        std: (C,) standard deviation of its pixels, gray levels: what its input is or would be divided by.
        new_head: fc8 begins new.

    Raises:
        TrainerError: nothing fits, or fc8 has other classes and ``new_head`` is not given.
    """
    from trainer.model.alexnet import AlexNet, layer_of

    source, config = read_source(path), resolve(config, manifest)
    net = AlexNet(config.model, seed=config.train.seed)
    target = net.state_dict()
    if not new_head:
        _check_head(path, source, target["fc8.weight"].shape, manifest)
    fitted, why = _fit_shapes(source.tensors, target, new_head=new_head)
    if not fitted:
        raise RunError(f"--init-from {path}: nothing in it fits this recipe's net: {'; '.join(why.values())}")
    changed = _rescale(source, config, fitted, std)
    for name, tensor in fitted.items():
        target[name].copy_(tensor)
    exact = {name for name in fitted if name in source.tensors and fitted[name] is source.tensors[name]}
    expanded = {name for name in set(fitted) - exact if source.tensors[name].shape != fitted[name].shape}
    changed += [f"{name}: two groups as one dense layer" for name in sorted(expanded)]
    whole = [layer for layer in LAYERS if all(n in exact for n in target if layer_of(n) == layer)]
    return Initial(
        net,
        tuple(whole),
        (*source.converted, *changed),
        tuple(why.values()),
        tuple(_differences(source.config, config)),
        f"{path} ({source.kind})",
    )


def _check_head(path: Path, source: "WeightFile", shape: Sequence[int], manifest: Manifest) -> None:
    """Refuses a head for other classes.

    Raises:
        RunError: it is one; says in what it differs.
    """
    head, fix = source.tensors.get("fc8.weight"), "add --new-head to begin fc8 anew"
    if head is not None and head.shape[0] != shape[0]:
        raise RunError(f"--init-from {path}: its fc8 has {head.shape[0]} classes, and the data set {shape[0]}: {fix}")
    names = [record.name for record in manifest.classes]
    for label, (theirs, ours) in enumerate(zip(source.classes or (), names, strict=False)):
        if theirs != ours:
            raise RunError(f"--init-from {path}: its class {label} is {theirs!r}, and the data set's {ours!r}: {fix}")


def _fit_shapes(
    tensors: "Mapping[str, Tensor]", target: "Mapping[str, Tensor]", *, new_head: bool
) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """What fits, by name, and why the rest does not, by layer."""
    from trainer.model.alexnet import layer_of

    fitted, why = {}, {}
    for name, wanted in target.items():
        layer, found = layer_of(name), tensors.get(name)
        if new_head and layer == "fc8":
            why[layer] = f"fc8 (new head, {wanted.shape[0]} classes)"
        elif found is None:
            why.setdefault(layer, f"{layer} (the source has no {name})")
        elif found.shape == wanted.shape:
            fitted[name] = found
        elif _is_grouped(found, wanted):
            fitted[name] = _dense(found)
        else:
            why.setdefault(layer, f"{layer} ({name} is {tuple(found.shape)} there, {tuple(wanted.shape)} here)")
    whole = {name: tensor for name, tensor in fitted.items() if layer_of(name) not in why}
    return whole, why


def _is_grouped(found: "Tensor", wanted: "Tensor") -> bool:
    """Whether a weight is the two-group form of a dense one."""
    return (
        found.dim() > 1
        and found.dim() == wanted.dim()
        and found.shape[0] == wanted.shape[0]
        and 2 * found.shape[1] == wanted.shape[1]
        and found.shape[2:] == wanted.shape[2:]
    )


def _dense(grouped: "Tensor") -> "Tensor":
    """(outputs, inputs / 2, ...) of two groups as (outputs, inputs, ...) with zeros where a group does not look."""
    import torch

    first, second = grouped.chunk(2)
    return torch.cat([torch.cat([first, first * 0], dim=1), torch.cat([second * 0, second], dim=1)])


def _rescale(source: "WeightFile", config: Config, fitted: "dict[str, Tensor]", std: "np.ndarray") -> list[str]:
    """Changes weights whose inputs have another scale here, in place; says which."""
    import torch

    from trainer.model.weight_files import LEVELS, unit_of
    from trainer.model.weights import testing_factor

    changed = []
    if source.unit != unit_of(config) and "conv1.weight" in fitted and len(std) == fitted["conv1.weight"].shape[1]:
        deviation = torch.from_numpy(std.astype("float32"))[None, :, None, None]
        weight = fitted["conv1.weight"]
        fitted["conv1.weight"] = weight * deviation if source.unit == LEVELS else weight / deviation
        turned = "to deviations" if source.unit == LEVELS else "to gray levels of 0..255"
        changed.append(f"conv1.weight: from inputs of another unit {turned}")
    before = testing_factor(source.config.model) if source.config else 0.5 if source.kind == "2012" else 1.0
    ratio = before / testing_factor(config.model)
    for name in ("fc7.weight", "fc8.weight"):
        if ratio != 1 and name in fitted:
            fitted[name] = fitted[name] * ratio
            changed.append(f"{name}: times {ratio:g}, as its inputs were dropped in another way")
    return changed


def _differences(theirs: Config | None, ours: Config) -> list[str]:
    """Fields of the net, and of its input, in which two recipes differ though the weights may fit."""
    if theirs is None:
        return []
    pairs = [(f"model.{name}", getattr(theirs.model, name), getattr(ours.model, name)) for name in DECIDE]
    pairs += [(f"data.{name}", getattr(theirs.data, name), getattr(ours.data, name)) for name in ("mean", "normalize")]
    return [f"{name}" for name, before, after in pairs if before != after]


def write_step_zero(folder: Path, config: Config, net: "AlexNet") -> Path:
    """Writes a net as the checkpoint of step 0 of a run folder, or of a start that is being prepared."""
    from trainer.training import checkpoint
    from trainer.training.optimizer import PaperSGD

    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    checkpoint.save_towers(checkpoint.unfinished(folder, 0), net, optimizer)
    towers = TOWERS[: config.model.towers]
    return checkpoint.commit(folder, 0, config=to_toml(config), loader=None, towers=towers)
