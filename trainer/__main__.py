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
    except BrokenPipeError:  # the reader of our output, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _load(arguments: argparse.Namespace) -> "Config":
    """The recipe that the options name."""
    from trainer.config import load_config

    return load_config(arguments.config or Path(__file__).parent.parent / "configs" / "paper.toml", arguments.set)


def _stage(arguments: argparse.Namespace) -> None:
    """Makes a local folder of a data set at a URL."""
    if arguments.data is not None:
        from pipeline.loader.staging import stage

        arguments.data = stage(arguments.data)


def _train(arguments: argparse.Namespace) -> int:
    """Opens the run once, then starts the towers; under torchrun this process is one of them."""
    from pipeline.loader.open_split import open_split
    from pipeline.manifest import read_manifest
    from trainer.errors import RecipeError
    from trainer.training import run_folder

    _go_on_after_restart(arguments)
    config = _load(arguments)
    if config.model.towers == 1 and (arguments.processes == 2 or "RANK" in os.environ):
        raise RecipeError("model.towers = 1: a net of one tower runs in one process; leave --processes 2 out")
    if arguments.replicas > 1 and arguments.processes == 1:
        raise RecipeError("--replicas: a replica is a pair of processes; add --processes 2")
    run_folder.check_replicas(config, _replicas(arguments))
    _stage(arguments)
    run_folder.check_fits(config, read_manifest(arguments.data), arguments.data)
    from trainer.parallel import launch  # imports torch: what can be refused without it has been

    device = launch.choose_device(arguments.device)
    if arguments.dry_run:
        return _dry_run(arguments, config, device)
    if os.environ.get("RANK", "0") == "0":
        for split in sorted({"train", config.train.evaluate_split}):  # a damaged one is refused before a run is made
            open_split(arguments.data, split, skip_list=arguments.skip_list if split == "train" else None)
        resume = arguments.resume == "auto"
        run_folder.open_run(arguments.run, config, arguments.data, resume=resume, overwrite=arguments.overwrite)
    if "RANK" in os.environ:
        return _join_and_train(arguments, config)
    if arguments.processes == 1:
        return _work(arguments, config, None, device)
    status = launch.start_towers(
        arguments.run,
        arguments.data,
        device=arguments.device,
        skip_list=arguments.skip_list,
        replicas=arguments.replicas,
        profile_steps=arguments.profile,
    )
    run_folder.ensure_result(arguments.run, status, processes=2 * arguments.replicas)
    return status


def _go_on_after_restart(arguments: argparse.Namespace) -> None:
    """A command that ``torchrun --max-restarts`` or Slurm's ``--requeue`` gives again wipes nothing, but goes on."""
    restarts = (os.environ.get("TORCHELASTIC_RESTART_COUNT"), os.environ.get("SLURM_RESTART_COUNT"))
    if any(count not in (None, "", "0") for count in restarts):
        arguments.overwrite, arguments.resume = False, "auto"


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

    die_with_parent()
    return _join_and_train(arguments, read_run_config(arguments.run))


def _join_and_train(arguments: argparse.Namespace, config: "Config") -> int:
    """Finds the other processes as the environment says, and trains."""
    from trainer.parallel.launch import choose_device, join_mesh

    device = choose_device(arguments.device, int(os.environ.get("LOCAL_RANK", "0")))
    mesh = join_mesh(device, config.train.peer_timeout_s)
    return _work(arguments, config, mesh, device)


def _work(arguments: argparse.Namespace, config: "Config", mesh: "Mesh | None", device: str) -> int:
    """Trains in this process; status 0 where it came to its end, 3 where a signal stopped it."""
    from trainer.training.loop import Trainer

    trainer = Trainer(
        config,
        arguments.data,
        arguments.run,
        mesh=mesh,
        device=device,
        skip_list=arguments.skip_list,
        profile_steps=arguments.profile,
    )
    result = trainer.train()
    if trainer.leads:
        print(f"{result.exit_reason} at step {result.step}: {arguments.run}", flush=True)
    return 0 if result.exit_reason == "finished" else 3


def _dry_run(arguments: argparse.Namespace, config: "Config", device: str) -> int:
    """Says what training would take."""
    from trainer.planning.dry_run import plan_run, print_plan

    run = arguments.run if arguments.resume == "auto" else None
    processes, replicas = arguments.processes, arguments.replicas
    plan = plan_run(config, arguments.data, run=run, processes=processes, replicas=replicas, device=device)
    print_plan(plan)
    return 0


def _check_run(arguments: argparse.Namespace) -> None:
    """Refuses a run that is none, and stages the data set, before torch is imported."""
    from trainer.training.run_folder import read_run_config

    read_run_config(arguments.run)
    _stage(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    """Prints the accuracy of a checkpoint."""
    _check_run(arguments)
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
    from trainer.inference.export import import_weights

    print(import_weights(arguments.weights, _load(arguments), arguments.run))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    """Measures every stage."""
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
    sys.exit(main())
