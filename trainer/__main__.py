"""``python -m trainer COMMAND``: what each command does; the options are in ``trainer.cli``."""

import twotower.linux_only  # noqa: F401  before all that other systems lack

# isort: split
import argparse
import errno
import json
import logging
import os
import signal
import sys
import typing
from pathlib import Path

from pipeline.errors import PipelineError
from trainer import stopping
from trainer.cli import make_parser
from trainer.errors import TrainerError
from trainer.train_command import load_recipe, print_recipe, stage_data, tower, train
from twotower import terminal, verbosity
from twotower.words import json_text

if typing.TYPE_CHECKING:
    from trainer.config import Config


os.environ.setdefault("KINETO_LOG_LEVEL", "3")  # read when torch is imported: its profiler chatters otherwise
if os.environ.get("RANK"):  # so does NCCL's watchdog, when a peer is lost: parallel/watch.py says it in one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # without a home folder it does, and says so at length


def run() -> int:
    """Runs the command of this program, in a process of its own: see ``twotower.terminal`` and ``trainer.stopping``."""
    terminal.protect()
    try:
        stopping.raise_on_stop()
        status = main()
    except stopping.Stopped as stop:  # already while this program was being read
        status = _tell(stop)
    stopping.ignore_stops()
    return stopping.leave(status)


def main() -> int:
    """Runs one command; user errors are one line and status 2."""
    arguments = make_parser(HANDLERS).parse_args()
    verbosity.apply(arguments)
    try:
        status = arguments.command(arguments)
        return status if arguments.command in (train, tower) else terminal.delivered(status)
    except (TrainerError, PipelineError) as error:
        verbosity.log.debug("the error arose here:", exc_info=True)
        terminal.print_error(error)
        return error.status if isinstance(error, TrainerError) else 2
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):  # a path that nobody can have
            raise
        terminal.print_error(f"{error.filename}: {error.strerror}")
        return 2
    except (stopping.Stopped, KeyboardInterrupt) as error:
        return _tell(error if isinstance(error, stopping.Stopped) else stopping.Stopped(signal.SIGINT))


def _tell(stop: stopping.Stopped) -> int:
    """Says in one line that a command was stopped, and what it leaves; the exit status."""
    name = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if name == "train":
        print(f"stopped by {stop.name} before the first step; nothing was lost", file=sys.stderr)
    elif name not in ("tower", "bench-tower"):  # whoever started these says it
        print(f"stopped by {stop.name}: nothing half-done is left under a final name", file=sys.stderr)
    return stop.status


def _check_run(arguments: argparse.Namespace, *, needs_data: bool = False) -> None:
    """Refuses a run that is none, and finds the data set, before torch is imported."""
    from trainer.training.resume import noted_data
    from trainer.training.run_folder import read_run_config

    read_run_config(arguments.run)
    if needs_data and arguments.data is None:
        arguments.data = noted_data(arguments.run)
    stage_data(arguments)


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
        print(json_text(result.to_dict() | confusion.to_dict(result, classes)))
    else:
        print(result.sentence())
    if arguments.per_class and not arguments.json:
        confusion.print_classes(result, classes)
    if arguments.confusion:
        confusion.draw(arguments.confusion, result, classes)
        verbosity.say_written(arguments.confusion)
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
    config = None if arguments.config is None else load_recipe(arguments)
    stage_data(arguments)
    from trainer.inference import commands

    return commands.import_(arguments, config)


def _config(arguments: argparse.Namespace) -> int:
    """Prints a resolved recipe, or the page about all settings."""
    from trainer.errors import RecipeError
    from trainer.planning.settings import settings_page

    if not arguments.markdown:
        print_recipe(arguments)
    elif arguments.config or arguments.set:
        raise RecipeError("--markdown is about every recipe: leave --config and --set out")
    else:
        print(settings_page(), end="")
    return 0


def _describe(arguments: argparse.Namespace) -> int:
    """Prints the net in numbers."""
    from trainer.planning.describe import print_tables, to_dict
    from trainer.training.fit import check_resolved

    config = load_recipe(arguments)
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
    from trainer.planning.scale import WORLDS, Sizes, Wires, print_scale, scale_table

    if config.model.towers == 1:
        raise RecipeError("model.towers = 1: a net of one tower runs in one process, and nothing is sent")
    given = (arguments.bandwidth_gb_s, arguments.latency_us, arguments.tflops)
    if any(given) and not all(given):
        raise RecipeError("--bandwidth-gb-s, --latency-us and --tflops belong together: the model needs all three")
    pair = arguments.pair_bandwidth_gb_s or given[0]
    wires = Wires(*given, pair, arguments.loader_images_s) if all(given) else None
    images = arguments.per_pair or config.train.batch_size
    sizes = Sizes(arguments.samples, arguments.evaluated)
    table = scale_table(config, WORLDS, images=images, wires=wires, sizes=sizes)
    if arguments.json:
        print(json.dumps(table, indent=1))
    else:
        print_scale(table, images, wires)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    """Writes the report and prints where it is."""
    stage_data(arguments)
    from trainer.report.report import write_report

    print(write_report(arguments.run, arguments.data))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    """Measures every stage."""
    _check_output("--json", arguments.json)
    _check_output("--html", arguments.html)
    stage_data(arguments)
    from trainer.bench.command import run

    return run(arguments, load_recipe)


def _bench_tower(arguments: argparse.Namespace) -> int:
    """One of two measuring processes that the benchmark has started."""
    from trainer.bench.run import run_tower

    run_tower(arguments.job)
    return 0


def _experiment(arguments: argparse.Namespace) -> int:
    """Runs one of the paper's experiments."""
    stage_data(arguments)
    from trainer.experiments import command

    return command.run(arguments, load_recipe)


HANDLERS = {
    "train": train,
    "tower": tower,
    "evaluate": _evaluate,
    "predict": _predict,
    "features": _features,
    "neighbours": _neighbours,
    "config": _config,
    "describe": _describe,
    "report": _report,
    "export": _export,
    "import": _import,
    "bench": _bench,
    "bench-tower": _bench_tower,
    "experiment": _experiment,
}


if __name__ == "__main__":
    sys.exit(run())
