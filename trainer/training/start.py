"""The start of a run: all that can be refused is refused first, and a run is changed only once its towers are ready.

1. :func:`check_start` looks at everything and writes nothing.
2. :func:`prepare_start`, under the lock, puts what is new into ``RUN/.start``.
3. :func:`commit_start` is called where the towers have found each other and are about to do their first step: it
   removes what is replaced and moves the new files to their places. A start that fails or is killed before leaves the
   run as it was; what it left in ``RUN/.start`` nobody reads, and the next start removes it.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from pipeline.loader.open_split import OpenSplit, check_files, open_split, read_statistics
from pipeline.loader.staging import is_url
from pipeline.manifest import read_manifest, write_atomic
from trainer.config import Config, load_config, to_toml
from trainer.errors import RunError
from trainer.precision import keep_precision
from trainer.training import checkpoint, fit, run_folder
from trainer.training.checkpoint import Choice
from trainer.training.history import read_elapsed_s
from trainer.training.init_from import Initial, write_step_zero
from trainer.training.kept_data import keep_data_set
from trainer.training.metrics import describe_environment
from trainer.training.resume import Change, allowed_changes, check_data_set, check_edited, depends_on_epochs
from trainer.training.run_files import parse_object
from twotower.addresses import masked
from twotower.typed import build as build_typed
from twotower.words import pluralize

RECORD = "start.json"


@dataclasses.dataclass(frozen=True)
class Start:
    """A start that nothing speaks against.

    Attributes:
        run: run folder.
        config: the recipe, with what this start changes of it.
        data: data set folder.
        source: the folder or URL that it came from.
        begun: there is a run already.
        replaces: it is removed.
        choice: the checkpoint to go on from, or None: from the beginning, with new weights.
        changes: fields of the recipe that differ from the old run's, all of which may.
        finished: the run has come to its end, and there is nothing to do.
        notes: lines for the user.
    """

    run: Path
    config: Config
    data: Path
    source: str
    begun: bool
    replaces: bool
    choice: Choice | None
    changes: tuple[Change, ...]
    finished: bool
    notes: tuple[str, ...]

    @property
    def step(self) -> int:
        """Updates that are done already."""
        return self.choice.record.step if self.choice else 0


def check_start(
    run: Path,
    config: Config,
    data: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    skip_list: Path | None = None,
    source: Path | None = None,
    quiet: bool = False,
) -> Start:
    """Checks whether a run can be started; looks only, at the recipe, the data set, the old run and the disk.

    Args:
        run: the run folder, or where it will be.
        config: the recipe.
        data: data set folder.
        resume: go on with the run that is there, if there is one.
        overwrite: replace the run that is there, if there is one.
        skip_list: keys of samples to leave out.
        source: where the data set came from, noted in environment.json; None for ``data`` itself.
        quiet: another process of the run does what one is enough for: it looks at all files of the data set, and says
            which damaged checkpoints are passed over.

    Raises:
        TrainerError, PipelineError: it cannot; says why.
    """
    manifest = read_manifest(data)
    config = fit.check_fits(config, manifest, data, extend=not resume)
    opened = open_split(data, "train", skip_list=skip_list)
    if not quiet:
        check_files(opened)
        if config.train.evaluate_split != "train":
            check_files(open_split(data, config.train.evaluate_split))
    read_statistics(data, manifest)
    run_folder.refuse_nested(run)
    noted = masked(str(source)) if source is not None and is_url(source) else str(data.absolute())
    begun = run_folder.is_begun(run)
    told = fit.notes(config, manifest, opened.num_samples)
    if not begun or overwrite:
        return Start(run, config, data, noted, begun, begun, None, (), finished=False, notes=tuple(told))
    if not resume:
        raise RunError(f"{run} holds a run: continue it with --resume auto, or replace it with --overwrite")
    before = run_folder.read_run_config(run)
    config = keep_precision(config, before)
    changes = allowed_changes(run, before, config)
    choice = checkpoint.choose(run, quiet=quiet)
    if choice:
        checkpoint.check_holds(choice, config)
        check_edited(run, before, choice)
    notes = [
        *told,
        *(f"{run}: {change}" for change in changes),
        *check_data_set(run, noted, manifest, opened, choice),
    ]
    drops = depends_on_epochs(config)
    if drops and any(change.name == "train.epochs" for change in changes):
        notes.append(f"{drops} places its drops by train.epochs; the steps that are done keep their rates")
    finished = _is_finished(run, config, opened, choice)
    return Start(run, config, data, noted, True, False, choice, changes, finished, tuple(notes))


def _is_finished(run: Path, config: Config, opened: OpenSplit, choice: Choice | None) -> bool:
    """Whether a run has come to the end that the recipe says.

    Raises:
        RunError: it is beyond that.
    """
    steps = config.train.epochs * steps_per_epoch(config, opened.num_samples)
    step = choice.record.step if choice else 0
    if step > steps:
        raise RunError(
            f"train.epochs = {config.train.epochs} is {pluralize(steps, 'step')}, and {run} has done {step}: "
            f"expected more epochs"
        )
    return step == steps and run_folder.read_result(run).get("exit_reason") == "finished"


def steps_per_epoch(config: Config, num_samples: int) -> int:
    """Batches of the training split; a partial one counts where the recipe trains on it."""
    size = config.train.batch_size
    return -(-num_samples // size) if config.data.last_batch == "partial" else num_samples // size


def checkpoints_at_once(start: Start) -> int:
    """Checkpoints that need room before one can be removed again: the one under way, and in a new run the first."""
    train = start.config.train
    only_one = not train.checkpoint_every_steps and train.epochs <= train.checkpoint_every_epochs
    return 1 if start.choice or only_one else 2


def check_writable(run: Path, needed_bytes: int, *, replaces: bool = False) -> None:
    """Refuses a run folder that cannot be written, or whose disk is too full for a checkpoint.

    Args:
        run: the run folder, or where it will be.
        needed_bytes: what has to fit at once.
        replaces: what the old run takes will be free.

    Raises:
        RunError: it is.
    """
    for place in (run, run / checkpoint.CHECKPOINTS_NAME):
        if why := run_folder.why_not_writable(place):
            raise RunError(f"--run {run} cannot be written: {why}")
    folder = next(place for place in (run, *run.absolute().parents) if run_folder.is_folder(place))
    free = shutil.disk_usage(folder).free + (_size_of(run) if replaces else 0)
    if free < needed_bytes:
        raise RunError(
            f"--run {run}: {free / 2**20:,.1f} MiB are free there, and its checkpoints need "
            f"{needed_bytes / 2**20:,.1f} MiB at once: make room, or give a folder on another disk"
        )


def _size_of(run: Path) -> int:
    return sum(path.stat().st_size for path in (run / checkpoint.CHECKPOINTS_NAME).rglob("*") if path.is_file())


def prepare_start(start: Start, options: dict[str, Any], initial: Initial | None = None) -> None:
    """Writes what the run will have new into ``RUN/.start``; the caller holds the lock.

    Args:
        start: as :func:`check_start` found it.
        options: how the towers are started, recorded in environment.json: processes, replicas, device, skip_list.
        initial: weights to begin with; None for new ones.

    Raises:
        RunError: it cannot be written.
    """
    discard_start(start.run)
    folder, kept = start.run / run_folder.START_NAME, start.run / run_folder.DATA_SET_NAME
    is_new = start.choice is None
    try:
        if is_new or not kept.exists():
            keep_data_set(start.data, folder / run_folder.DATA_SET_NAME)
        if initial is not None:
            options = options | {"init_from": initial.lines()}
        environment = _environment(start, options)
        write_atomic(folder / run_folder.ENVIRONMENT_NAME, (json.dumps(environment, indent=1) + "\n").encode())
        write_atomic(folder / run_folder.CONFIG_NAME, to_toml(start.config).encode())
        if initial is not None:
            write_step_zero(folder, start.config, initial.net)
        pending = Pending(is_new, tuple(path.name for path in start.choice.passed_over) if start.choice else ())
        write_atomic(folder / RECORD, json.dumps(dataclasses.asdict(pending)).encode())
    except OSError as error:
        discard_start(start.run)
        raise RunError(f"--run {start.run} cannot be written: {error.strerror or error}") from None


def _environment(start: Start, options: dict[str, Any]) -> dict[str, Any]:
    """environment.json: of the first start, with every later one under ``resumed``."""
    now = describe_environment(["python", "-m", "trainer", *sys.argv[1:]])
    now |= {"data": start.source, "precision": start.config.train.precision, **options}
    before = None if start.choice is None else run_folder.read_environment(start.run)
    if not before:
        return now
    changed = {change.name: [change.before, change.after] for change in start.changes}
    now |= {"step": start.step, "elapsed_s": read_elapsed_s(start.run), "changed": changed}
    parts = before.get("resumed")
    return before | {"resumed": [*(parts if isinstance(parts, list) else ()), now]}


def pending_config(run: Path) -> Config | None:
    """The recipe of a start that is prepared and not yet committed."""
    path = run / run_folder.START_NAME / run_folder.CONFIG_NAME
    return load_config(path) if path.is_file() else None


def is_new(run: Path) -> bool:
    """Whether the prepared start begins with new weights, whatever checkpoints are still there."""
    found = _pending(run)
    return found is not None and found.is_new


@dataclasses.dataclass(frozen=True)
class Pending:
    """What a prepared start will do, ``.start/start.json``; ``passed_over``: names of damaged checkpoints."""

    is_new: bool
    passed_over: tuple[str, ...] = ()


def _pending(run: Path) -> Pending | None:
    try:
        return build_typed(Pending, parse_object(run / run_folder.START_NAME / RECORD))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{run / run_folder.START_NAME} is not what this start has prepared ({error})") from None


def commit_start(run: Path) -> None:
    """Makes a prepared start the run's state; does nothing where none is prepared. One process calls it.

    Raises:
        RunError: the folder cannot be written.
    """
    folder, pending = run / run_folder.START_NAME, _pending(run)
    if pending is None:
        return
    try:
        if pending.is_new:
            run_folder.empty(run)
        checkpoint.set_aside(run, pending.passed_over)
        names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        for name in sorted(names, key=lambda name: name.name == run_folder.CONFIG_NAME):  # the recipe makes it a run
            if name.name != RECORD:
                (run / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).replace(run / name)
        (run / run_folder.RESULT_NAME).unlink(missing_ok=True)
        run_folder.sweep(run)
        shutil.rmtree(folder)
    except OSError as error:
        raise RunError(f"{run} cannot be written: {error.strerror or error}") from None


def discard_start(run: Path) -> bool:
    """Removes a start that was not committed; tells whether there was one."""
    folder = run / run_folder.START_NAME
    found = run_folder.is_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return found
