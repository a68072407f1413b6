"""The outputs of ``predict``: a table, lines of JSON, and a page; and which files are meant."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.errors import RunError
from trainer.inference.trained_net import FeatureRow, Prediction
from trainer.report.page import percent, render
from trainer.report.pages import Pages, Place
from twotower import terminal
from twotower.words import json_text, one_line

SHOWN_IN_TABLE = 3  # classes beside the likeliest one that a table row has room for


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and in place of a folder every file in it that is not hidden, at any depth, by name.

    What a file is, its content tells later, not its name.

    Raises:
        RunError: a folder has no files.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        if not inside:
            raise RunError(f"{path} has no files in it: name images, or a folder of them")
        found += inside
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def print_table(results: Sequence[Prediction]) -> None:
    """Prints a row for each image that could be used."""
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("likeliest", overflow="fold")
    table.add_column("", justify="right")
    table.add_column("then", overflow="fold")
    for result in results:
        if result.error:
            continue
        first, *others = result.classes
        then = ", ".join(f"{share.title} {percent(share.probability)}" for share in others[:SHOWN_IN_TABLE])
        shown = [Text(one_line(text)) for text in (str(result.path), first.title, then)]
        table.add_row(shown[0], shown[1], percent(first.probability), shown[2])
    if table.row_count:  # in a file or a pipe no row is broken, so that grep finds a name
        Console(width=None if Console().is_terminal else 10_000).print(table)


def print_json(result: Prediction) -> None:
    """Prints a JSON object: ``image`` and either ``classes``, the likeliest first, or ``error``."""
    row: dict[str, object] = {"image": str(result.path)}
    if result.error:
        row["error"] = result.error
    else:
        row["classes"] = [dataclasses.asdict(share) for share in result.classes]
    print(json_text(row), flush=True)


def print_error(result: Prediction | FeatureRow) -> None:
    """Prints a line on stderr where the image could not be used."""
    if result.error:
        terminal.print_error(f"{result.path}: {result.error}")


def html_pages(path: Path, run: Path, refused: Sequence[Prediction]) -> Pages[Prediction]:
    """Self-contained pages with every image as the net saw it, and what it said; they take used predictions.

    Args:
        path: of the first page.
        run: run folder.
        refused: those without classes, for the end of the last page; may still grow until the pages are closed.
    """
    template = Path(__file__).with_name("predictions.html.j2")

    def draw(used: Sequence[Prediction], place: Place) -> str:
        shown = () if place.after else refused
        return render(template, name=run.resolve().name, used=used, refused=shown, place=place)

    return Pages(path, draw)
