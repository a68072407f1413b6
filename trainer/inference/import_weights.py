"""A run out of weights: of ``export``'s file, whose recipe, classes and input it reads, or of another program's."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline.errors import DatasetError
from pipeline.manifest import MANIFEST_NAME, STATISTICS_NAME, from_json, read_manifest, write_atomic
from trainer.config import Config, load_config, to_toml
from trainer.errors import ExportError, RecipeError, RunError
from trainer.model.alexnet import AlexNet
from trainer.model.weight_files import WeightFile, read_weight_file
from trainer.model.weights import fill_towers
from trainer.training.fit import check_fits, check_resolved
from trainer.training.init_from import write_step_zero
from trainer.training.kept_data import keep_data_set
from trainer.training.metrics import describe_environment
from trainer.training.run_folder import CONFIG_NAME, DATA_SET_NAME, ENVIRONMENT_NAME, empty, is_begun, refuse_nested
from trainer.training.run_lock import hold_run, refuse_held
from trainer.training.start import check_writable


def import_weights(
    weights: Path,
    run: Path,
    *,
    config: Config | None = None,
    overrides: Sequence[str] = (),
    data: Path | None = None,
) -> Path:
    """Makes a run folder with a checkpoint of step 0, to evaluate, to predict with, or to train on from.

    Args:
        weights: a file of ``export``, or one that :mod:`trainer.model.weight_files` knows.
        run: folder to make; must be new or empty.
        config: recipe whose net the weights fit; None for the one in the file.
        overrides: ``section.field=value``, on the file's recipe.
        data: data set whose classes and statistics the run keeps; None for what the file has of one.

    Returns:
        The checkpoint's folder.

    Raises:
        ExportError: the weights do not fit the recipe's net, or there is no recipe.
        RunError: the folder is not empty.
    """
    refuse_nested(run)
    if is_begun(run):
        raise RunError(f"{run} holds a run: give another --run folder")
    refuse_held(run)
    check_writable(run, 0)
    manifest = None if data is None else read_manifest(data)
    source = read_weight_file(weights)
    config = _recipe(weights, source, config, overrides)
    if data is not None and manifest is not None:
        config = check_fits(config, manifest, data, splits=())
    else:
        check_resolved(config)
    size, needed = sum(tensor.nbytes for tensor in source.tensors.values()), config.model.count_weights()
    if 4 * needed > size:  # before memory is taken for such a net
        raise ExportError(f"{weights}: the recipe's net has {needed:,} weights, and the file {size:,} bytes of them")
    if data is None and "manifest" in source.facts:
        _statistics(weights, source)
    net = AlexNet(config.model, seed=config.train.seed)
    try:
        fill_towers(net, source.tensors)
    except ExportError as error:
        raise ExportError(f"{weights}: {error}") from None
    with hold_run(run):
        empty(run)
        try:
            return _write_run(run, config, net, weights, source, data)
        except OSError as error:
            empty(run)
            raise RunError(f"--run {run} cannot be written: {error.strerror or error}") from None


def _statistics(weights: Path, source: WeightFile) -> bytes:
    """The statistics that a file has of its data set, as that set's record in the file wants them.

    Raises:
        ExportError: the file has none, or others, or the record is none.
    """
    try:
        manifest = from_json(source.facts["manifest"])
        with safe_open(weights, "numpy") as file:
            content = file.get_tensor(STATISTICS_NAME).tobytes()
        if hashlib.sha256(content).hexdigest() != manifest.files[STATISTICS_NAME]["sha256"]:
            raise ValueError(f"its {STATISTICS_NAME} is not what its manifest says")
    except (DatasetError, SafetensorError, LookupError, ValueError, TypeError, OSError) as error:
        raise ExportError(
            f"{weights}: what it has of its data set is damaged ({error}): name the data set with --data DIR"
        ) from None
    return content


def _recipe(weights: Path, source: WeightFile, config: Config | None, overrides: Sequence[str]) -> Config:
    """The given recipe, or the file's."""
    if config is not None:
        return config
    if source.config is None:
        raise ExportError(f"{weights} ({source.kind}) has no recipe in it: name one with --config TOML")
    try:
        return load_config(None, overrides, text=to_toml(source.config))
    except RecipeError as error:
        raise RecipeError(f"{weights}: {error}") from None


def _write_run(run: Path, config: Config, net: AlexNet, weights: Path, source: WeightFile, data: Path | None) -> Path:
    """The run folder, its record last."""
    if data is not None:
        keep_data_set(data, run / DATA_SET_NAME)
    elif "manifest" in source.facts:
        content = _statistics(weights, source)
        write_atomic(run / DATA_SET_NAME / MANIFEST_NAME, source.facts["manifest"].encode())
        write_atomic(run / DATA_SET_NAME / STATISTICS_NAME, content)
    command = ["python", "-m", "trainer", *sys.argv[1:]]
    environment = describe_environment(command) | {"imported from": os.fspath(weights)}
    write_atomic(run / ENVIRONMENT_NAME, (json.dumps(environment, indent=1) + "\n").encode())
    folder = write_step_zero(run, config, net)
    write_atomic(run / CONFIG_NAME, to_toml(config).encode())
    return folder
