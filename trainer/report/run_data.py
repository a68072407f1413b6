"""What a run folder says about the run, read for the report; parts that are not there yet are None or empty."""

import collections
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import Config, load_config
from trainer.errors import CheckpointError, RunError
from trainer.report.step_series import StepSeries, read_series
from trainer.training.checkpoint import choose
from trainer.training.run_files import RESULT, check_inside, parse_object, sound_environment, wrong_field
from trainer.training.run_folder import OURS
from twotower.untrusted import read_regular_text
from twotower.words import pluralize, shortened

MOST_DRAWN = 1 << 22  # values of conv1's weights
OF_A_PART = ("commit", "python", "torch", "system", "processor", "cores", "gpus", "kernels", "data")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run as its folder describes it.

    Attributes:
        folder: the run folder.
        steps: what the steps were, ascending.
        evaluations: rows of kind ``evaluation``, ascending, one a step; center crop only, as ten views score higher.
        result: result.json, or {} while the run has not ended.
        environment: environment.json, or {}.
        config: the resolved recipe, or None.
        config_text: its text.
        kernels: conv1 weights of the newest checkpoint by tower, each (maps, channels, k, k); {} without checkpoint.
        kernels_step: step of that checkpoint.
    """

    folder: Path
    steps: StepSeries
    evaluations: Sequence[dict[str, Any]]
    result: dict[str, Any]
    environment: dict[str, Any]
    config: Config | None
    config_text: str
    kernels: dict[str, NDArray[np.float32]]
    kernels_step: int

    @property
    def last_step(self) -> int:
        """Finished updates."""
        return int(self.result.get("step") or (self.steps.last.get("step", 0)))

    @property
    def accuracy(self) -> dict[str, Any]:
        """Held-out figures: the result's, else the last evaluation's, else {}. Keys top1, top5, num_samples, step."""
        if self.result.get("top1") is not None and self.result.get("num_samples"):
            return self.result
        return self.evaluations[-1] if self.evaluations else {}

    @property
    def images_per_s(self) -> float | None:
        """Median over the steps, as the result says or as counted here."""
        if self.result.get("images_per_s"):
            return float(self.result["images_per_s"])
        rates = self.steps.column("images_per_s")[:, 0]
        return float(np.nanmedian(rates)) if np.isfinite(rates).any() else None


def read_run(folder: Path) -> RunRecord:
    """Reads a run folder.

    Raises:
        RunError: there is no such folder, it holds no run, or one of its files is damaged.
    """
    try:
        if not folder.is_dir():
            raise RunError(f"no run folder at {folder}: make one with python -m trainer train --run {folder} ...")
        check_inside(folder, OURS)
        if not (folder / "metrics.jsonl").is_file():
            raise RunError(f"{folder} has no metrics.jsonl: it is not a run folder, or its training never started")
        return _read(folder)
    except OSError as error:
        raise RunError(f"{error.filename or folder} cannot be read: {error.strerror}") from None


def _read(folder: Path) -> RunRecord:
    steps, evaluations = read_series(folder)
    recipe = folder / "config.toml"
    kernels_step, kernels = _read_kernels(folder)
    return RunRecord(
        folder=folder,
        steps=steps,
        evaluations=evaluations,
        result=_read_result(folder / "result.json"),
        environment=sound_environment(_read_json(folder / "environment.json")),
        config=load_config(recipe) if recipe.is_file() else None,
        config_text=read_regular_text(recipe) if recipe.is_file() else "",
        kernels=kernels,
        kernels_step=kernels_step,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file."""
    if not os.path.lexists(path):
        return {}
    try:
        return parse_object(path)
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): remove it to have the report without it") from None


def _read_result(path: Path) -> dict[str, Any]:
    """result.json; as :func:`_read_json`, and every field is what it is to be."""
    found = _read_json(path)
    if wrong := wrong_field(found, RESULT):
        what = f"{wrong} is {shortened(found[wrong])}"
        raise RunError(f"{path} is damaged ({what}): remove it to have the report without it")
    return {name: value for name, value in found.items() if value is not None}


