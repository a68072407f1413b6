"""Predictions as a table, as lines of JSON, and as a page with the pictures."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.markup import escape as plain
from rich.table import Table

from pipeline.manifest import write_atomic
from trainer.errors import RunError
from trainer.inference.predict import Prediction
from trainer.report.images import SMALL_PX, picture_address
from trainer.report.page import page

SHOWN_IN_TABLE = 3  # classes beside the likeliest one that a table row has room for


def print_table(results: Sequence[Prediction]) -> None:
    """Prints a row for each picture that could be used."""
    table = Table()
    table.add_column("picture", overflow="fold")
    table.add_column("likeliest", overflow="fold")
    table.add_column("", justify="right")
    table.add_column("then", overflow="fold")
    for result in results:
        if result.error:
            continue
        first, *others = result.classes
        then = ", ".join(f"{share.title} {_percent(share.probability)}" for share in others[:SHOWN_IN_TABLE])
        table.add_row(plain(str(result.path)), plain(first.title), _percent(first.probability), plain(then))
    if table.row_count:  # in a file or a pipe no row is broken, so that grep finds a name
        Console(width=None if Console().is_terminal else 10_000).print(table)


def print_json(result: Prediction) -> None:
    """Prints a JSON object: ``picture`` and either ``classes``, the likeliest first, or ``error``."""
    row: dict[str, object] = {"picture": str(result.path)}
    if result.error:
        row["error"] = result.error
    else:
        row["classes"] = [dataclasses.asdict(share) for share in result.classes]
    print(json.dumps(row, ensure_ascii=False), flush=True)


def print_error(result: Prediction) -> None:
    """Prints a line on stderr where the picture could not be used."""
    if result.error:
        print(f"error: {result.path}: {result.error}", file=sys.stderr)


def write_html(path: Path, results: Sequence[Prediction], run: Path) -> None:
    """Writes a self-contained page with every picture as the net saw it, and what it said.

    Raises:
        RunError: the file cannot be written.
    """
    good = [result for result in results if not result.error]
    bad = [result for result in results if result.error]
    name = run.resolve().name
    number = f"{len(good):,} picture" + ("" if len(good) == 1 else "s")
    body = [
        f'<header><p class="kicker">twotower, predictions</p><h1>{escape(name)}</h1>'
        f'<p class="lede">What the net of this run says about {number}, each as the net saw it: the centre crop.</p>'
        "</header>",
        f"<style>{_STYLE}</style>",
        f'<ul class="predictions">{"".join(map(_card, good))}</ul>' if good else "",
        _refused(bad) if bad else "",
    ]
    try:
        write_atomic(path, page(f"{name}: predictions", body).encode())
    except OSError as error:
        raise RunError(f"--html {path} cannot be written: {error.strerror}") from None


_STYLE = (
    ".predictions{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:30px 26px;"
    "list-style:none;margin:34px 0 0;padding:0}"
    '.predictions li{min-width:0;font:13.5px/1.4 "Helvetica Neue",Helvetica,Arial,"Liberation Sans",sans-serif;'
    "font-variant-numeric:tabular-nums;overflow-wrap:anywhere}"
    ".predictions img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:var(--tint);"
    "outline:1px solid var(--hair);outline-offset:-1px}.predictions img.exact{image-rendering:pixelated}"
    ".predictions p{margin:7px 0 8px;color:var(--soft)}.predictions dl{margin:0}"
    ".predictions dt,.predictions dd{margin:0}.predictions dl div{display:grid;"
    "grid-template-columns:minmax(0,1fr) max-content;gap:0 10px}"
    ".predictions .bar{grid-column:1/-1;height:3px;background:var(--tint);margin:1px 0 6px}"
    ".predictions .bar i{display:block;height:100%;background:var(--soft)}"
    ".predictions div:first-child{font-weight:600}.predictions div:first-child .bar i{background:var(--a)}"
)


def _card(result: Prediction) -> str:
    """One picture and its classes."""
    assert result.image is not None
    exact = ' class="exact"' if max(result.image.shape[:2]) <= SMALL_PX else ""
    rows = "".join(
        f"<div><dt>{escape(share.title)}</dt><dd>{_percent(share.probability)}</dd>"
        f'<span class="bar"><i style="width:{100 * share.probability:.1f}%"></i></span></div>'
        for share in result.classes
    )
    title = escape(result.path.name)
    return (
        f'<li><img{exact} alt="{escape(result.path.name, quote=True)}" src="{picture_address(result.image)}">'
        f'<p title="{escape(str(result.path), quote=True)}">{title}</p><dl>{rows}</dl></li>'
    )


def _refused(bad: Sequence[Prediction]) -> str:
    """The files that could not be used, and why."""
    rows = "".join(
        f'<tr><td class="path">{escape(str(result.path))}</td><td>{escape(result.error)}</td></tr>' for result in bad
    )
    return f'<section><h2>Not used</h2><div class="scroll"><table><tbody>{rows}</tbody></table></div></section>'


def _percent(probability: float) -> str:
    """0.973 as ``97.3 %``."""
    return f"{100 * probability:.1f} %"
