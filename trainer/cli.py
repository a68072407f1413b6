"""The command line of ``python -m trainer``: options only; what a command does stands in ``trainer.__main__``."""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from trainer.config import LAYERS
from trainer.experiments import options as experiment_options
from trainer.guesses import TrainerParser
from twotower import verbosity

Handler = Callable[[argparse.Namespace], int]

EXIT_CODES = (
    "exit codes: 0 done, 1 a bug of ours, 2 something to fix (one line says what), 3 stopped by a signal, and saved "
    "(train), some images could not be used (predict) or some runs are missing (experiment), "
    "4 another process of the run was lost (train), "
    "128 + N ended by signal N; those of all commands are in docs/commands.md"
)
PAGED = "write a page with the images besides; of more than 200 images several, FILE, FILE-2 and so on"
TRAIN_EXAMPLE = "python -m trainer train --config configs/digits.toml --data demo/digits --run demo/run --processes 2"


class Commands:
    """Adds subcommands.

    Args:
        parser: of the whole program.
        handlers: what each command runs, by its name.
    """

    def __init__(self, parser: argparse.ArgumentParser, handlers: Mapping[str, Handler]) -> None:
        self._subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
        self._handlers = handlers

    def add(self, name: str, summary: str, example: str) -> argparse.ArgumentParser:
        """Adds a command; ``example`` stands at the end of its help."""
        description = summary[0].upper() + summary[1:] + "."
        parser = self._subparsers.add_parser(
            name,
            help=summary,
            description=description,
            epilog=f"example: python -m trainer {example}",
        )
        parser.set_defaults(command=self._handlers[name])
        return parser

    def finish(self, parser: argparse.ArgumentParser) -> None:
        """Adds what every command has, once all are there."""
        verbosity.add_common_options(parser, self._subparsers)

    def add_hidden(self, name: str) -> argparse.ArgumentParser:
        """Adds the launcher's own command, which no help lists."""
        parser = self._subparsers.add_parser(name)
        parser.set_defaults(command=self._handlers[name])
        return parser


def make_parser(handlers: Mapping[str, Handler]) -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = TrainerParser(
        prog="python -m trainer",
        description="Train the two-tower AlexNet of 2012, one process per tower, and look at what came of it.",
        epilog=f"example: {TRAIN_EXAMPLE}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = Commands(parser, handlers)
    _add_train(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_features(commands)
    _add_neighbours(commands)
    _add_config(commands)
    _add_describe(commands)
    _add_report(commands)
    _add_export(commands)
    _add_import(commands)
    _add_bench(commands)
    _add_experiment(commands)
    commands.finish(parser)
    return parser


def _recipe_options(parser: argparse.ArgumentParser) -> None:
    """Where the recipe comes from."""
    parser.add_argument(
        "--config", type=Path, metavar="TOML", help="recipe, for example configs/paper.toml (the default)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one field")


def _positive(text: str) -> int:
    """A whole number from 1."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return int(text)


def _positive_number(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return number


def _folder(parser: argparse.ArgumentParser, name: str, text: str, *, required: bool = True) -> None:
    """An option that names a folder."""
    parser.add_argument(name, type=Path, required=required, metavar="DIR", help=text)


def _device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_device, help="cpu, cuda or cuda:N; a GPU where there is one")


def _backend_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=("auto", "nccl", "gloo"),
        default="auto",
        help="what carries tensors between processes; auto: NCCL where each has a GPU, else gloo; nccl works "
        "for two on one GPU, too",
    )


def _device(text: str) -> str:
    """A device by its name; whether it is here, torch knows."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text}: expected cpu, cuda or cuda:N")
    return text


def _skip_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-list", type=Path, metavar="FILE", help="keys of samples to leave out, one a line (bad images)"
    )


def _profile_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        type=_positive,
        nargs="?",
        const=5,
        default=0,
        metavar="N",
        help="record N steps (default: 5) of every process into RUN/profile: a trace and a table of operators",
    )


