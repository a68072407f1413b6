"""A run's net as one file that stands alone: safetensors or ONNX, with its input, its classes and its recipe inside."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from pipeline.manifest import STATISTICS_NAME, Manifest, read_manifest, write_atomic
from trainer.config import LAYERS, Config, to_toml
from trainer.errors import ExportError, RunError
from trainer.inference.input_rule import InputRule, input_rule
from trainer.inference.program import net_program
from trainer.model.weights import groups_of, merge_towers, testing_factor
from trainer.training.evaluate import load_network
from trainer.training.fit import check_fits
from trainer.training.kept_data import compare_data, data_of, kept_manifest
from trainer.training.run_folder import check_output, read_run_config

FORMAT = "twotower net 2"
LAYOUT = (
    "tower a's maps before tower b's; groups=2 where groups says 2: (maps, inputs a tower, k, k); fc6 sees flatten(1) "
    "of the merged maps: a's maps row by row, then b's; normalization within each tower's half of the maps; "
    "in testing fc6's and fc7's outputs are multiplied by test_factor after the activation"
)


def export_run(
    run: Path, output: Path, *, data: Path | None = None, which: str = "newest", preprocessing: bool = True
) -> Path:
    """Writes a checkpoint's net.

    Args:
        run: run folder.
        output: ``FILE.safetensors`` or ``FILE.onnx``; replaced whole or not at all.
        data: data set whose preparation applies; None for the one that the run was trained on.
        which: see :func:`trainer.training.checkpoint.choose`.
        preprocessing: the file takes uint8 crops, and mean, deviation and layout are inside; without, it takes what the
            net sees: float32 (N, C, S, S).

    Raises:
        ExportError: another suffix, or the net cannot be written in this format.
        RunError: no run, no checkpoint in it, or it does not know what its input needs.
    """
    if output.suffix not in (".safetensors", ".onnx"):
        raise ExportError(f"--output {output}: expected a name that ends in .safetensors or .onnx")
    check_output("--output", output)
    config = read_run_config(run)
    folder, manifest, rule = _input_of(run, config, data, preprocessing)
    loaded = load_network(run, which=which)
    merged = merge_towers(loaded.net)
    facts = _facts(config, loaded.step, merged, manifest, rule)
    if output.suffix == ".onnx":
        from trainer.inference.onnx_graph import onnx_bytes

        content = onnx_bytes(config, merged, facts, rule)
    else:
        content = _safetensors(config, merged, facts, rule, folder)
    try:
        write_atomic(output, content)
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error.strerror}") from None
    return output


def _input_of(
    run: Path, config: Config, data: Path | None, preprocessing: bool
) -> tuple[Path | None, Manifest | None, InputRule | None]:
    """Where the statistics are, the record of the classes, and the rule of the input, as far as they are wanted.

    Raises:
        RunError: the run keeps none of it, and no data set is given.
    """
    if data is not None:
        manifest = read_manifest(data)
        check_fits(config, manifest, data, splits=())
        statistics = compare_data(run, data, manifest)
        return statistics, manifest, input_rule(data, config, statistics) if preprocessing else None
    if not preprocessing:
        kept = kept_manifest(run)
        return data_of(run) if kept else None, kept, None
    try:
        folder = data_of(run)
    except RunError as error:
        raise RunError(f"{error}, or export without the input's part (--no-preprocessing)") from None
    return folder, read_manifest(folder), input_rule(folder, config)


def _facts(
    config: Config, step: int, merged: dict[str, Tensor], manifest: Manifest | None, rule: InputRule | None
) -> dict[str, str]:
    """The metadata of a file; texts only, as safetensors and ONNX want them."""
    data, model = config.data, config.model
    shape = f"(N, {model.in_channels}, {model.image_px}, {model.image_px})"
    if rule is not None:
        shape = f"(N, {model.image_px}, {model.image_px}, {model.in_channels})"
    ready = f"float32 pixels of 0..255, mean '{data.mean}' of the training set subtracted, normalize '{data.normalize}'"
    facts = {
        "format": FORMAT,
        "layout": LAYOUT,
        "groups": json.dumps({layer: groups_of(model, layer) for layer in LAYERS}),
        "towers": str(model.towers),
        "test_factor": str(testing_factor(model)),
        "preprocessing": "inside" if rule else "outside",
        "input": f"{shape} " + ("uint8 pixels of 0..255; what the net needs is done inside" if rule else ready),
        "step": str(step),
        "config": to_toml(config),
        "recipe_fingerprint": hashlib.sha256(to_toml(config).encode()).hexdigest(),
        "fingerprint": _fingerprint(merged),
    }
    if rule is not None:
        facts |= rule.facts()
    if manifest is not None:
        facts |= {
            "classes": json.dumps([row.title for row in manifest.classes], ensure_ascii=False),
            "class_names": json.dumps([row.name for row in manifest.classes], ensure_ascii=False),
            "data_set_fingerprint": manifest.fingerprint,
        }
    return facts


def _fingerprint(merged: dict[str, Tensor]) -> str:
    """sha256 of the weights, by name: equal for the same net, whatever file it is in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(merged.items()):
        digest.update(name.encode() + b"\0" + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _safetensors(
    config: Config, merged: dict[str, Tensor], facts: dict[str, str], rule: InputRule | None, folder: Path | None
) -> bytes:
    """Weights, what the input needs, and the data set's record, so that ``import`` makes a whole run of the file."""
    tensors = {name: tensor.contiguous() for name, tensor in merged.items()}
    facts = facts | {"program": json.dumps(net_program(config.model, rule))}
    if rule is not None:
        tensors |= {"input.mean": torch.from_numpy(rule.mean), "input.std": torch.from_numpy(rule.std)}
    if folder is not None:
        content = (folder / STATISTICS_NAME).read_bytes()
        tensors[STATISTICS_NAME] = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
        facts["manifest"] = read_manifest(folder).to_json()
    return save(tensors, facts)
