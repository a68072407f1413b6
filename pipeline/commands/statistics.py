"""``statistics``: mean image and colors of a data set, as numbers and as an image."""

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.manifest import read_manifest
from twotower.verbosity import say_written
from twotower.words import pluralize


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "statistics",
        help="mean image, color covariance, eigenvectors",
        description="Print the statistics of the train split (on 0..255) and draw them: the mean image, and for every\n"
        "eigenvector the mean color from -3 to +3 standard deviations along it.",
        epilog="example: python -m pipeline statistics data/imagenet --image statistics.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the data set")
    parser.add_argument("--image", type=Path, metavar="PNG", help="write them as an image")
    parser.add_argument("--json", action="store_true", help="print JSON (without the mean image)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints and draws."""
    from pipeline.inspection.inspect import draw_statistics, read_statistics

    arrays = read_statistics(args.folder, read_manifest(args.folder))
    numbers = {name: array.tolist() for name, array in arrays.items() if name != "mean_image"}
    numbers["deviations"] = [max(value, 0.0) ** 0.5 for value in numbers["eigenvalues"]]
    if args.json:
        print(json.dumps(numbers))
    else:
        _print(numbers)
    if args.image:
        draw_statistics(arrays).save(args.image, "PNG")
        say_written(args.image)
    return 0


def _print(numbers: dict[str, Any]) -> None:
    counts = pluralize(numbers["num_images"], "image"), pluralize(numbers["num_pixels"], "pixel")
    print(f"{', '.join(counts)}, values on 0..255")
    print(f"mean         {_row(numbers['mean'])}")
    print(f"eigenvalues  {_row(numbers['eigenvalues'])}")
    print(f"deviations   {_row(numbers['deviations'])}   (square roots of the eigenvalues)")
    for row in numbers["eigenvectors"]:
        print(f"eigenvectors {_row(row)}   (one in each column)")


def _row(values: list[float]) -> str:
    return " ".join(f"{value:10.4f}" for value in values)
