"""Weights out of a run and into one: merged safetensors, ONNX, and the import of such a safetensors file."""

import json
import os
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.manifest import Manifest, read_manifest, write_atomic
from trainer.config import LAYERS, TOWERS, Config, to_toml
from trainer.errors import ExportError, RunError
from trainer.model.weights import fill_towers, groups_of, merge_towers, testing_factor
from trainer.model.alexnet import AlexNet
from trainer.training import checkpoint
from trainer.training.evaluate import load_network
from trainer.training.fit import check_fits
from trainer.training.kept_data import compare_data, keep_data_set, kept_manifest
from trainer.training.metrics import describe_environment
from trainer.training.optimizer import PaperSGD
from trainer.training.run_folder import (
    CONFIG_NAME,
    DATA_SET_NAME,
    check_output,
    empty,
    is_begun,
    read_run_config,
)
from trainer.training.run_lock import hold_run
from trainer.training.start import check_writable

FORMAT = "twotower merged weights 1"
LAYOUT = (
    "tower a's maps before tower b's; groups=2 where groups says 2: (maps, inputs a tower, k, k); fc6 sees flatten(1) "
    "of the merged maps: a's maps row by row, then b's; normalization within each tower's half of the maps; "
    "in testing fc6's and fc7's outputs are multiplied by test_factor after the activation"
)


def export_run(run: Path, output: Path, *, data: Path | None = None, which: str = "newest") -> Path:
    """Writes a checkpoint's net.

    Args:
        run: run folder.
        output: ``FILE.safetensors`` or ``FILE.onnx``; replaced whole or not at all.
        data: data set, for class names in the file's metadata; None for the one that the run was trained on.
        which: see :func:`trainer.training.checkpoint.choose`.

    Raises:
        ExportError: another suffix, or the net cannot be written in this format.
        RunError: no run, or no checkpoint in it.
    """
    if output.suffix not in (".safetensors", ".onnx"):
        raise ExportError(f"--output {output}: expected a name that ends in .safetensors or .onnx")
    check_output("--output", output)
    config = read_run_config(run)
    manifest = kept_manifest(run)
    if data is not None:
        manifest = read_manifest(data)
        check_fits(config, manifest, data, splits=())
        compare_data(run, data, manifest)
    loaded = load_network(run, which=which)
    facts = _facts(config, str(loaded.step), manifest)
    merged = merge_towers(loaded.net)
    if output.suffix == ".onnx":
        from trainer.inference.onnx_graph import onnx_bytes

        content = onnx_bytes(config, merged, facts)
    else:
        content = save({name: tensor.contiguous() for name, tensor in merged.items()}, facts)
    try:
        write_atomic(output, content)
    except OSError as error:
        raise ExportError(f"{output} cannot be written: {error.strerror}") from None
    return output


def _facts(config: Config, step: str, manifest: Manifest | None) -> dict[str, str]:
    """The metadata of a file; texts only, as safetensors wants them."""
    data, model = config.data, config.model
    facts = {
        "format": FORMAT,
        "layout": LAYOUT,
        "groups": json.dumps({layer: groups_of(model, layer) for layer in LAYERS}),
        "towers": str(model.towers),
        "test_factor": str(testing_factor(model)),
        "input": (
            f"(N, {model.in_channels}, {model.image_px}, {model.image_px}) float32: pixels 0..255, mean '{data.mean}' "
            f"of the training set subtracted, normalize '{data.normalize}'"
        ),
        "step": step,
        "config": to_toml(config),
    }
    if manifest is not None:
        facts["classes"] = json.dumps([row.title for row in manifest.classes], ensure_ascii=False)
    return facts


def read_merged(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file.

    Raises:
        ExportError: there is none, or it is damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ExportError(f"no weights at {path}") from None
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} cannot be read as safetensors: {str(error).splitlines()[0]}") from None


def import_weights(weights: Path, config: Config, run: Path, data: Path | None = None) -> Path:
    """Makes a run folder with a checkpoint of step 0, to evaluate, to predict with, or to train on from.

    Args:
        weights: merged safetensors file.
        config: recipe whose net the weights fit.
        run: folder to make; must be new or empty.
        data: data set whose classes and statistics the run keeps; None: predicting needs one then.

    Returns:
        The checkpoint's folder.

    Raises:
        ExportError: the weights do not fit the recipe's net.
        RunError: the folder is not empty.
    """
    if is_begun(run):
        raise RunError(f"{run} holds a run: give another --run folder")
    if data is not None:
        check_fits(config, read_manifest(data), data, splits=())
    check_writable(run, 0)
    net = AlexNet(config.model, seed=config.train.seed)
    try:
        fill_towers(net, read_merged(weights))
    except ExportError as error:
        raise ExportError(f"{weights}: {error}") from None
    with hold_run(run):
        empty(run)
        try:
            return _write_run(run, config, net, weights, data)
        except OSError as error:
            empty(run)
            raise RunError(f"--run {run} cannot be written: {error.strerror or error}") from None


def _write_run(run: Path, config: Config, net: AlexNet, weights: Path, data: Path | None) -> Path:
    """The run folder, its record last."""
    if data is not None:
        keep_data_set(data, run / DATA_SET_NAME)
    command = ["python", "-m", "trainer", *sys.argv[1:]]
    environment = describe_environment(command) | {"imported from": os.fspath(weights)}
    write_atomic(run / "environment.json", (json.dumps(environment, indent=1) + "\n").encode())
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    checkpoint.save_towers(checkpoint.unfinished(run, 0), net, optimizer)
    towers = TOWERS[: config.model.towers]
    folder = checkpoint.commit(run, 0, config=config.fingerprint, loader=None, towers=towers)
    write_atomic(run / CONFIG_NAME, to_toml(config).encode())
    return folder
