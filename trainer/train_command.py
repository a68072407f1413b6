"""What ``python -m trainer train`` does: check everything, hold the run, start the towers or be one of them."""

import argparse
import contextlib
import dataclasses
import os
import typing
from pathlib import Path

from trainer import stopping
from twotower import terminal, verbosity
from twotower.words import one_line

if typing.TYPE_CHECKING:
    from trainer.config import Config
    from trainer.parallel.mesh import Mesh
    from trainer.parallel.world import World
    from trainer.training.start import Start


def load_recipe(arguments: argparse.Namespace) -> "Config":
    """The recipe that the options name."""
    from trainer.config import load_config

    return load_config(arguments.config or Path(__file__).parent.parent / "configs" / "paper.toml", arguments.set)


def print_recipe(arguments: argparse.Namespace) -> None:
    """Prints the recipe that the options name, every field with its meaning; it is a recipe itself."""
    from trainer.planning.settings import commented_recipe

    print(commented_recipe(load_recipe(arguments)), end="")


def stage_data(arguments: argparse.Namespace) -> None:
    """Makes a local folder of a data set at a URL."""
    arguments.source = arguments.data
    if arguments.data is not None:
        from pipeline.loader.staging import stage

        arguments.data = stage(arguments.data)


def train(arguments: argparse.Namespace) -> int:
    """Checks everything, then holds the run and starts the towers; under torchrun this process is one of them."""
    from trainer.errors import RecipeError
    from trainer.parallel.world import read_world
    from trainer.precision import resolve_precision, slow_warning
    from trainer.training import command, run_folder
    from trainer.training.init_from import freeze

    if arguments.print_config:
        print_recipe(command.use_recipe_of_run(arguments))
        return 0
    world = read_world(arguments.processes)
    go_on_after_restart(arguments, world)
    command.take_from_run(arguments)
    config = freeze(load_recipe(arguments), arguments.freeze)
    if config.model.towers == 1 and (arguments.processes == 2 or world):
        raise RecipeError("model.towers = 1: a net of one tower runs in one process; leave --processes 2 out")
    if arguments.replicas > 1 and arguments.processes != 2 and not world:
        raise RecipeError("--replicas: a replica is a pair of processes; add --processes 2")
    run_folder.check_replicas(config, world.size // 2 if world else arguments.replicas)
    stage_data(arguments)
    start = _check_start(arguments, config, world)
    from trainer.parallel import launch  # imports torch: what can be refused without it has been

    device = launch.choose_device(arguments.device)
    if arguments.processes is None:
        arguments.processes = 1 if world else launch.default_processes(arguments.device, config.model.towers)
    launch.check_backend(arguments.backend, device, world.size if world else arguments.processes)
    start = dataclasses.replace(start, config=resolve_precision(start.config, device))
    if start.finished:
        print(command.finished_line(start), flush=True)
        return 0
    warning = slow_warning(start.config, device)
    if warning and (world is None or world.rank == 0):
        verbosity.remark(f"warning: {warning}")
    if arguments.dry_run:
        command.learned_weights(arguments, start)
        command.print_notes(start)
        return _dry_run(arguments, start.config, device)
    if world and world.rank:
        return join_and_train(arguments, start.config, world, is_new=start.choice is None)
    return _hold_and_train(arguments, start, device, world)


def _check_start(arguments: argparse.Namespace, config: "Config", world: "World | None") -> "Start":
    """Refuses whatever can be refused; writes nothing."""
    from trainer.planning.describe import to_dict
    from trainer.training import run_lock, start

    leads = world is None or world.rank == 0
    if leads:  # a run that is under way looks like one that is damaged, or finished
        run_lock.refuse_held(arguments.run, patience_s=run_lock.PATIENCE_S if world else 0)
    found = start.check_start(
        arguments.run,
        config,
        arguments.data,
        resume=arguments.resume != "never",
        overwrite=arguments.overwrite,
        skip_list=arguments.skip_list,
        source=arguments.source,
        quiet=not leads,
    )
    if leads and not found.finished:
        size_bytes = 8 * to_dict(found.config.model)["parameters"]  # weights and velocities in float32
        needed_bytes = size_bytes * start.checkpoints_at_once(found)
        start.check_writable(arguments.run, needed_bytes, replaces=found.replaces)
    return found


def _hold_and_train(arguments: argparse.Namespace, start: "Start", device: str, world: "World | None") -> int:
    """Trains in a run that nobody else writes meanwhile."""
    from trainer.parallel import launch
    from trainer.training import command, resume, run_folder, run_lock
    from trainer.training.start import discard_start, prepare_start

    initial = command.learned_weights(arguments, start)
    command.print_notes(start)
    command.confirm(start, yes=arguments.yes)
    with run_lock.hold_run(arguments.run) as handle:
        command.check_again(start)
        options = {name: getattr(arguments, name) for name in resume.OPTIONS}
        skip_list = arguments.skip_list and str(arguments.skip_list.absolute())
        if world:
            options |= {"processes": 2, "replicas": world.size // 2}
        prepare_start(start, options | {"skip_list": skip_list}, initial)
        status, began = 1, False
        try:
            if world:
                status = join_and_train(arguments, start.config, world, is_new=start.choice is None)
            elif arguments.processes == 1:
                status = _work(arguments, start.config, None, device, is_new=start.choice is None)
            else:
                status = launch.start_towers(
                    arguments.run,
                    arguments.data,
                    device=arguments.device,
                    skip_list=arguments.skip_list,
                    replicas=arguments.replicas,
                    profile_steps=arguments.profile,
                    backend=arguments.backend,
                    held=(handle,),
                )
                stopping.finish()
        finally:
            began = not discard_start(arguments.run)
        if began and world is None and arguments.processes == 2:
            run_folder.ensure_result(arguments.run, status, processes=2 * arguments.replicas)
    return status


def go_on_after_restart(arguments: argparse.Namespace, world: "World | None") -> None:
    """A command that ``torchrun --max-restarts`` or Slurm's ``--requeue`` gives again wipes nothing, but goes on."""
    torchrun = os.environ.get("TORCHELASTIC_RESTART_COUNT") if world else None  # else it was left in the shell
    if any(count not in (None, "", "0") for count in (torchrun, os.environ.get("SLURM_RESTART_COUNT"))):
        arguments.overwrite = False
        arguments.resume = "auto" if arguments.resume == "never" else arguments.resume


def tower(arguments: argparse.Namespace) -> int:
    """One tower of a run that the launcher has opened."""
    from trainer.parallel.launch import die_with_parent
    from trainer.parallel.world import read_world
    from trainer.training.run_folder import read_run_config
    from trainer.training.start import is_new, pending_config

    die_with_parent()
    world = read_world(None)
    assert world is not None
    config = pending_config(arguments.run) or read_run_config(arguments.run)
    return join_and_train(arguments, config, world, is_new=is_new(arguments.run))


def join_and_train(arguments: argparse.Namespace, config: "Config", world: "World", *, is_new: bool) -> int:
    """Finds the other processes, and trains."""
    from trainer.parallel.launch import choose_device, join_mesh

    device = choose_device(arguments.device, world.local_rank)
    with join_mesh(world, device, config.train, arguments.backend) as mesh:
        verbosity.log.debug("rank %d of %d has found the others, on %s", world.rank, world.size, device)
        return _work(arguments, config, mesh, device, is_new=is_new)


def _work(arguments: argparse.Namespace, config: "Config", mesh: "Mesh | None", device: str, *, is_new: bool) -> int:
    """Trains in this process; status 0 where it came to its end, 3 where a signal stopped it."""
    from trainer.training import run_folder
    from trainer.training.loop import Trainer
    from trainer.training.resume import resume_command

    terminal.warn_of_loss(f"training goes on; {arguments.run}/metrics.jsonl has every step")
    stop = stopping.StopRequest()
    with contextlib.ExitStack() as stack:
        if mesh:  # one tower must not end while the other already trains: both do at their first step
            stack.enter_context(stopping.handled_by(stop.note))
        trainer = Trainer(
            config,
            arguments.data,
            arguments.run,
            mesh=mesh,
            device=device,
            skip_list=arguments.skip_list,
            profile_steps=arguments.profile,
            stop=stop,
            is_new=is_new,
        )
        stack.enter_context(stopping.handled_by(stop.note))
        result = trainer.train()
        if gone := run_folder.why_gone(arguments.run):
            if trainer.leads:
                terminal.print_error(gone)
            return 2
        if trainer.leads:
            print(one_line(f"{result.exit_reason} at step {result.step}: {arguments.run}"), flush=True)
            if result.exit_reason == "stopped":
                verbosity.remark(f"go on with: {resume_command(arguments.run)}", stdout=True)
        stopping.finish()
        return 0 if result.exit_reason == "finished" else 3


def _dry_run(arguments: argparse.Namespace, config: "Config", device: str) -> int:
    """Says what training would take."""
    from trainer.planning.dry_run import plan_run, print_plan

    run = arguments.run if arguments.resume != "never" else None
    processes, replicas = arguments.processes, arguments.replicas
    plan = plan_run(config, arguments.data, run=run, processes=processes, replicas=replicas, device=device)
    print_plan(plan)
    return 0
