"""The run folder: what is in it, and which folders are one."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from pipeline.manifest import MANIFEST_NAME, write_atomic
from trainer.config import Config, load_config
from trainer.errors import RecipeError, RunError
from trainer.training.checkpoint import CHECKPOINTS_NAME, checkpoints
from trainer.training.history import read_past
from trainer.training.rows import iterate_rows
from trainer.training.run_files import check_inside, read_object
from trainer.training.run_lock import LOCK_NAME
from twotower import terminal
from twotower.words import listed

CONFIG_NAME = "config.toml"
RESULT_NAME = "result.json"
ENVIRONMENT_NAME = "environment.json"
DATA_SET_NAME = "trained_on"
START_NAME = ".start"
OURS = frozenset(  # all that a run writes
    {
        CONFIG_NAME,
        RESULT_NAME,
        ENVIRONMENT_NAME,
        DATA_SET_NAME,
        CHECKPOINTS_NAME,
        LOCK_NAME,
        START_NAME,
        "metrics.jsonl",
        "epochs.csv",
        "tensorboard",
        "loggers",
        "profile",
        "report.html",
    }
)


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
        elapsed_s: wall time of all parts of the run, s.
        images_per_s: median over the steps, of all parts.
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


def blame(error: OSError, run: Path) -> str:
    """What could not be done: a file that is named, and is not the run's, is to blame itself."""
    named = Path(str(error.filename)) if error.filename else run
    if run.absolute() in (named.absolute(), *named.absolute().parents):
        return f"{run} cannot be written: {error.strerror or error}"
    return f"{named}: {error.strerror or error}"


def is_begun(run: Path) -> bool:
    """Tells a run from a folder that one may be made in: absent, empty, or left by a start that came to no step.

    Raises:
        RunError: the folder cannot be looked into, or holds something else than a run of ours; nothing is ever removed
            from such a folder.
    """
    names = _names(run)
    if CONFIG_NAME not in names:
        left = names & {LOCK_NAME, START_NAME}  # a start was killed, perhaps one that was replacing an old run
        check_inside(run, OURS if left else frozenset())
        others = sorted(names - OURS if left else names)
        if others:
            shown = listed(others, most=3)
            raise RunError(
                f"{run} holds something that is not a run ({shown}; no {CONFIG_NAME}): give another --run folder"
            )
        return False
    check_inside(run, OURS)
    try:
        load_config(run / CONFIG_NAME)
    except RecipeError as error:
        raise RunError(f"{run} holds no run that this version can read ({error}): give another --run folder") from None
    if ENVIRONMENT_NAME not in names and CHECKPOINTS_NAME not in names:
        raise RunError(f"{run} holds a recipe and no run: give another --run folder, or move {CONFIG_NAME} away")
    try:
        return bool(checkpoints(run)) or any(row["kind"] == "step" for _, row in iterate_rows(run))
    except OSError as error:
        raise RunError(f"{error.filename or run} cannot be read: {error.strerror}") from None


def _names(run: Path) -> set[str]:
    """What is in a run folder; an empty set where there is none.

    Raises:
        RunError: it cannot be looked into.
    """
    if run.is_symlink() and not run.exists():
        raise RunError(f"--run {run}: is a link to {run.readlink()}, where nothing is")
    try:
        names = {path.name for path in run.iterdir()}
        return {name for name in names if name != "lost+found" and not _is_left_over(name)}
    except FileNotFoundError:
        return set()
    except NotADirectoryError:
        raise RunError(f"--run {run}: is not a folder, or lies in something that is none") from None
    except OSError as error:
        raise RunError(f"--run {run} cannot be read: {error.strerror}") from None


def _is_left_over(name: str) -> bool:
    """A file that was being written when its process was killed, or that is removed and still open on NFS."""
    return name.startswith(".nfs") or (name.startswith(".") and name.endswith(".tmp"))


def sweep(run: Path) -> None:
    """Removes what killed processes left half-written."""
    for path in run.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def empty(run: Path) -> None:
    """Removes what a run has written, the recipe first: without it the rest is no run that anybody goes on with.

    Files of others stay, and so does the folder itself, which may be a mount point or a link.
    """
    for name in (CONFIG_NAME, *sorted(OURS - {CONFIG_NAME, LOCK_NAME, START_NAME})):
        remove(run / name)


