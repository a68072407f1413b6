"""EXPERIMENT/: what is in the folder of an experiment, and what two starts of it must have in common.

::

    experiment.json         experiment, recipe, data set: a second start must have the same
    recipes/VARIANT.toml    the resolved recipe of each variant
    runs/VARIANT/seed-N/    an ordinary RUN folder each
    logs/VARIANT-seed-N.log what the training command said
    measured/               what was measured of a run besides its accuracy
    results.jsonl, .csv     a row a run; no times, so the same runs give the same bytes
    summary.json, table.md, report.html
"""

import contextlib
import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.manifest import write_atomic
from trainer.config import Config, to_toml
from trainer.errors import RunError
from trainer.experiments.variants import Experiment
from trainer.training import run_folder
from twotower import locks

RECORD_NAME = "experiment.json"
LOCK_NAME = ".lock"
STOP_NAME = ".stop"


@dataclasses.dataclass(frozen=True)
class RunTask:
    """One run of an experiment.

    Attributes:
        variant: its name.
        seed: train.seed.
        config: the variant's recipe, with the data set's own numbers and this seed.
        folder: the experiment's, absolute.
        processes: 1 or 2.
        four_layers: as of its variant.
    """

    variant: str
    seed: int
    config: Config
    folder: Path
    processes: int
    four_layers: bool = False

    @property
    def name(self) -> str:
        """For people, logs and measured files."""
        return f"{self.variant}-seed-{self.seed}"

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "runs" / self.variant / f"seed-{self.seed}"

    @property
    def recipe(self) -> Path:
        """The variant's recipe."""
        return self.folder / "recipes" / f"{self.variant}.toml"

    @property
    def log(self) -> Path:
        """What the training command said."""
        return self.folder / "logs" / f"{self.name}.log"

    @property
    def measured(self) -> Path:
        """What was measured besides, as arrays."""
        return self.folder / "measured" / f"{self.name}.npz"

    def command(self, data: str, *, threads: int, device: str | None) -> list[str]:
        """The training command; given again, it goes on where the run is, or finds it finished."""
        words = ["python", "-m", *(["trainer.experiments.four_layers"] if self.four_layers else ["trainer", "train"])]
        words += ["--config", str(self.recipe), "--data", data, "--run", str(self.run)]
        words += [] if self.four_layers else ["--processes", str(self.processes), "--resume", "auto"]
        words += ["--set", f"train.seed={self.seed}", "--set", f"train.threads={threads}"]
        return words + (["--device", device] if device else [])


@dataclasses.dataclass(frozen=True)
class Record:
    """What every start of an experiment must have in common.

    Attributes:
        experiment: its name.
        recipe: the resolved recipe as TOML.
        data: the data set's folder or URL, without what opens it.
        fingerprint: of the data set.
    """

    experiment: str
    recipe: str
    data: str
    fingerprint: str


def check_folder(folder: Path, record: Record) -> bool:
    """Refuses a folder that is not this experiment's; looks only.

    Returns:
        Whether the experiment has been started there before.

    Raises:
        RunError: it holds something else, or an experiment on another recipe or data set.
    """
    try:
        run_folder.refuse_nested(folder)
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        names = set()
    except (OSError, RunError) as error:
        text = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"--run {folder}: ")
        raise RunError(f"--output {folder}: {text}") from None
    if RECORD_NAME not in names:
        others = sorted(name for name in names - {LOCK_NAME, "lost+found"} if not name.endswith(".tmp"))
        if others:
            raise RunError(
                f"--output {folder} holds something that is no experiment ({', '.join(others[:3])}): give another"
            )
        if why := run_folder.why_not_writable(folder):
            raise RunError(f"--output {folder} cannot be written: {why}")
        return False
    before = _read_record(folder / RECORD_NAME)
    if before.experiment != record.experiment:
        raise RunError(
            f"--output {folder} holds experiment {before.experiment}: give another folder for {record.experiment}"
        )
    if before.fingerprint != record.fingerprint:
        raise RunError(
            f"--output {folder} was begun on another data set ({before.data}): give that one, or another folder"
        )
    if before.recipe != record.recipe:
        raise RunError(
            f"--output {folder} was begun with another recipe ({_first_change(before, record)}): give another folder"
        )
    return True


def _read_record(path: Path) -> Record:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Record(**{field.name: str(found[field.name]) for field in dataclasses.fields(Record)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}): give another --output folder") from None


def _first_change(before: Record, now: Record) -> str:
    lines = difflib.ndiff(before.recipe.splitlines(), now.recipe.splitlines())
    changed = [line[2:] for line in lines if line[:1] in "-+"]
    return ", then ".join(changed[:2])


def begin(
    folder: Path,
    record: Record,
    recipes: Mapping[str, Config],
    rooms: Sequence[str] = ("runs", "logs", "measured"),
) -> None:
    """Makes the folders ``rooms``, and writes the record and the recipes by name; the caller holds the lock.

    Raises:
        RunError: they cannot be written.
    """
    try:
        for name in (*rooms, "recipes"):
            (folder / name).mkdir(exist_ok=True)
        for name, config in recipes.items():
            write_atomic(folder / "recipes" / f"{name}.toml", to_toml(config).encode())
        write_atomic(folder / RECORD_NAME, (json.dumps(dataclasses.asdict(record), indent=1) + "\n").encode())
        (folder / STOP_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"--output {folder} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """One writer a folder, as long as this lasts.

    Raises:
        RunError: there is one already, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = locks.hold(folder / LOCK_NAME)
    except OSError as error:
        if locks.has_no_locks(error):
            yield  # each run has a lock of its own, which does without
            return
        raise RunError(f"--output {folder} cannot be written: {error.strerror}") from None
    if handle is None:
        raise RunError(f"--output {folder}: another process runs this experiment; wait for its end, or stop it")
    try:
        yield
    finally:
        (folder / LOCK_NAME).unlink(missing_ok=True)
        os.close(handle)


def make_tasks(
    folder: Path, experiment: Experiment, configs: dict[str, Config], seeds: Sequence[int], processes: int
) -> list[RunTask]:
    """Every run, seed by seed: an experiment that is stopped early has all variants of the seeds that it has."""
    return [
        RunTask(
            variant.name,
            seed,
            _with_seed(configs[variant.name], seed),
            folder.absolute(),
            1 if variant.four_layers or configs[variant.name].model.towers == 1 else variant.processes or processes,
            variant.four_layers,
        )
        for seed in seeds
        for variant in experiment.variants
    ]


def _with_seed(config: Config, seed: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


def is_finished(task: RunTask) -> bool:
    """Whether a run has come to its end."""
    return run_folder.read_result(task.run).get("exit_reason") == "finished"


Row = dict[str, Any]
