"""What ``python -m trainer train`` does with its options, before it starts anything. Without torch."""

import argparse
import sys
from pathlib import Path

from pipeline.loader.open_split import read_statistics
from pipeline.manifest import read_manifest
from trainer.errors import RunError
from trainer.training import resume, run_folder
from trainer.training.checkpoint import latest_checkpoint
from trainer.training.init_from import Initial, initial_weights
from trainer.training.resume import resume_command
from trainer.training.run_folder import is_begun
from trainer.training.start import Start
from twotower import verbosity


def take_from_run(arguments: argparse.Namespace) -> None:
    """Fills in what ``--resume RUN`` says by itself, and the defaults of what nobody says.

    Raises:
        RunError: options contradict each other, or one is missing.
    """
    if arguments.overwrite and arguments.resume != "never":
        raise RunError(
            f"--overwrite and --resume {arguments.resume}: one removes the run, one goes on with it; give one"
        )
    if arguments.resume not in ("auto", "never"):
        run = Path(arguments.resume)
        if arguments.run is not None and arguments.run.resolve() != run.resolve():
            raise RunError(f"--resume {run} and --run {arguments.run} are two folders: leave --run out")
        arguments.run = run
        use_recipe_of_run(arguments)
        for name, value in resume.noted_options(run).items():
            if getattr(arguments, name) is None:
                setattr(arguments, name, value)
        arguments.data = arguments.data or resume.noted_data(run)
    for name in ("data", "run"):
        if getattr(arguments, name) is None:
            raise RunError(f"--{name} DIR is missing: train needs a data set and a run folder, or --resume RUN alone")
    if arguments.init_from is None and (arguments.new_head or arguments.freeze):
        option = "--new-head" if arguments.new_head else "--freeze"
        raise RunError(f"{option} goes with --init-from FILE|RUN: it says which weights are not new")
    if arguments.init_from is not None and arguments.resume not in ("auto", "never"):
        raise RunError("--init-from and --resume RUN: a run that goes on has weights of its own; leave one out")
    arguments.replicas = arguments.replicas or 1


def learned_weights(arguments: argparse.Namespace, start: Start) -> Initial | None:
    """The weights to begin with, where some are named and the run does not go on from a checkpoint; says which."""
    if arguments.init_from is None or start.choice is not None:
        return None
    manifest = read_manifest(start.data)
    std = read_statistics(start.data, manifest).std
    initial = initial_weights(start.config, arguments.init_from, manifest, std, new_head=arguments.new_head)
    for line in initial.lines():
        verbosity.remark(line, stdout=True)
    return initial


def print_notes(start: Start) -> None:
    """Says what is worth knowing, once nothing speaks against the start: a refusal is one line."""
    for note in start.notes:
        verbosity.remark(f"note: {note}")


def use_recipe_of_run(arguments: argparse.Namespace) -> argparse.Namespace:
    """Fills in the recipe that ``--resume RUN`` has.

    Raises:
        RunError: there is no run.
    """
    if arguments.resume not in ("auto", "never"):
        run = Path(arguments.resume)
        run_folder.read_run_config(run)
        arguments.config = arguments.config or run / run_folder.CONFIG_NAME
    return arguments


def finished_line(start: Start) -> str:
    """What to say of a run that has come to its end."""
    longer = resume_command(start.run, "--set", f"train.epochs={start.config.train.epochs + 1}")
    return f"finished already, at step {start.step}: {start.run} stays as it is; to train longer: {longer}"


def check_again(start: Start) -> None:
    """Looks once more, now that nobody else can write: a run may have ended between the checks and the lock.

    Raises:
        RunError: the folder is not what it was.
    """
    newest = (*start.choice.passed_over, start.choice.folder)[0] if start.choice else None
    if is_begun(start.run) != start.begun or (newest and latest_checkpoint(start.run) != newest):
        raise RunError(f"{start.run} was changed by another process while this one started: try again")


def confirm(start: Start, *, yes: bool) -> None:
    """Asks on a terminal before a run is removed.

    Raises:
        RunError: the answer is no.
    """
    terminal = next((stream for stream in (sys.stderr, sys.stdout) if stream is not None and stream.isatty()), None)
    if not start.replaces or yes or terminal is None or sys.stdin is None or not sys.stdin.isatty():
        return
    newest = latest_checkpoint(start.run)
    what = f"its newest checkpoint is {newest.name}" if newest else "it has no checkpoint"
    print(f"--overwrite removes the run in {start.run} ({what}). Go on? [y/N] ", end="", file=terminal, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RunError(f"{start.run} stays as it is: give another --run folder, or answer y (or add --yes)")
