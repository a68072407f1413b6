"""From parsed JSON to dataclasses, for files of anybody: every field there, none besides, each of its type."""

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any


def build(kind: Any, value: Any, where: str = "") -> Any:
    """A value of a type: of a dataclass, of ``tuple``, ``list``, ``dict``, a union, or a plain one.

    A whole number may stand for another, and JSON's lists for tuples. No number is NaN.

    Raises:
        ValueError: naming what is missing, unknown, or of another type.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build_fields(kind, value, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (kind,) = (each for each in inner if each is not type(None))
        return build(kind, value, where)
    if origin is typing.Annotated:
        return build(inner[0], value, where)
    if origin in (tuple, list):
        return origin(_build_items(inner, _of_type(list, value, where), where))
    if origin is dict:
        table = _of_type(dict, value, where)
        return {_key(inner[0], key, where): build(inner[1], each, f"{where}.{key}") for key, each in table.items()}
    return _build_plain(kind, value, where)


def _build_fields(kind: Any, value: Any, where: str) -> Any:
    table, hints = _of_type(dict, value, where), typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in table.keys() - fields.keys():
        raise ValueError(f"{where or 'it'} has an unknown field {name!r}")
    found = {name: build(hints[name], table[name], f"{where}.{name}".lstrip(".")) for name in fields if name in table}
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in found:
            raise ValueError(f"{where or 'it'} has no {name}")
    return kind(**found)


def _build_items(kinds: tuple[Any, ...], values: list[Any], where: str) -> list[Any]:
    """Of ``list[X]`` and ``tuple[X, ...]`` any number, of ``tuple[X, Y]`` one of each."""
    if len(kinds) == 1 or kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(values)
    if len(kinds) != len(values):
        raise ValueError(f"{where} has {len(values)} values, expected {len(kinds)}")
    return [build(kind, value, f"{where}[{i}]") for i, (kind, value) in enumerate(zip(kinds, values, strict=True))]


def _build_plain(kind: Any, value: Any, where: str) -> Any:
    if kind is Path:
        return Path(_of_type(str, value, where))
    if kind is float and type(value) is int and abs(value) < 1 << 1023:
        value = float(value)
    value = _of_type(kind, value, where)
    if kind is float and math.isnan(value):
        raise ValueError(f"{where} is NaN, expected a number")
    return value


def _of_type(kind: type, value: Any, where: str) -> Any:
    if type(value) is not kind:
        names = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}
        shown = "null" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{where or 'it'} is {shown}, expected {names.get(kind, kind.__name__)}")
    return value


def _key(kind: Any, key: str, where: str) -> Any:
    """A key of an object, which JSON has as text."""
    if kind is str:
        return key
    if not (key.isascii() and key.isdigit() and len(key) < 16):
        raise ValueError(f"{where} has the key {key!r}, expected a whole number")
    return int(key)
