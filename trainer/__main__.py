"""``python -m trainer COMMAND``: what each command does; the options are in ``trainer.cli``."""

import argparse
import json
import os
import sys
import typing
from pathlib import Path

from pipeline.errors import PipelineError
from trainer.cli import make_parser
from trainer.errors import TrainerError

if typing.TYPE_CHECKING:
    from trainer.config import Config
    from trainer.parallel.mesh import Mesh
    from trainer.training.start import Start


os.environ.setdefault("KINETO_LOG_LEVEL", "3")  # read when torch is imported: its profiler chatters otherwise


def main() -> int:
    """Runs one command; user errors are one line and status 2."""
    arguments = make_parser(HANDLERS).parse_args()
    try:
        return arguments.command(arguments)
    except (TrainerError, PipelineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status if isinstance(error, TrainerError) else 2
    except KeyboardInterrupt:
        print("error: interrupted before the first step; nothing was lost", file=sys.stderr)
        return 130


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
    from trainer.training import command, run_folder
    from trainer.training.init_from import freeze

    command.take_from_run(arguments)
    config = freeze(_load(arguments), arguments.freeze)
    if config.model.towers == 1 and (arguments.processes == 2 or "RANK" in os.environ):
        raise RecipeError("model.towers = 1: a net of one tower runs in one process; leave --processes 2 out")
    if arguments.replicas > 1 and arguments.processes == 1:
        raise RecipeError("--replicas: a replica is a pair of processes; add --processes 2")
    run_folder.check_replicas(config, _replicas(arguments))
    _stage(arguments)
    start = _check_start(arguments, config)
    from trainer.parallel import launch  # imports torch: what can be refused without it has been

    device = launch.choose_device(arguments.device)
    if start.finished:
        print(command.finished_line(start), flush=True)
        return 0
    if arguments.dry_run:
        command.learned_weights(arguments, start)
        command.print_notes(start)
        return _dry_run(arguments, start.config, device)
    if os.environ.get("RANK", "0") != "0":
        return _join_and_train(arguments, start.config, is_new=start.choice is None)
    return _hold_and_train(arguments, start, device)


def _check_start(arguments: argparse.Namespace, config: "Config") -> "Start":
    """Refuses whatever can be refused; writes nothing."""
    from trainer.planning.describe import to_dict
    from trainer.training import run_lock, start

    leads = os.environ.get("RANK", "0") == "0"
    again = "RANK" in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # torchrun repeats itself
    if leads:  # a run that is under way looks like one that is damaged, or finished
        run_lock.refuse_held(arguments.run)
    found = start.check_start(
        arguments.run,
        config,
        arguments.data,
        resume=arguments.resume != "never" or again,
        overwrite=arguments.overwrite and not again,
        skip_list=arguments.skip_list,
        source=arguments.source,
        quiet=not leads,
    )
    if leads and not found.finished:
        size_bytes = 8 * to_dict(found.config.model)["parameters"]  # weights and velocities in float32
        needed_bytes = size_bytes * start.checkpoints_at_once(found)
        start.check_writable(arguments.run, needed_bytes, replaces=found.replaces)
    return found


def _hold_and_train(arguments: argparse.Namespace, start: "Start", device: str) -> int:
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
        if "RANK" in os.environ:
            options |= {"processes": 2, "replicas": _replicas(arguments)}
        prepare_start(start, options | {"skip_list": skip_list}, initial)
        status, began = 1, False
        try:
            if "RANK" in os.environ:
                status = _join_and_train(arguments, start.config, is_new=start.choice is None)
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
        finally:
            began = not discard_start(arguments.run)
        if began and "RANK" not in os.environ and arguments.processes == 2:
            run_folder.ensure_result(arguments.run, status, processes=2 * arguments.replicas)
    return status


def _replicas(arguments: argparse.Namespace) -> int:
    """Pairs of towers: as torchrun started them, or as asked for.

    Raises:
        PeerError: torchrun started processes that make no pairs.
    """
    from trainer.config import check_world

    if "RANK" not in os.environ:
        return int(arguments.replicas)
    world = int(os.environ.get("WORLD_SIZE", "2"))
    check_world(world)
    return world // 2


def _tower(arguments: argparse.Namespace) -> int:
    """One tower of a run that the launcher has opened."""
    from trainer.parallel.launch import die_with_parent
    from trainer.training.run_folder import read_run_config
    from trainer.training.start import is_new, pending_config

    die_with_parent()
    config = pending_config(arguments.run) or read_run_config(arguments.run)
    return _join_and_train(arguments, config, is_new=is_new(arguments.run))


def _join_and_train(arguments: argparse.Namespace, config: "Config", *, is_new: bool) -> int:
    """Finds the other processes as the environment says, and trains."""
    from trainer.parallel.launch import choose_device, join_mesh

    device = choose_device(arguments.device, int(os.environ.get("LOCAL_RANK", "0")))
    mesh = join_mesh(device, config.train.peer_timeout_s)
    return _work(arguments, config, mesh, device, is_new=is_new)


def _work(arguments: argparse.Namespace, config: "Config", mesh: "Mesh | None", device: str, *, is_new: bool) -> int:
    """Trains in this process; status 0 where it came to its end, 3 where a signal stopped it."""
    from trainer.training.loop import Trainer
    from trainer.training.resume import resume_command

    trainer = Trainer(
        config,
        arguments.data,
        arguments.run,
        mesh=mesh,
        device=device,
        skip_list=arguments.skip_list,
        profile_steps=arguments.profile,
        is_new=is_new,
    )
    result = trainer.train()
    if trainer.leads:
        print(f"{result.exit_reason} at step {result.step}: {arguments.run}", flush=True)
        if result.exit_reason == "stopped":
            print(f"go on with: {resume_command(arguments.run)}", flush=True)
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
    """Prints the likeliest classes of images."""
    _check_run(arguments)
    _check_output("--html", arguments.html)
    from trainer.inference import commands

    return commands.predict(arguments)


def _features(arguments: argparse.Namespace) -> int:
    """Writes what a layer says about images."""
    _check_run(arguments)
    _check_output("--output", arguments.output)
    from trainer.inference import commands

    return commands.features(arguments)


def _neighbours(arguments: argparse.Namespace) -> int:
    """Prints which images are most alike to the net."""
    _check_run(arguments)
    _check_output("--html", arguments.html)
    from trainer.inference import commands

    return commands.neighbours(arguments)


def _export(arguments: argparse.Namespace) -> int:
    """Writes the net and prints where it is."""
    _check_run(arguments)
    from trainer.inference import commands

    return commands.export(arguments)


def _import(arguments: argparse.Namespace) -> int:
    """Makes a run out of weights and prints its checkpoint."""
    config = None if arguments.config is None else _load(arguments)
    _stage(arguments)
    from trainer.inference import commands

    return commands.import_(arguments, config)


def _describe(arguments: argparse.Namespace) -> int:
    """Prints the net in numbers."""
    from trainer.planning.describe import print_tables, to_dict
    from trainer.training.fit import check_resolved

    config = _load(arguments)
    check_resolved(config)
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
    "features": _features,
    "neighbours": _neighbours,
    "describe": _describe,
    "report": _report,
    "export": _export,
    "import": _import,
    "bench": _bench,
    "bench-tower": _bench_tower,
}


if __name__ == "__main__":
    sys.exit(main())
