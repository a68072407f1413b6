"""``python -m trainer COMMAND``: what each command does; the options are in ``trainer.cli``."""

import argparse
import contextlib
import errno
import json
import logging
import os
import signal
import sys
import typing
from pathlib import Path

from pipeline import terminal
from pipeline.errors import PipelineError
from trainer import stopping
from trainer.cli import make_parser
from trainer.errors import TrainerError

if typing.TYPE_CHECKING:
    from trainer.config import Config
    from trainer.parallel.mesh import Mesh
    from trainer.parallel.world import World
    from trainer.training.start import Start


os.environ.setdefault("KINETO_LOG_LEVEL", "3")  # read when torch is imported: its profiler chatters otherwise
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # without a home folder it does, and says so at length


def run() -> int:
    """Runs the command of this program, in a process of its own: see ``pipeline.terminal`` and ``trainer.stopping``."""
    terminal.protect()
    try:
        stopping.raise_on_stop()
        status = main()
    except stopping.Stopped as stop:  # already while this program was being read
        status = _tell(stop)
    stopping.ignore_stops()
    return status


def main() -> int:
    """Runs one command; user errors are one line and status 2."""
    arguments = make_parser(HANDLERS).parse_args()
    try:
        return _delivered(arguments, arguments.command(arguments))
    except (TrainerError, PipelineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status if isinstance(error, TrainerError) else 2
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):  # a path that nobody can have
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except (stopping.Stopped, KeyboardInterrupt) as error:
        return _tell(error if isinstance(error, stopping.Stopped) else stopping.Stopped(signal.SIGINT))


def _tell(stop: stopping.Stopped) -> int:
    """Says in one line that a command was stopped, and what it leaves; the exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name == "train":
        print(f"stopped by {stop.name} before the first step; nothing was lost", file=sys.stderr)
    elif name not in ("tower", "bench-tower"):  # whoever started these says it
        print(f"stopped by {stop.name}: nothing half-done is left under a final name", file=sys.stderr)
    return stop.status


def _delivered(arguments: argparse.Namespace, status: int) -> int:
    """The status of a command whose output may have been lost: 2 where it is why one calls it, and the disk is full."""
    lost = terminal.lost_output()
    if lost is None or terminal.is_gone(lost) or arguments.command in (_train, _tower) or status:
        return status
    why = f"error: the output cannot be written ({lost.strerror}), but the command has done its work"
    print(why, file=sys.stderr)
    return 2


def _load(arguments: argparse.Namespace) -> "Config":
    """The recipe that the options name."""
    from trainer.config import load_config

    return load_config(arguments.config or Path(__file__).parent.parent / "configs" / "paper.toml", arguments.set)


def _stage(arguments: argparse.Namespace) -> None:
    """Makes a local folder of a data set at a URL."""
    arguments.source = arguments.data
    if arguments.data is not None:
        from pipeline.loader.staging import stage

        arguments.data = stage(arguments.data)


def _train(arguments: argparse.Namespace) -> int:
    """Checks everything, then holds the run and starts the towers; under torchrun this process is one of them."""
    from trainer.errors import RecipeError
    from trainer.parallel.world import read_world
    from trainer.training import command, run_folder

    world = read_world(arguments.processes)
    _go_on_after_restart(arguments, world)
    command.take_from_run(arguments)
    config = _load(arguments)
    if config.model.towers == 1 and (arguments.processes == 2 or world):
        raise RecipeError("model.towers = 1: a net of one tower runs in one process; leave --processes 2 out")
    if arguments.replicas > 1 and arguments.processes == 1 and not world:
        raise RecipeError("--replicas: a replica is a pair of processes; add --processes 2")
    run_folder.check_replicas(config, world.size // 2 if world else arguments.replicas)
    _stage(arguments)
    start = _check_start(arguments, config, world)
    from trainer.parallel import launch  # imports torch: what can be refused without it has been

    device = launch.choose_device(arguments.device)
    if start.finished:
        print(command.finished_line(start), flush=True)
        return 0
    if arguments.dry_run:
        return _dry_run(arguments, config, device)
    if world and world.rank:
        return _join_and_train(arguments, config, world, is_new=start.choice is None)
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
        size_bytes = 8 * to_dict(config.model)["parameters"]  # weights and velocities in float32
        needed_bytes = size_bytes * start.checkpoints_at_once(found)
        start.check_writable(arguments.run, needed_bytes, replaces=found.replaces)
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
    return found


def _hold_and_train(arguments: argparse.Namespace, start: "Start", device: str, world: "World | None") -> int:
    """Trains in a run that nobody else writes meanwhile."""
    from trainer.parallel import launch
    from trainer.training import command, resume, run_folder, run_lock
    from trainer.training.start import discard_start, prepare_start

    command.confirm(start, yes=arguments.yes)
    with run_lock.hold_run(arguments.run) as handle:
        command.check_again(start)
        options = {name: getattr(arguments, name) for name in resume.OPTIONS}
        skip_list = arguments.skip_list and str(arguments.skip_list.absolute())
        if world:
            options |= {"processes": 2, "replicas": world.size // 2}
        prepare_start(start, options | {"skip_list": skip_list})
        status, began = 1, False
        try:
            if world:
                status = _join_and_train(arguments, start.config, world, is_new=start.choice is None)
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
                    held=(handle,),
                )
                stopping.finish()
        finally:
            began = not discard_start(arguments.run)
        if began and world is None and arguments.processes == 2:
            run_folder.ensure_result(arguments.run, status, processes=2 * arguments.replicas)
    return status


def _go_on_after_restart(arguments: argparse.Namespace, world: "World | None") -> None:
    """A command that ``torchrun --max-restarts`` or Slurm's ``--requeue`` gives again wipes nothing, but goes on."""
    torchrun = os.environ.get("TORCHELASTIC_RESTART_COUNT") if world else None  # else it was left in the shell
    if any(count not in (None, "", "0") for count in (torchrun, os.environ.get("SLURM_RESTART_COUNT"))):
        arguments.overwrite = False
        arguments.resume = "auto" if arguments.resume == "never" else arguments.resume


