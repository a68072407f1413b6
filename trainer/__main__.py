"""``python -m trainer COMMAND``: train, evaluate, describe, report."""

import argparse
import json
import os
import sys
import typing
from pathlib import Path

from pipeline.errors import PipelineError
from trainer.errors import TrainerError

if typing.TYPE_CHECKING:
    from trainer.config import Config
    from trainer.exchange import Link

TRAIN_EXAMPLE = "python -m trainer train --config configs/digits.toml --data demo/digits --run demo/run --processes 2"
Run = typing.Callable[[argparse.Namespace], int]


def main() -> int:
    """Runs one command; user errors are one line and status 2."""
    arguments = _parser().parse_args()
    try:
        return arguments.command(arguments)
    except (TrainerError, PipelineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted before the first step; nothing was lost", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Train the two-tower AlexNet of 2012, one process a tower, and look at what came of it.",
        epilog="example: " + TRAIN_EXAMPLE,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = _command(commands, "train", "train a recipe on a prepared data set", _train)
    train.epilog = "example: " + TRAIN_EXAMPLE
    _recipe_options(train)
    train.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="data set made by python -m pipeline prepare"
    )
    train.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="folder for metrics, checkpoints and report"
    )
    train.add_argument(
        "--processes", type=int, choices=(1, 2), default=1, help="1: both towers here; 2: one process a tower"
    )
    train.add_argument("--device", help="cpu, cuda or cuda:N; a GPU where there is one")
    train.add_argument(
        "--resume", choices=("auto", "never"), default="never", help="auto: go on from the newest checkpoint"
    )
    train.add_argument("--overwrite", action="store_true", help="replace an old run in the folder")

    tower = _command(commands, "tower", None, _tower)
    tower.add_argument("--data", type=Path, required=True)
    tower.add_argument("--run", type=Path, required=True)
    tower.add_argument("--device")

    evaluate = _command(commands, "evaluate", "top-1 and top-5 of a run on held-out pictures", _evaluate)
    evaluate.epilog = "example: python -m trainer evaluate --run demo/run --data demo/digits --json"
    evaluate.add_argument("--run", type=Path, required=True, metavar="DIR")
    evaluate.add_argument("--data", type=Path, required=True, metavar="DIR")
    evaluate.add_argument("--split", help="split of the data set (default: the one the recipe holds out)")
    evaluate.add_argument(
        "--views", choices=("centre", "ten"), default="centre", help="ten: corners, centre, mirrored (paper 4.1)"
    )
    evaluate.add_argument("--device", help="cpu, cuda or cuda:N")
    evaluate.add_argument("--json", action="store_true", help="one line of JSON")

    describe = _command(commands, "describe", "layers, parameters and what crosses between the towers", _describe)
    describe.epilog = "example: python -m trainer describe --config configs/paper.toml"
    _recipe_options(describe)
    describe.add_argument("--json", action="store_true", help="JSON instead of tables")
    describe.add_argument("--svg", type=Path, metavar="FILE", help="draw the net into FILE instead")

    report = _command(commands, "report", "write RUN/report.html", _report)
    report.epilog = "example: python -m trainer report --run demo/run --data demo/digits"
    report.add_argument("--run", type=Path, required=True, metavar="DIR")
    report.add_argument("--data", type=Path, metavar="DIR", help="data set, for the grid of test pictures")
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str | None, run: Run
) -> argparse.ArgumentParser:
    """Adds one subcommand; one without a summary is the launcher's own and is not listed."""
    if summary is None:
        parser = commands.add_parser(name)
    else:
        parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(command=run)
    return parser


def _recipe_options(parser: argparse.ArgumentParser) -> None:
    """Where the recipe comes from."""
    parser.add_argument(
        "--config", type=Path, metavar="TOML", help="recipe, for example configs/paper.toml (the default)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one field")


def _load(arguments: argparse.Namespace) -> "Config":
    """The recipe that the options name."""
    from trainer.config import load_config

    return load_config(arguments.config or Path(__file__).parent.parent / "configs" / "paper.toml", arguments.set)


def _train(arguments: argparse.Namespace) -> int:
    """Opens the run once, then starts the towers; under torchrun this process is one of them."""
    from pipeline.manifest import read_manifest
    from trainer import launch, run
    from trainer.errors import ConfigError

    config = _load(arguments)
    run.check_fits(config, read_manifest(arguments.data), arguments.data)
    launch.choose_device(arguments.device)
    if config.model.towers == 1 and (arguments.processes == 2 or "RANK" in os.environ):
        raise ConfigError("model.towers = 1: a net of one tower runs in one process; leave --processes 2 out")
    if os.environ.get("RANK", "0") == "0":
        resume = arguments.resume == "auto"
        run.open_run(arguments.run, config, arguments.data, resume=resume, overwrite=arguments.overwrite)
    if "RANK" in os.environ:
        return _join_and_train(arguments, config)
    if arguments.processes == 1:
        return _work(arguments, config, None, launch.choose_device(arguments.device))
    status = launch.start_towers(arguments.run, arguments.data, device=arguments.device)
    run.ensure_result(arguments.run, status)
    return status


def _tower(arguments: argparse.Namespace) -> int:
    """One tower of a run that the launcher has opened."""
    from trainer.launch import die_with_parent
    from trainer.run import read_run_config

    die_with_parent()
    return _join_and_train(arguments, read_run_config(arguments.run))


def _join_and_train(arguments: argparse.Namespace, config: "Config") -> int:
    """Finds the other tower as the environment says, and trains."""
    from trainer.launch import choose_device, join_pair

    device = choose_device(arguments.device, int(os.environ.get("LOCAL_RANK", "0")))
    link = join_pair(device, config.train.peer_timeout_s)
    return _work(arguments, config, link, device)


def _work(arguments: argparse.Namespace, config: "Config", link: "Link | None", device: str) -> int:
    """Trains in this process; status 0 where it came to its end, 3 where a signal stopped it."""
    from trainer.train import Trainer

    trainer = Trainer(config, arguments.data, arguments.run, link=link, device=device)
    result = trainer.train()
    if trainer.leads:
        print(f"{result.exit_reason} at step {result.step}: {arguments.run}", flush=True)
    return 0 if result.exit_reason == "finished" else 3


def _evaluate(arguments: argparse.Namespace) -> int:
    """Prints the accuracy of the newest checkpoint."""
    from trainer.evaluate import evaluate_run
    from trainer.launch import choose_device

    device = choose_device(arguments.device)
    result = evaluate_run(arguments.run, arguments.data, split=arguments.split, views=arguments.views, device=device)
    if arguments.json:
        print(result.to_json())
    else:
        total = result.num_samples
        print(
            f"top-1 {result.top1:.4f} ({result.num_correct_top1} of {total}), "
            f"top-5 {result.top5:.4f} ({result.num_correct_top5} of {total}), {result.views}, loss {result.loss:.4f}"
        )
    return 0


def _describe(arguments: argparse.Namespace) -> int:
    """Prints the net in numbers."""
    from trainer.describe import print_tables, to_dict

    config = _load(arguments)
    if arguments.svg:
        from trainer.net_drawing import write_drawing

        write_drawing(arguments.svg, config.model)
        print(arguments.svg)
    elif arguments.json:
        print(json.dumps(to_dict(config.model), indent=1))
    else:
        print_tables(config.model)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    """Writes the report and prints where it is."""
    from trainer.report import write_report

    print(write_report(arguments.run, arguments.data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
