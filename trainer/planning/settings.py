"""Every setting of a recipe for people: as a recipe with comments, and as ``docs/config.md``.

Both come from the docstrings and the declared limits of the recipe's classes (``twotower.fields``).
"""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from trainer.config import Config
from trainer.config_toml import toml_text
from twotower.fields import Setting, settings_of

WIDTH = 100
HEAD = """\
# Settings of a recipe

Written by `make docs` (`python -m trainer config --markdown`) from the code that checks them; do not edit it here.

`python -m trainer config --config configs/paper.toml` prints a recipe with all of this as comments, and
`--set SECTION.FIELD=VALUE` of any command changes one field. A field that a recipe leaves out has its default.
"Resume" says whether a run may go on with another value (`train --resume`).
"""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a recipe.

    Attributes:
        name: ``model.lrn``.
        cls: its dataclass.
        value: what a recipe has there; None for the rows of a list of tables, which have no place of their own.
    """

    name: str
    cls: Any
    value: Any


def tables_of(config: Config) -> Iterator[Table]:
    """Every table of a recipe, those within another one after it."""
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        yield Table(section.name, type(value), value)
        for setting in settings_of(type(value)):
            if setting.table:
                inner = getattr(value, setting.name)
                yield Table(f"{section.name}.{setting.name}", setting.table, None if _is_list(inner) else inner)


def commented_recipe(config: Config) -> str:
    """The resolved recipe as TOML, each field with its meaning, range, unit and default; it reads back as itself."""
    lines = []
    for table in tables_of(config):
        if table.value is None:
            continue
        lines += [*_comment(_intro(table.cls)), f"[{table.name}]", ""]
        for setting in settings_of(table.cls):
            value = getattr(table.value, setting.name)
            if not dataclasses.is_dataclass(value):
                lines += [*_comment(_about(setting)), f"{setting.name} = {toml_text(_plain(value))}", ""]
    return "\n".join(lines)


def settings_page() -> str:
    """``docs/config.md``."""
    lines = [HEAD]
    for table in tables_of(Config()):
        kind = f"[{table.name}]" if table.value is not None else f"a row of {table.name}"
        lines += [f"## {kind}", "", _markdown(_intro(table.cls)), ""]
        lines += ["| field | default | values | unit | resume | meaning |", "|---|---|---|---|---|---|"]
        for setting in settings_of(table.cls):
            if not (setting.table and dataclasses.is_dataclass(setting.default)):
                cells = (f"`{setting.name}`", _default(setting, code=True), setting.values, setting.unit)
                more = ("may change" if setting.may_change else "", _markdown(setting.meaning))
                lines.append("| " + " | ".join((*cells, *more)) + " |")
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def _about(setting: Setting) -> str:
    """Meaning and limits of a field in one text."""
    words = [setting.values, f"in {setting.unit}" if setting.unit else "", f"default {_default(setting)}"]
    words += ["may change on resume" if setting.may_change else ""]
    meaning = setting.meaning.replace("``", "")
    return f"{meaning[0].upper()}{meaning[1:]} ({'; '.join(filter(None, words))})"


def _default(setting: Setting, *, code: bool = False) -> str:
    """A default as a recipe would say it."""
    if setting.default is dataclasses.MISSING:
        return "none, must be given" if not code else "must be given"
    text = "left out" if setting.default is None else toml_text(_plain(setting.default))
    return f"`{text}`" if code and setting.default is not None else text


def _plain(value: Any) -> Any:
    """What :func:`dataclasses.asdict` makes of a table within a list."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _intro(cls: Any) -> str:
    """The first paragraph of a class's docstring."""
    return " ".join((cls.__doc__ or "").partition("\n\n")[0].split())


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text.replace("``", ""), WIDTH, initial_indent="# ", subsequent_indent="# ")


def _markdown(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|").replace("*sum*", "sum")


def _is_list(value: Any) -> bool:
    return isinstance(value, tuple)