def remove(path: Path) -> None:
    """Removes a file or a folder; of a mount point, or what a link points to, only the content."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            remove(child)
        else:
            child.unlink()
    if not path.is_symlink():
        with contextlib.suppress(OSError):  # a mount point is busy
            path.rmdir()


def read_run_config(run: Path) -> Config:
    """The resolved recipe of a run.

    Raises:
        RunError: there is no run.
    """
    try:
        (run / CONFIG_NAME).stat()
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"no run at {run}: train one with python -m trainer train --run {run}") from None
    except OSError as error:
        raise RunError(f"{run / CONFIG_NAME} cannot be read: {error.strerror}") from None
    check_inside(run, OURS)
    return load_config(run / CONFIG_NAME)


def check_output(option: str, path: Path) -> None:
    """Refuses, before any work, a file that could not be written, or that belongs to a run or a data set.

    Args:
        option: which names it.
        path: the file.

    Raises:
        RunError: it cannot be used; says why.
    """
    where = path.absolute().parent.resolve() / path.name
    if where.is_dir():
        raise RunError(f"{option} {path}: is a folder; expected the name of a file")
    _refuse_inside(option, path, where)
    if why := why_not_writable(where.parent):
        raise RunError(f"{option} {path} cannot be written: {why}")


def refuse_nested(run: Path) -> None:
    """Refuses a run folder inside a data set, which nobody changes but prepare, or among the files of another run.

    Raises:
        RunError: it lies there.
    """
    where = run.resolve()
    if is_file(where / MANIFEST_NAME):
        raise RunError(f"--run {run}: is a data set; give a folder outside of it")
    _refuse_inside("--run", run, where)


def _refuse_inside(option: str, path: Path, where: Path) -> None:
    """Refuses a place that belongs to a run, or lies in a data set."""
    for folder in where.parents:
        top = where.relative_to(folder).parts[0]
        if is_folder(folder / CHECKPOINTS_NAME) and is_file(folder / CONFIG_NAME) and top in OURS:
            raise RunError(f"{option} {path}: is the run's own ({folder}); give another name")
        if is_file(folder / MANIFEST_NAME):
            raise RunError(f"{option} {path}: lies in the data set {folder}; give a place outside of it")


def why_not_writable(folder: Path) -> str:
    """Why nothing can be made in a folder, or the folder itself cannot be made; empty where it can."""
    there = next(place for place in (folder, *folder.absolute().parents) if is_folder(place) or is_file(place))
    if not is_folder(there):
        return f"{there} is not a folder"
    if os.access(there, os.W_OK | os.X_OK):
        return ""
    read_only = os.statvfs(there).f_flag & os.ST_RDONLY
    return f"{there} is read-only" if read_only else f"this user may not write in {there}"


def why_gone(run: Path) -> str:
    """Why a run that was trained cannot be gone on with: somebody took its folder away; empty where it can."""
    if is_file(run / CONFIG_NAME):
        return ""
    return f"{run} was moved or removed while it was trained: what it saved since is in {run / CHECKPOINTS_NAME}"


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; one that cannot be seen is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Whether there is such a file; one that cannot be seen is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_environment(run: Path) -> dict[str, Any]:
    """environment.json; {} where there is none, or it is damaged: it decides nothing."""
    return read_object(run / ENVIRONMENT_NAME)


def read_result(run: Path) -> dict[str, Any]:
    """result.json; {} where there is none, or it is damaged."""
    return read_object(run / RESULT_NAME)


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
    if not status or not is_file(run / CONFIG_NAME) or is_file(run / RESULT_NAME):
        return  # without its recipe the folder was moved or removed meanwhile
    try:
        write_result(run, _failed(run, status, processes))
    except (OSError, RecipeError) as error:  # a full disk does not hide why the towers ended
        why = blame(error, run) if isinstance(error, OSError) else error
        terminal.warn(why)


def _failed(run: Path, status: int, processes: int) -> Result:
    """What is known of a run whose towers could not say it themselves."""
    past = read_past(run)
    evaluation = past.evaluations[-1] if past.evaluations else {}
    return Result(
        exit_reason="failed",
        reason=f"the towers ended with status {status}",
        step=past.last.get("step", 0),
        epoch=past.last.get("epoch", 0),
        top1=evaluation.get("top1"),
        top5=evaluation.get("top5"),
        num_samples=evaluation.get("num_samples", 0),
        elapsed_s=past.elapsed_s,
        images_per_s=past.images_per_s.median(),
        processes=processes,
        batch_size=read_run_config(run).train.batch_size,
        ledger=list(past.ledger),
    )
