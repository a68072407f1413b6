"""The options of ``python -m trainer experiment``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.experiments.catalog import EXPERIMENTS

EXAMPLE = "experiment ablations --config configs/fashion-short.toml --data data/fashion --output experiments/ablations"
ONE_WEIRD_TRICK = "one-weird-trick"  # has no variants and trains no runs: trainer.experiments.one_weird_trick
NAMES = (*EXPERIMENTS, ONE_WEIRD_TRICK)
SUMMARY = "one of the paper's experiments: every variant with every seed, intervals, and a page"


def add_options(parser: argparse.ArgumentParser, number: Callable[[str], int], names: Callable[[str], Any]) -> None:
    """Adds what is not common to several commands.

    Args:
        parser: of the command.
        number: reads a whole number from 1.
        names: reads words separated by commas.
    """
    add = parser.add_argument
    add("name", choices=NAMES, metavar="NAME", help=f"one of {', '.join(NAMES)}")
    add("--data", type=Path, required=True, metavar="DIR", help="data set made by python -m pipeline prepare")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="the experiment's folder; the same command goes on with what is in it",
    )
    add(
        "--seeds",
        type=number,
        default=5,
        metavar="N",
        help="runs of each variant, from the recipe's seed on (default: 5)",
    )
    add("--variants", type=names, default=(), metavar="A,B", help="only these, and what they are compared with")
    add("--parallel", type=number, default=1, metavar="N", help="runs at once on this machine (default: 1)")
    add(
        "--processes",
        type=int,
        choices=(1, 2),
        default=1,
        help="of each run, see train (default: 1; a variant that needs two has two)",
    )
    add("--address", metavar="A", help="run on a Ray cluster: auto, or HOST:PORT; its nodes see the same folders")
    add("--cpus", type=number, metavar="N", help="cores of a run (default: an equal share; on a cluster one a process)")
    add("--gpus", type=int, default=0, metavar="N", help="GPUs of a run on a cluster (default: 0)")
    add("--dry-run", action="store_true", help="say how many runs, hours and bytes; writes nothing")
