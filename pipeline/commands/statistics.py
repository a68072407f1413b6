"""``statistics``: mean image and colours of a data set, as numbers and as a picture."""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import DatasetError
from pipeline.manifest import STATISTICS_NAME, read_manifest

SIDE_PX = 256
STEPS = (-3, -2, -1, 0, 1, 2, 3)  # standard deviations along an eigenvector


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "statistics",
        help="mean image, colour covariance, eigenvectors",
        description="Print the statistics of the train split (on 0..255) and draw them: the mean image, and for every\n"
        "eigenvector the mean colour from -3 to +3 standard deviations along it.",
        epilog="example: python -m pipeline statistics data/imagenet --picture statistics.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the data set")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="write them as a picture")
    parser.add_argument("--json", action="store_true", help="print JSON (without the mean image)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints and draws."""
    manifest = read_manifest(args.folder)
    if STATISTICS_NAME not in manifest.files:
        raise DatasetError(f"{args.folder} has no train split, so it has no statistics")
    try:
        with np.load(args.folder / STATISTICS_NAME, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise DatasetError(f"{args.folder / STATISTICS_NAME}: {error}: run prepare again") from None
    numbers = {name: array.tolist() for name, array in arrays.items() if name != "mean_image"}
    numbers["deviations"] = np.sqrt(np.maximum(arrays["eigenvalues"], 0)).tolist()
    if args.json:
        print(json.dumps(numbers))
    else:
        _print(numbers)
    if args.picture:
        draw(arrays).save(args.picture, "PNG")
    return 0


def draw(arrays: dict[str, np.ndarray]) -> Image.Image:
    """The mean image (or mean colour) beside the colours along the eigenvectors."""
    channels = len(arrays["mean"])
    mean = arrays.get("mean_image")
    left = np.broadcast_to(arrays["mean"], (SIDE_PX, SIDE_PX, channels)) if mean is None else mean
    picture = Image.new("RGB", (2 * SIDE_PX, SIDE_PX))
    picture.paste(_image(left).resize((SIDE_PX, SIDE_PX), Image.Resampling.NEAREST), (0, 0))
    deviations = np.sqrt(np.maximum(arrays["eigenvalues"], 0))
    steps = np.array(STEPS)[None, :, None]
    colours = arrays["mean"] + steps * (deviations[:, None] * arrays["eigenvectors"].T)[:, None, :]  # (C, 7, C)
    picture.paste(_image(colours).resize((SIDE_PX, SIDE_PX), Image.Resampling.NEAREST), (SIDE_PX, 0))
    return picture


def _image(values: np.ndarray) -> Image.Image:
    pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")


def _print(numbers: dict[str, list]) -> None:
    print(f"{numbers['num_pictures']:,} pictures, {numbers['num_pixels']:,} pixels, values on 0..255")
    print(f"mean         {_row(numbers['mean'])}")
    print(f"eigenvalues  {_row(numbers['eigenvalues'])}")
    print(f"deviations   {_row(numbers['deviations'])}   (square roots of the eigenvalues)")
    for row in numbers["eigenvectors"]:
        print(f"eigenvectors {_row(row)}   (one in each column)")


def _row(values: list[float]) -> str:
    return " ".join(f"{value:10.4f}" for value in values)