def _views_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--views", choices=("center", "ten"), default="center", help="ten: corners, center, mirrored (paper 4.1)"
    )


def _checkpoint_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", default="newest", metavar="WHICH", help="newest (the default), best (top-1), or a step's number"
    )


def _add_train(commands: Commands) -> None:
    train = commands.add(
        "train", "train a recipe on a prepared data set", TRAIN_EXAMPLE.removeprefix("python -m trainer ")
    )
    _recipe_options(train)
    _folder(train, "--data", "data set made by python -m pipeline prepare", required=False)
    _folder(train, "--run", "folder for metrics, checkpoints and report", required=False)
    train.add_argument(
        "--processes",
        type=int,
        choices=(1, 2),
        help="1: both towers here, whatever the environment says; 2: one process per tower (the default where there "
        "are two GPUs, else 1, unless RANK is set)",
    )
    train.add_argument(
        "--replicas", type=_positive, metavar="R", help="pairs of towers that share each batch (default: 1)"
    )
    _device_option(train)
    _backend_option(train)
    train.add_argument(
        "--resume",
        default="never",
        metavar="RUN|auto|never",
        help="RUN: go on with that run; recipe, data set and processes are its own, unless given here. auto: go on "
        "with what is in --run, if anything is (default: never)",
    )
    train.add_argument(
        "--init-from",
        type=Path,
        metavar="FILE|RUN",
        help="begin with the weights of a run, of export, of torchvision's AlexNet, with CaffeNet's names, or of 2012",
    )
    train.add_argument("--new-head", action="store_true", help="of --init-from: fc8 begins new, for other classes")
    train.add_argument(
        "--freeze", type=_names, default=(), metavar="conv1,conv2", help="of --init-from: layers that never change"
    )
    _skip_option(train)
    _profile_option(train)
    train.add_argument(
        "--overwrite", action="store_true", help="replace an old run in the folder; asks first on a terminal"
    )
    train.add_argument("--yes", action="store_true", help="do not ask")
    train.add_argument(
        "--dry-run", action="store_true", help="say what it would take; starts no tower and writes nothing"
    )
    train.add_argument(
        "--print-config", action="store_true", help="print the resolved recipe, as `config` does, and train nothing"
    )
    tower = commands.add_hidden("tower")
    _folder(tower, "--data", "")
    _folder(tower, "--run", "")
    tower.add_argument("--device")
    _backend_option(tower)
    _profile_option(tower)
    _skip_option(tower)


def _add_bench(commands: Commands) -> None:
    bench = commands.add(
        "bench",
        "measure every stage from disk to gradient, and name the limit",
        "bench --config configs/digits.toml --data demo/digits --json demo/bench.json --html demo/bench.html",
    )
    _recipe_options(bench)
    _folder(bench, "--data", "data set to read and train on", required=False)
    bench.add_argument("--synthetic", action="store_true", help="no data set: training on a batch that is always ready")
    bench.add_argument(
        "--processes", type=int, choices=(1, 2), default=1, help="1: both towers here; 2: one process per tower"
    )
    _device_option(bench)
    _backend_option(bench)
    bench.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="length of each measurement, its rounds together (5)"
    )
    bench.add_argument(
        "--batch-sizes", type=_sizes, default=(), metavar="N,N", help="batch sizes to try besides the recipe's"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the result; {node} becomes the machine's name")
    bench.add_argument("--html", type=Path, metavar="FILE", help="write a page about it; {node} as in --json")
    bench.add_argument(
        "--project",
        type=int,
        metavar="N",
        help="a model's rate for up to N processes: on this machine, or with --tower-link a GPU each",
    )
    bench.add_argument("--tower-link", type=float, metavar="GB/S", help="of --project: bandwidth between two towers")
    bench.add_argument("--replica-link", type=float, metavar="GB/S", help="of --project: bandwidth between pairs")
    bench.add_argument(
        "--read", type=Path, nargs="+", metavar="FILE", help="measure nothing: a result of --json again, or all nodes'"
    )
    bench.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="two results of --json side by side")
    tower = commands.add_hidden("bench-tower")
    tower.add_argument("--job", type=Path, required=True)