def _tower(arguments: argparse.Namespace) -> int:
    """One tower of a run that the launcher has opened."""
    from trainer.parallel.launch import die_with_parent
    from trainer.parallel.world import read_world
    from trainer.training.run_folder import read_run_config
    from trainer.training.start import is_new, pending_config

    die_with_parent()
    world = read_world(None)
    assert world is not None
    config = pending_config(arguments.run) or read_run_config(arguments.run)
    return _join_and_train(arguments, config, world, is_new=is_new(arguments.run))


def _join_and_train(arguments: argparse.Namespace, config: "Config", world: "World", *, is_new: bool) -> int:
    """Finds the other processes, and trains."""
    from trainer.parallel.launch import choose_device, join_mesh

    device = choose_device(arguments.device, world.local_rank)
    mesh = join_mesh(world, device, config.train.peer_timeout_s)
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
                print(f"error: {gone}", file=sys.stderr)
            return 2
        if trainer.leads:
            print(f"{result.exit_reason} at step {result.step}: {arguments.run}", flush=True)
            if result.exit_reason == "stopped":
                print(f"go on with: {resume_command(arguments.run)}", flush=True)
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


def _check_run(arguments: argparse.Namespace, *, needs_data: bool = False) -> None:
    """Refuses a run that is none, and finds the data set, before torch is imported."""
    from trainer.training.resume import noted_data
    from trainer.training.run_folder import read_run_config

    read_run_config(arguments.run)
    if needs_data and arguments.data is None:
        arguments.data = noted_data(arguments.run)
    _stage(arguments)


def _check_output(option: str, path: Path | None) -> None:
    """Refuses a file that could not be written at the end, or must not be."""
    from trainer.training.run_folder import check_output

    if path is not None:
        check_output(option, path)


