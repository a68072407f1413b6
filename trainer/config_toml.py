"""Between TOML and frozen dataclasses: every key known, every value of its field's type, and back to text.

Ninety lines instead of a library (msgspec, dacite): those name an unknown key, but not the nearest known one, and none
of them writes TOML back, which makes RUN/config.toml.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from pipeline import errors
from trainer.errors import RecipeError


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """Raises RecipeError naming the field, its value and what was expected."""
    errors.require(condition, field, value, expected, RecipeError)


def override(table: dict[str, Any], text: str) -> None:
    """Applies one ``section.field=value``, the value in TOML syntax (a bare word is a string)."""
    name, equals, value = text.partition("=")
    require(bool(equals) and "." in name, "--set", text, "section.field=value, for example --set train.epochs=3")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value
    *sections, field = name.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        require(isinstance(table, dict), "--set", text, f"{section} to be a table")
    table[field] = parsed


def build(cls: type, table: Mapping[str, Any], where: str) -> Any:
    """Makes a config dataclass from a TOML table; unknown keys are errors that name the nearest one."""
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.4)
            advice = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(hints)}"
            raise RecipeError(f"unknown field {where}{key}: {advice}")
    for field in dataclasses.fields(cls):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        require(field.name in table or not needed, where.rstrip("."), dict(table), f"a table with {field.name}")
    return cls(**{key: _convert(value, hints[key], f"{where}{key}") for key, value in table.items()})


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Checks one TOML value against a field's type; lists become tuples, whole numbers may stand for floats."""
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, dict), where, value, "a table")
        return build(typing.cast(type, kind), value, f"{where}.")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        require(value in arguments, where, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if isinstance(value, str) and arguments[0] is str:  # --set train.loggers=tensorboard,wandb
            value = [word.strip() for word in value.split(",") if word.strip()]
        require(isinstance(value, list | tuple), where, value, "a list")
        return tuple(_convert(item, arguments[0], where) for item in value)
    if origin in (typing.Union, types.UnionType):
        return _convert(value, next(a for a in arguments if a is not type(None)), where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 1000:
        value = float(value)
    require(type(value) is kind, where, value, f"a value of type {kind.__name__}")
    require(not (kind is float and not math.isfinite(value)), where, value, "a finite number")
    return value


def dump(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """TOML text of ``dataclasses.asdict(config)``: a table a section, nested tables after their section's fields."""
    lines: list[str] = []
    for section, fields in sections.items():
        tables = {key: value for key, value in fields.items() if isinstance(value, dict)}
        plain = {key: value for key, value in fields.items() if key not in tables and value is not None}
        lines += [f"[{section}]", *(f"{key} = {toml_text(value)}" for key, value in plain.items()), ""]
        for name, table in tables.items():
            lines += [f"[{section}.{name}]", *(f"{key} = {toml_text(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


def toml_text(value: Any) -> str:
    """One value: inline tables for dicts in a list, else what JSON and TOML write alike."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_text(item)}" for key, item in value.items() if item is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    return json.dumps(value)