def _read_kernels(folder: Path) -> tuple[int, dict[str, NDArray[np.float32]]]:
    """Step and conv1 weights by tower of the newest checkpoint."""
    from safetensors import SafetensorError, safe_open

    found = choose(folder)
    if found is None:
        return 0, {}
    kernels = {}
    for name in sorted(found.record.files):
        path = found.folder / name
        try:
            with safe_open(path, "numpy") as tensors:
                kernels[path.stem.removeprefix("tower-")] = _conv1(tensors)
        except (SafetensorError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: conv1.weight cannot be drawn ({error})") from None
    return found.record.step, kernels


def _conv1(tensors: Any) -> NDArray[np.float32]:
    """conv1's weights out of an open file; raises ValueError where they are not of a first layer."""
    shape = tuple(tensors.get_slice("conv1.weight").get_shape())
    if len(shape) != 4 or shape[1] not in (1, 3) or shape[2] != shape[3] or not 0 < math.prod(shape) <= MOST_DRAWN:
        raise ValueError(f"its shape is {shape}")
    weight = tensors.get_tensor("conv1.weight").astype(np.float32)
    if not np.isfinite(weight).all():
        raise ValueError("it has values that are no numbers")
    return weight


def headline(run: RunRecord) -> list[tuple[str, str, str]]:
    """The large figures of the page: (what, figure, small print)."""
    accuracy, rows = run.accuracy, []
    if accuracy:
        number = int(accuracy["num_samples"])
        for name, key in (("top-1, held out", "top1"), ("top-5, held out", "top5")):
            if accuracy.get(key) is None:  # top-5 of fewer than six classes
                continue
            right = round(accuracy[key] * number)
            small = f"{right:,} of {pluralize(number, 'image')}"
            small += f"; 95 % interval {interval(right, number)}" if key == "top1" else ""
            rows.append((name, f"{100 * accuracy[key]:.2f} %", small))
    else:
        rows.append(("top-1, held out", "\u2013", "not evaluated yet"))
    if run.images_per_s:
        rows.append(("throughput, median", f"{run.images_per_s:,.0f}", "images/s"))
    epochs = run.result.get("epoch")
    finished = (f"{epochs:.4g} epoch" + ("" if epochs == 1 else "s")) if epochs else "finished so far"
    rows.append(("steps", f"{run.last_step:,}", finished))
    return rows + _wall_time(run)


def _wall_time(run: RunRecord) -> list[tuple[str, str, str]]:
    """Minutes of all parts of the run: as its result says, or its last row."""
    elapsed_s = max([run.result.get("elapsed_s") or 0.0, run.steps.last.get("elapsed_s", 0.0)])
    if not elapsed_s:
        return []
    minutes, starts = elapsed_s / 60, 1 + len(run.environment.get("resumed", ()))
    small = "minutes, evaluation included" + (f"; {starts} starts" if starts > 1 else "")
    return [("wall time", f"{minutes:.1f}" if minutes < 100 else f"{minutes:,.0f}", small)]


def interval(right: int, number: int) -> str:
    """Wilson's 95 % interval of a share, in percent."""
    z, share = 1.96, right / number
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number)) / (1 + z * z / number)
    return f"{100 * (middle - half):.1f} to {100 * (middle + half):.1f} %"


def facts(run: RunRecord, data: str) -> list[tuple[str, str]]:
    """Where and with what the run was made: (name, value), an empty value where it is not known.

    Args:
        run: the run.
        data: the data set in words; empty for the folder that the run notes.
    """
    found = run.environment
    gpus = collections.Counter(found.get("gpus") or [])
    devices = ", ".join(f"{number} \u00d7 {name}" for name, number in gpus.items()) or "no GPU"
    cores = f", {pluralize(found['cores'], 'core')}" if found.get("cores") else ""
    machine = "; ".join(filter(None, (f"{found.get('processor', 'unknown')}{cores}", devices, found.get("system"))))
    rows = [
        ("Machine", machine if found else "not recorded"),
        ("Commit", str(found.get("commit", ""))),
        ("Versions", ", ".join(f"{name} {found[name]}" for name in ("python", "torch") if found.get(name))),
        ("Data set", data or str(found.get("data", ""))),
        ("Started", str(found.get("started", ""))),
        ("Command", str(found.get("command", ""))),
    ]
    rows += [(f"Resumed at step {part.get('step', 0):,}", text) for part, text in _later_parts(found)]
    known = {"command", "started", "resumed", *OF_A_PART} - {"kernels"}
    others = {key: value for key, value in found.items() if key not in known and value is not None}
    return rows + [(key.replace("_", " ").capitalize(), str(value)) for key, value in others.items()]


def _later_parts(environment: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every later start of a run, with its time, its command, and what is other than before it."""
    before = environment
    for part in environment.get("resumed", ()):
        new = [f"{name} {part.get(name)}" for name in OF_A_PART if part.get(name) != before.get(name)]
        new += [f"{name} {old} \u2192 {now}" for name, (old, now) in part.get("changed", {}).items()]
        yield part, "; ".join([f"{part.get('started', '')}  {part.get('command', '')}", *new])
        before = part