def _evaluate(arguments: argparse.Namespace) -> int:
    """Prints the accuracy of a checkpoint."""
    _check_run(arguments, needs_data=True)
    _check_output("--confusion", arguments.confusion)
    from pipeline.manifest import read_manifest
    from trainer.parallel.launch import choose_device
    from trainer.report import confusion
    from trainer.training.evaluate import evaluate_run

    device = choose_device(arguments.device)
    if arguments.confusion:
        confusion.check_name(arguments.confusion)
    result = evaluate_run(
        arguments.run,
        arguments.data,
        split=arguments.split,
        views=arguments.views,
        device=device,
        which=arguments.checkpoint,
    )
    classes = [record.title for record in read_manifest(arguments.data).classes]
    if arguments.json:
        print(json.dumps(result.to_dict() | confusion.to_dict(result, classes), ensure_ascii=False))
    else:
        print(result.sentence())
    if arguments.per_class and not arguments.json:
        confusion.print_classes(result, classes)
    if arguments.confusion:
        confusion.draw(arguments.confusion, result, classes)
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    """Prints the likeliest classes of images; status 3 where some could not be used."""
    _check_run(arguments)
    _check_output("--html", arguments.html)
    from trainer.inference import predict
    from trainer.parallel.launch import choose_device

    predictor = predict.Predictor(
        arguments.run,
        arguments.data,
        device=choose_device(arguments.device),
        views=arguments.views,
        which=arguments.checkpoint,
    )
    results = []
    paths = predict.find_images(arguments.images)
    for result in predictor.predict(paths, top=arguments.top, images=arguments.html is not None):
        results.append(result)
        predict.print_error(result)
        if arguments.json:
            predict.print_json(result)
            if arguments.html is None and terminal.lost_output():
                break  # nobody reads the rest
    if not arguments.json:
        predict.print_table(results)
    if arguments.html:
        predict.write_html(arguments.html, results, arguments.run)
    return 3 if any(result.error for result in results) else 0


def _describe(arguments: argparse.Namespace) -> int:
    """Prints the net in numbers."""
    from trainer.planning.describe import print_tables, to_dict

    config = _load(arguments)
    if arguments.scale:
        return _scale(arguments, config)
    if arguments.svg:
        _check_output("--svg", arguments.svg)
        from trainer.report.net_drawing import write_drawing

        write_drawing(arguments.svg, config.model)
        print(arguments.svg)
    elif arguments.json:
        print(json.dumps(to_dict(config.model), indent=1))
    else:
        print_tables(config.model)
    return 0


def _scale(arguments: argparse.Namespace, config: "Config") -> int:
    """Prints what a step sends on many GPUs."""
    from trainer.errors import RecipeError
    from trainer.planning.scale import WORLDS, Wires, print_scale, scale_table

    if config.model.towers == 1:
        raise RecipeError("model.towers = 1: a net of one tower runs in one process, and nothing is sent")
    given = (arguments.bandwidth_gb_s, arguments.latency_us, arguments.tflops)
    if any(given) and not all(given):
        raise RecipeError("--bandwidth-gb-s, --latency-us and --tflops belong together: the model needs all three")
    wires = Wires(*given, arguments.pair_bandwidth_gb_s or given[0]) if all(given) else None
    images = arguments.per_pair or config.train.batch_size
    table = scale_table(config, WORLDS, images=images, wires=wires)
    if arguments.json:
        print(json.dumps(table, indent=1))
    else:
        print_scale(table, images, wires)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    """Writes the report and prints where it is."""
    _stage(arguments)
    from trainer.report.report import write_report

    print(write_report(arguments.run, arguments.data))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    """Writes the weights and prints where they are."""
    _check_run(arguments)
    from trainer.inference.export import export_run

    print(export_run(arguments.run, arguments.output, data=arguments.data, which=arguments.checkpoint))
    return 0


def _import(arguments: argparse.Namespace) -> int:
    """Makes a run out of weights and prints its checkpoint."""
    _stage(arguments)
    from trainer.inference.export import import_weights

    print(import_weights(arguments.weights, _load(arguments), arguments.run, arguments.data))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    """Measures every stage."""
    _check_output("--json", arguments.json)
    _check_output("--html", arguments.html)
    _stage(arguments)
    from trainer.bench.command import run

    return run(arguments, _load)


def _bench_tower(arguments: argparse.Namespace) -> int:
    """One of two measuring processes that the benchmark has started."""
    from trainer.bench.run import run_tower

    run_tower(arguments.job)
    return 0


HANDLERS = {
    "train": _train,
    "tower": _tower,
    "evaluate": _evaluate,
    "predict": _predict,
    "describe": _describe,
    "report": _report,
    "export": _export,
    "import": _import,
    "bench": _bench,
    "bench-tower": _bench_tower,
}


if __name__ == "__main__":
    sys.exit(run())
