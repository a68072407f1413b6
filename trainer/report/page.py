"""The report as one HTML page: style, figures with captions, tables. Pure text from plain data."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

CODE = ("Commit", "Command")  # facts set as code
STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def page(title: str, body: Iterable[str], *, style: str = "") -> str:
    """A whole document that asks for nothing outside itself; ``style`` is CSS besides the report's."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n'
        f"<body><main>\n{chr(10).join(part for part in body if part)}\n</main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A headed part of the page."""
    inner = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{inner}</section>"


def missing(sentence: str) -> str:
    """What stands in the place of a part that cannot be shown, and why."""
    return f'<p class="missing">{escape(sentence)}</p>'


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def figure(content: str, caption: str) -> str:
    """A figure; the caption's part before its first full stop is set bold."""
    head, stop, rest = caption.partition(". ")
    return f"<figure>{content}<figcaption><b>{escape(head + stop.strip())}</b> {escape(rest)}</figcaption></figure>"


def headline(figures: Sequence[tuple[str, str, str]]) -> str:
    """The large figures: (what, figure, small print)."""
    items = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(number)}<small>{escape(small)}</small></dd></div>"
        for what, number, small in figures
    )
    return f'<dl class="headline">{items}</dl>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Name and value pairs; pairs without a value are left out."""
    shown = [
        (name, f"<code>{escape(value)}</code>" if name in CODE else escape(value)) for name, value in rows if value
    ]
    items = "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in shown)
    return f'<dl class="facts">{items}</dl>'


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = (), sums: Sequence[int] = ()
) -> str:
    """A table; ``numbers`` are right-aligned columns, ``sums`` are rows set as totals."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if column in numbers else ''}>{escape(text)}</{tag}>"
            for column, text in enumerate(row)
        )

    body = "".join(
        f"<tr{' class=sum' if index in sums else ''}>{cells(row, 'td')}</tr>" for index, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def links(rows: Sequence[tuple[str, str]]) -> str:
    """Paths inside the run folder, as links relative to the page, and what each holds."""
    body = "".join(
        f'<tr><td class="path"><a href="{escape(path, quote=True)}">{escape(path)}</a></td><td>{escape(what)}</td></tr>'
        for path, what in rows
    )
    return f'<div class="scroll"><table><tbody>{body}</tbody></table></div>'