def _add_experiment(commands: Commands) -> None:
    experiment = commands.add("experiment", experiment_options.SUMMARY, experiment_options.EXAMPLE)
    _recipe_options(experiment)
    experiment_options.add_options(experiment, _positive, _names)
    _device_option(experiment)


def _sizes(text: str) -> tuple[int, ...]:
    """Batch sizes, separated by commas."""
    return tuple(_positive(word) for word in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    """Words, separated by commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _add_evaluate(commands: Commands) -> None:
    evaluate = commands.add(
        "evaluate",
        "top-1 and top-5 of a run on held-out images",
        "evaluate --run demo/run --data demo/digits --per-class --confusion demo/confusion.png",
    )
    _folder(evaluate, "--run", "run with a checkpoint")
    _checkpoint_option(evaluate)
    _folder(evaluate, "--data", "data set (default: where the run's own was)", required=False)
    evaluate.add_argument("--split", help="split of the data set (default: the one the recipe holds out)")
    _views_option(evaluate)
    evaluate.add_argument("--per-class", action="store_true", help="a row for every class, the worst first")
    evaluate.add_argument("--confusion", type=Path, metavar="FILE.png", help="draw which class was taken for which")
    _device_option(evaluate)
    evaluate.add_argument("--json", action="store_true", help="one line of JSON, classes and confusion included")


def _images_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE|FOLDER", help="image files, and folders of them")


def _add_predict(commands: Commands) -> None:
    predict = commands.add(
        "predict",
        "the likeliest classes of your own images",
        "predict cat.jpg holiday/ --run demo/run --html demo/predictions.html",
    )
    _images_argument(predict)
    _folder(predict, "--run", "run with a checkpoint")
    _checkpoint_option(predict)
    _folder(predict, "--data", "data set whose preparation applies (default: the run's own)", required=False)
    _views_option(predict)
    predict.add_argument(
        "--top", type=_positive, default=5, metavar="N", help="classes shown for each image (default: 5)"
    )
    _device_option(predict)
    predict.add_argument("--json", action="store_true", help="a line of JSON for each image instead of the table")
    predict.add_argument("--html", type=Path, metavar="FILE", help=PAGED)


def _net_options(parser: argparse.ArgumentParser) -> None:
    """Which net looks at the images, and which of its layers is asked."""
    _images_argument(parser)
    _folder(parser, "--run", "run with a checkpoint")
    _checkpoint_option(parser)
    _folder(parser, "--data", "data set whose preparation applies (default: the run's own)", required=False)
    parser.add_argument("--layer", choices=LAYERS, default="fc7", help="what it hands to the next layer (default: fc7)")
    _device_option(parser)


def _add_features(commands: Commands) -> None:
    features = commands.add(
        "features",
        "write what a layer says about your own images",
        "features holiday/ --run demo/run --layer fc7 --output holiday.npz",
    )
    _net_options(features)
    features.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="FILE.npz, or FILE.parquet (needs pyarrow)"
    )


def _add_neighbours(commands: Commands) -> None:
    neighbours = commands.add(
        "neighbours",
        "which images are most alike to the net, as in figure 4 of the paper",
        "neighbours cat.jpg --among holiday/ --run demo/run --html neighbours.html",
    )
    _net_options(neighbours)
    neighbours.add_argument(
        "--among",
        type=Path,
        nargs="+",
        metavar="IMAGE|FOLDER",
        help="where to look for them (default: among the images themselves)",
    )
    neighbours.add_argument("--count", type=_positive, default=6, metavar="N", help="shown for each image (default: 6)")
    neighbours.add_argument("--json", action="store_true", help="a line of JSON for each image instead of the table")
    neighbours.add_argument("--html", type=Path, metavar="FILE", help=PAGED)


def _add_config(commands: Commands) -> None:
    config = commands.add(
        "config",
        "a resolved recipe, every field with its meaning, unit, range and default: a recipe itself",
        "config --config configs/paper.toml --set train.epochs=3 > my.toml",
    )
    _recipe_options(config)
    config.add_argument(
        "--markdown", action="store_true", help="all fields and their defaults as docs/config.md, without a recipe"
    )


def _add_describe(commands: Commands) -> None:
    describe = commands.add(
        "describe", "layers, parameters and what crosses between the towers", "describe --config configs/paper.toml"
    )
    _recipe_options(describe)
    describe.add_argument("--json", action="store_true", help="JSON instead of tables")
    describe.add_argument(
        "--scale",
        action="store_true",
        help="what a step sends on 2, 4 ... 512 GPUs; with the options below, a MODEL of its time: "
        "max(loading, compute + crossing + max(0, sum - 2/3 compute) + control), each term's formula printed below the "
        "table; with epoch, evaluation and start-up",
    )
    describe.add_argument(
        "--per-pair", type=_positive, metavar="N", help="images a pair of towers takes in a step (default: the batch)"
    )
    for name, text in (
        ("--bandwidth-gb-s", "of a GPU to other replicas, one way, 1e9 bytes/s"),
        ("--pair-bandwidth-gb-s", "between the towers of a pair (default: the same)"),
        ("--latency-us", "of a message, microseconds"),
        ("--tflops", "what a GPU reaches in training, 1e12 operations/s"),
        ("--loader-images-s", "what one loader reaches alone, images/s (python -m pipeline bench)"),
    ):
        describe.add_argument(name, type=_positive_number, metavar="X", help=f"for --scale: {text}")
    for name, size, text in (
        ("--samples", 1_281_167, "images of an epoch"),
        ("--evaluated", 50_000, "images evaluated after it"),
    ):
        words = f"for --scale: {text} (default: %(default)s, ILSVRC-2012)"
        describe.add_argument(name, type=_positive, metavar="N", default=size, help=words)
    describe.add_argument("--svg", type=Path, metavar="FILE", help="draw the net into FILE instead")


def _add_report(commands: Commands) -> None:
    report = commands.add("report", "write RUN/report.html", "report --run demo/run --data demo/digits")
    _folder(report, "--run", "run")
    _folder(report, "--data", "data set, for the grid of test images", required=False)


def _add_export(commands: Commands) -> None:
    export = commands.add(
        "export", "write a run's weights, both towers as one net", "export --run demo/run --output demo/net.onnx"
    )
    _folder(export, "--run", "run with a checkpoint")
    _checkpoint_option(export)
    _folder(export, "--data", "data set whose preparation applies (default: the run's own)", required=False)
    export.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="FILE.safetensors (weights, with their use) or FILE.onnx",
    )
    export.add_argument(
        "--no-preprocessing",
        action="store_true",
        help="the file takes what the net sees, float32 (N, C, S, S), instead of uint8 crops (N, S, S, C)",
    )


def _add_import(commands: Commands) -> None:
    import_ = commands.add(
        "import",
        "make a run out of exported weights",
        "import --weights net.safetensors --run demo/imported",
    )
    import_.add_argument(
        "--weights",
        type=Path,
        required=True,
        metavar="FILE",
        help="FILE.safetensors of export; or torchvision's AlexNet, CaffeNet's names or a file of 2012, with --config",
    )
    import_.add_argument("--config", type=Path, metavar="TOML", help="recipe (default: the one in the file)")
    import_.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one field")
    _folder(import_, "--run", "folder to make, with a checkpoint of step 0")
    _folder(
        import_, "--data", "data set whose classes and statistics the run keeps (default: the file's)", required=False
    )
