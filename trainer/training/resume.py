"""Going on with a run: what of it may change, and how it was started."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from pipeline.loader.open_split import OpenSplit, describe_keys
from pipeline.loader.staging import is_url
from pipeline.manifest import Manifest
from trainer.config import Config, from_toml
from trainer.errors import RecipeError, RunError
from trainer.training import run_folder
from trainer.training.checkpoint import Choice
from trainer.training.kept_data import kept_manifest
from trainer.training.run_files import is_count, is_text
from twotower.addresses import masked
from twotower.fields import MAY_CHANGE
from twotower.words import cut, pluralize

MOST_REPLICAS = 1024
OPTIONS = ("processes", "replicas", "device", "skip_list")  # of a start, in environment.json


@dataclasses.dataclass(frozen=True)
class Change:
    """A field of the recipe that a start changes.

    Attributes:
        name: ``section.field``.
        before, after: its values.
        may: whether it may change while a run is under way.
    """

    name: str
    before: Any
    after: Any
    may: bool

    def __str__(self) -> str:
        return f"{self.name} = {_shown(self.after)} instead of {self.name} = {_shown(self.before)}"


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def changes_of(before: Config, after: Config) -> tuple[Change, ...]:
    """Every field in which two recipes differ, in the recipe's order; each field's metadata says whether it may."""
    return tuple(_compare(before, after, ""))


def _compare(before: Any, after: Any, where: str) -> list[Change]:
    found: list[Change] = []
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if dataclasses.is_dataclass(old):
            found += _compare(old, new, f"{where}{field.name}.")
        elif old != new:
            found.append(Change(f"{where}{field.name}", old, new, bool(field.metadata.get(MAY_CHANGE))))
    return found


def allowed_changes(run: Path, before: Config, after: Config) -> tuple[Change, ...]:
    """The fields that differ, all of which may.

    Raises:
        RunError: one may not; names it, and both values.
    """
    changes = changes_of(before, after)
    for change in changes:
        if not change.may:
            raise RunError(
                f"{change}, which {run} was trained with: the rest of the run would be another one; leave it as it "
                "was, or give another --run folder"
            )
        evaluation = change.name.startswith("train.evaluate_")
        if evaluation and after.optimizer.schedule == "plateau":
            raise RunError(
                f"{change}, which {run} was trained with: optimizer.schedule = 'plateau' looks at the evaluations, so "
                "leave it as it was"
            )
    return changes


def check_edited(run: Path, config: Config, choice: Choice) -> None:
    """Checks that RUN/config.toml is still the recipe of a checkpoint, in the fields that may not change.

    Args:
        run: run folder.
        config: what its config.toml says.
        choice: the checkpoint.

    Raises:
        RunError: it was edited; names the field, and both values.
    """
    try:
        made_with = from_toml(choice.record.config)
    except RecipeError:  # another version's: nothing to compare
        return
    for change in changes_of(made_with, config):
        if not change.may:
            raise RunError(
                f"{run / run_folder.CONFIG_NAME} was edited: {change}, which {choice.folder.name} was trained with; "
                "put that back"
            )


def depends_on_epochs(config: Config) -> str:
    """The setting that places its drops by the number of epochs; empty where none does."""
    if config.optimizer.schedule == "log_thirds":
        return "optimizer.schedule = 'log_thirds'"
    return "optimizer.bias_schedule = 'halfway'" if config.optimizer.bias_schedule == "halfway" else ""


def check_data_set(
    run: Path, data: str, manifest: Manifest, opened: OpenSplit, choice: Choice | None
) -> tuple[str, ...]:
    """Checks that a run goes on with the data set that it began with.

    Args:
        run: run folder.
        data: where it is, as environment.json would note it.
        manifest: its record.
        opened: its training split, without the samples of the skip list.
        choice: the checkpoint to go on from.

    Returns:
        A note where the data set has moved.

    Raises:
        RunError: it is another one, or the skip list is.
    """
    loader = (choice.record.loader if choice else None) or {}
    kept, noted = kept_manifest(run), newest_start(run).get("data")
    known = kept.fingerprint if kept is not None else loader.get("data set")
    if known not in (None, manifest.fingerprint):
        where = f", the one at {noted}" if noted not in (None, data) else ""
        raise RunError(
            f"--data {data} is not the data set that {run} was trained on{where}: go on with that one (it may have "
            "moved), or give another --run folder"
        )
    skipped = describe_keys(opened.skipped)
    if loader.get("skipped keys", skipped) != skipped:
        raise RunError(
            f"--skip-list: it leaves {pluralize(len(opened.skipped), 'training sample')} out ({skipped}), and {run} "
            f"was trained with {cut(str(loader['skipped keys']))} left out: go on with the same list"
        )
    return (f"{run}: its data set has moved from {noted} to {data}",) if noted not in (None, data) else ()


def newest_start(run: Path) -> dict[str, Any]:
    """What environment.json notes of the newest start: command, data, processes; {} where it says nothing."""
    environment = run_folder.read_environment(run)
    later = environment.get("resumed")
    return environment | (later[-1] if isinstance(later, list) and later and isinstance(later[-1], dict) else {})


def noted_options(run: Path) -> dict[str, Any]:
    """The options that the newest start noted, by name; without those that are none (the file was edited by hand)."""
    noted = newest_start(run)
    valid = {
        "processes": noted.get("processes") in (1, 2),
        "replicas": is_count(noted.get("replicas")) and 0 < noted["replicas"] <= MOST_REPLICAS,
        "device": is_text(noted.get("device")),
        "skip_list": is_text(noted.get("skip_list")) and Path(noted["skip_list"]).is_file(),
    }
    found = {name: noted[name] for name in OPTIONS if valid[name]}
    return found | ({"skip_list": Path(found["skip_list"])} if "skip_list" in found else {})


def resume_command(run: Path, *more: str) -> str:
    """The command that goes on with a run, to be pasted into a shell."""
    return shlex.join(["python", "-m", "trainer", "train", "--resume", str(run), *more])


def noted_data(run: Path) -> Path:
    """Where a run's data set is, as its newest start noted it.

    Raises:
        RunError: the run does not say, or nothing is there any more.
    """
    noted = newest_start(run).get("data")
    if not is_text(noted) or not noted:
        raise RunError(f"{run} does not say which data set it was trained on: name it with --data DIR")
    if is_url(noted):
        raise RunError(
            f"{run} was trained on the data set at {masked(noted)}, and no address is fetched because a run names it: "
            "say --data with it, if you trust it"
        )
    if not Path(noted).exists():
        raise RunError(f"{run} was trained on the data set at {noted}, which is gone: say with --data DIR where it is")
    return Path(noted)
