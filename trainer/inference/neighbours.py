"""Images that are most alike to a net: the smallest Euclidean distances of a layer's values (paper, section 6.1)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.errors import RunError
from trainer.inference.trained_net import FeatureRow
from trainer.report.page import render
from trainer.report.pages import Pages, Place
from twotower.words import json_text, one_line

SHOWN_IN_TABLE = 3


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """An image and its distance.

    Attributes:
        row: the image.
        distance: Euclidean, of the layer's values.
    """

    row: FeatureRow
    distance: float


@dataclasses.dataclass(frozen=True)
class Neighbourhood:
    """An image and those nearest to it.

    Attributes:
        row: the image.
        nearest: nearest first; never the image's own file.
    """

    row: FeatureRow
    nearest: tuple[Neighbour, ...]


def find_neighbours(asked: Sequence[FeatureRow], among: Sequence[FeatureRow], count: int) -> list[Neighbourhood]:
    """The ``count`` nearest of every image.

    Args:
        asked: images with values.
        among: images with values, to look for neighbours in; an image's own file is passed over.
        count: most neighbours an image, >= 1.

    Raises:
        RunError: there is nothing to compare with.
    """
    if not asked:
        raise RunError("none of the images could be used: there is nothing to compare")
    files = [row.path.resolve() for row in among]
    codes = np.stack([_code(row) for row in among]) if among else np.zeros((0, 1))
    found = []
    for row in asked:
        own = row.path.resolve()
        distances = np.sqrt(np.square(codes - _code(row)).sum(1)) if len(codes) else np.zeros(0)
        order = [place for place in np.argsort(distances, kind="stable").tolist() if files[place] != own]
        nearest = tuple(Neighbour(among[place], float(distances[place])) for place in order[:count])
        found.append(Neighbourhood(row, nearest))
    if not any(each.nearest for each in found):
        raise RunError("there is one image only: name several, or where to look with --among FOLDER")
    return found


def _code(row: FeatureRow) -> np.ndarray:
    assert row.values is not None
    return row.values.reshape(-1).astype(np.float64)


def _short(path: Path) -> str:
    """The file's name and its folder's, which is often its class."""
    return "/".join(path.parts[-2:])


def print_table(found: Sequence[Neighbourhood]) -> None:
    """Prints a row for each image."""
    table = Table()
    for heading in ("image", "nearest", "then"):
        table.add_column(heading, overflow="fold")
    for each in found:
        names = [f"{near.row.path} ({near.distance:.3g})" for near in each.nearest]
        table.add_row(
            *(Text(one_line(text)) for text in (str(each.row.path), names[0], ", ".join(names[1 : 1 + SHOWN_IN_TABLE])))
        )
    Console(width=None if Console().is_terminal else 10_000).print(table)


def print_json(found: Sequence[Neighbourhood]) -> None:
    """Prints a JSON object for each image: ``image`` and ``nearest``."""
    for each in found:
        nearest = [{"image": str(near.row.path), "distance": near.distance} for near in each.nearest]
        print(json_text({"image": str(each.row.path), "nearest": nearest}), flush=True)


def write_html(
    path: Path, found: Sequence[Neighbourhood], refused: Sequence[FeatureRow], run: Path, layer: str
) -> None:
    """Writes self-contained pages: a row for each image, the image first.

    Raises:
        RunError: a file cannot be written.
    """
    template = Path(__file__).with_name("neighbours.html.j2")

    def draw(rows: Sequence[Neighbourhood], place: Place) -> str:
        values = {"found": rows, "refused": () if place.after else refused, "place": place}
        return render(template, name=run.resolve().name, layer=layer, name_of=_short, **values)

    pages = Pages(path, draw)
    for each in found:
        pages.add(each)
    pages.close()
