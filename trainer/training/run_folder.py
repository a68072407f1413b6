"""The run folder: opened once, by one process, before any tower starts."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from pipeline.manifest import Manifest, write_atomic
from trainer.config import Config, load_config, to_toml
from trainer.errors import RecipeError, RunError
from trainer.training.checkpoint import latest_checkpoint
from trainer.training.metrics import describe_environment, read_metrics

CONFIG_NAME = "config.toml"
RESULT_NAME = "result.json"


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended; ``result.json``.

    Attributes:
        exit_reason: ``finished``, ``stopped`` (asked to by a signal) or ``failed``.
        reason: one sentence where it did not finish.
        step: finished updates.
        epoch: finished epochs, with fraction.
        top1: share of right images in the last evaluation, 0..1; None without one.
        top5: share with the label among the five likeliest; None without an evaluation.
        num_samples: images evaluated.
        elapsed_s: wall time of this process, s.
        images_per_s: median over the steps.
        processes: processes that held the towers.
        batch_size: images per step.
        ledger: what crossed between the towers in one training step.
    """

    exit_reason: str
    reason: str
    step: int
    epoch: float
    top1: float | None
    top5: float | None
    num_samples: int
    elapsed_s: float
    images_per_s: float
    processes: int
    batch_size: int
    ledger: list[dict[str, Any]]


def write_result(run: Path, result: Result) -> None:
    """Writes ``result.json``."""
    write_atomic(run / RESULT_NAME, (json.dumps(dataclasses.asdict(result), indent=1) + "\n").encode())


def open_run(run: Path, config: Config, data: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes a run folder, or takes up an old one.

    Args:
        run: the folder.
        config: the recipe.
        data: the data set's folder, noted in environment.json.
        resume: go on from the newest checkpoint, if there is one.
        overwrite: remove an old run first.

    Raises:
        RunError: the folder holds something else, or a run and neither ``resume`` nor ``overwrite`` is given, or the
            old run's recipe differs.
    """
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        if not (run / CONFIG_NAME).is_file():
            raise RunError(f"{run} holds something that is not a run (no {CONFIG_NAME}): give another --run folder")
        if overwrite:
            shutil.rmtree(run)
        elif not resume:
            raise RunError(f"{run} holds a run: continue it with --resume auto, or replace it with --overwrite")
        else:
            _check_same_recipe(run, config)
    run.mkdir(parents=True, exist_ok=True)
    (run / RESULT_NAME).unlink(missing_ok=True)
    if latest_checkpoint(run) is None:
        (run / "metrics.jsonl").unlink(missing_ok=True)
        shutil.rmtree(run / "tensorboard", ignore_errors=True)
    environment = describe_environment(["python", "-m", "trainer", *sys.argv[1:]]) | {"data": str(data)}
    write_atomic(run / "environment.json", (json.dumps(environment, indent=1) + "\n").encode())
    write_atomic(run / CONFIG_NAME, to_toml(config).encode())


def _check_same_recipe(run: Path, config: Config) -> None:
    """Raises RunError naming the first field in which the old run's recipe differs."""
    old = load_config(run / CONFIG_NAME)
    before, after = to_toml(old).splitlines(), to_toml(config).splitlines()
    for left, right in zip(before, after, strict=False):
        if left != right:
            raise RunError(
                f"{run} was trained with {left}, and now {right}: resume with the old value, or use another --run"
            )


def read_run_config(run: Path) -> Config:
    """The resolved recipe of a run.

    Raises:
        RunError: there is no run.
    """
    if not (run / CONFIG_NAME).is_file():
        raise RunError(f"no run at {run}: train one with python -m trainer train --run {run}")
    return load_config(run / CONFIG_NAME)


def check_fits(config: Config, manifest: Manifest, data: Path) -> None:
    """Checks that a data set is what a recipe's net can train on, before anything is started.

    Raises:
        RecipeError: naming the field and the value that would fit.
    """
    image, model = manifest.image, config.model
    if image.channels != model.in_channels:
        raise RecipeError(f"model.in_channels = {model.in_channels}, and the images in {data} have {image.channels}")
    if len(manifest.classes) != model.classes:
        raise RecipeError(f"model.classes = {model.classes}, and {data} has {len(manifest.classes)} classes")
    smallest = min(image.height_px or model.image_px, image.width_px or model.image_px)
    if smallest < model.image_px:
        raise RecipeError(
            f"model.image_px = {model.image_px}, and the images in {data} are {smallest} px: "
            f"prepare them with --resize {model.image_px} or more"
        )
    for split in ("train", config.train.evaluate_split):
        if split not in manifest.splits:
            raise RecipeError(f"{data} has no split {split!r}: it has {', '.join(manifest.splits)}")
    if manifest.splits["train"].num_samples < config.train.batch_size and config.data.last_batch == "drop":
        found = manifest.splits["train"].num_samples
        raise RecipeError(f"train.batch_size = {config.train.batch_size}, and {data} has only {found} training images")


def check_replicas(config: Config, replicas: int) -> None:
    """Checks that a recipe's batch can be shared, before anything is started.

    Raises:
        RecipeError: naming the field and what would do.
    """
    train = config.train
    pieces = replicas * train.accumulate
    if train.batch_size % pieces:
        raise RecipeError(
            f"train.batch_size = {train.batch_size} cannot be divided among {replicas} replicas x train.accumulate = "
            f"{train.accumulate}: use a multiple of {pieces}"
        )
    if replicas > 1 and config.data.last_batch == "partial":
        raise RecipeError(f"data.last_batch is 'partial': expected 'drop' with {replicas} replicas")
    if pieces > 1 and any("batch_norm" in names for names in config.model.post_ops):
        raise RecipeError(
            f"model.post_ops has batch_norm, whose statistics are those of a whole batch: {replicas} replicas x "
            f"train.accumulate = {train.accumulate} would each see a part; use one replica and train.accumulate = 1"
        )


def ensure_result(run: Path, status: int, *, processes: int = 2) -> None:
    """Writes a ``failed`` result where the towers ended without writing one (killed, for example)."""
    if status and not (run / RESULT_NAME).exists():
        rows = [row for row in read_metrics(run) if row["kind"] == "step"]
        reason = f"the towers ended with status {status}"
        last: dict[str, Any] = rows[-1] if rows else {"step": 0, "epoch": 0, "images_per_s": 0.0}
        write_result(
            run,
            Result(
                "failed",
                reason,
                last["step"],
                last["epoch"],
                None,
                None,
                0,
                0.0,
                last["images_per_s"],
                processes,
                0,
                [],
            ),
        )
