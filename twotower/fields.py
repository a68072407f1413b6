"""How a setting is declared: what it must be and its unit stand beside its type, ``Annotated[int, Limits(1)]``.

What refuses a value and what tells people the range read the same declaration. Its meaning is the class's docstring.
"""

import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

MAY_CHANGE = "may_change"  # in a field's metadata: it may while a run is under way; it decides no weight, no pixel
DERIVED = "derived"  # in a field's metadata: another setting decides it, so it is none itself
COUNTS = {2: "two", 5: "five", 8: "eight"}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a value must be; of a list, what each of its values must be, however deep they lie.

    Attributes:
        low, high: inclusive ends.
        above, below: exclusive ends.
        odd: an odd number.
        besides: one number more, whatever the ends.
        besides_means: what that number means.
        choices: words or numbers; where they are a type of their own, it is ``Literal``.
        length: of a list; 0: any.
        order: what the values of a list of some length belong to.
        pairs: they are pairs.
        unit: of the number, as text.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    odd: bool = False
    besides: float | None = None
    besides_means: str = ""
    choices: tuple[Any, ...] = ()
    length: int = 0
    order: str = ""
    pairs: bool = False
    unit: str = ""

    def allows(self, value: Any) -> bool:
        """Whether a single number or word is allowed."""
        if self.besides is not None and value == self.besides:
            return True
        if self.choices or isinstance(value, str | bool):
            return value in (self.choices or (value,))
        ends = (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        open_ends = (self.above is None or value > self.above) and (self.below is None or value < self.below)
        return ends and open_ends and not (self.odd and value % 2 == 0)

    def words(self, *, listed: bool) -> str:
        """What is allowed, as the end of ``expected ...``; empty where everything is."""
        each = self._each()
        each = f"each {each}" if each and listed else each
        count = f"{COUNTS[self.length]} {'pairs' if self.pairs else 'values'}, {self.order}" if self.length else ""
        return ", ".join(filter(None, (count, each)))

    def _each(self) -> str:
        besides = f", or {self.besides:g} {self.besides_means}" if self.besides is not None else ""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}{besides}"
        low = self.low if self.low is not None else self.above
        high = self.high if self.high is not None else self.below
        if low is None:
            return ""
        if high is None:
            text = f"{low:,} or more" if self.low is not None else f"more than {low:,}"
        else:
            text = f"{low:,} to {high:,}" + (f", without {low:,}" if self.above is not None else "")
            text += f", without {high:,}" if self.below is not None else ""
        odd = "an odd number, " if self.odd else ""
        return f"{odd}{text}{besides}"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of a recipe, for people.

    Attributes:
        name: of the field.
        meaning: its sentence in the docstring of its class.
        values: what it may be.
        unit: of its number, or empty.
        default: its value where a recipe does not say; ``dataclasses.MISSING`` where it must.
        may_change: while a run is under way.
        table: the class of its own fields, where it is a table of a recipe or a list of such.
    """

    name: str
    meaning: str
    values: str
    unit: str
    default: Any
    may_change: bool
    table: type | None


def may_change(default: Any) -> Any:
    """A field with :data:`MAY_CHANGE`; all others are what they were when the run began."""
    return dataclasses.field(default=default, metadata={MAY_CHANGE: True})


def derived(default: Any) -> Any:
    """A field that another setting decides: no recipe has it."""
    return dataclasses.field(default=default, metadata={DERIVED: True})


def check(settings: Any, where: str, require: Callable[[bool, str, Any, str], None]) -> None:
    """Checks type and limits of every field of a dataclass.

    Args:
        settings: its instance.
        where: name of its table.
        require: raises where its first argument is false, with field, value and what was expected.
    """
    cls: Any = type(settings)
    for name, (kind, limits) in _declarations(cls).items():
        value, field = getattr(settings, name), f"{where}.{name}"
        if value is None and type(None) in typing.get_args(kind):
            continue
        expected = _type_words(kind)
        for leaf in _leaves(value):
            require(not expected or _has_type(leaf, kind), field, value, expected)
        counted = not limits.length or len(value) == limits.length
        paired = not limits.pairs or all(len(pair) == 2 for pair in value)
        holds = counted and paired and all(map(limits.allows, _leaves(value)))
        require(holds, field, value, limits.words(listed=_is_list(kind)))


def settings_of(cls: Any) -> list[Setting]:
    """Every field of a dataclass that a recipe may have, in order, with all that is declared of it."""
    meanings = read_attributes(cls)
    found = []
    for field in dataclasses.fields(cls):
        if field.metadata.get(DERIVED):
            continue
        kind, limits = _declarations(cls)[field.name]
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        values = ", ".join(filter(None, (_kind_words(kind, limits), limits.words(listed=_is_list(kind)))))
        change, table = bool(field.metadata.get(MAY_CHANGE)), _table_of(kind)
        found.append(Setting(field.name, meanings[field.name], values, limits.unit, default, change, table))
    return found


def read_attributes(cls: type) -> dict[str, str]:
    """The ``Attributes:`` of a Google-style docstring, each as one line of text."""
    text = inspect.getdoc(cls) or ""
    body = re.split(r"^\w+:\n", text.partition("Attributes:\n")[2], flags=re.MULTILINE)[0]
    found: dict[str, str] = {}
    for name, meaning in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", body, re.MULTILINE):
        for each in name.split(", "):
            found[each] = " ".join(meaning.split())
    return found


@functools.cache
def _declarations(cls: Any) -> dict[str, tuple[Any, Limits]]:
    """Type and limits of every field."""
    found = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        more = getattr(hint, "__metadata__", ())
        limits = next((extra for extra in more if isinstance(extra, Limits)), Limits())
        found[name] = (hint.__origin__ if more else hint, limits)
    return found


def _leaves(value: Any) -> Iterator[Any]:
    """The single values of nested lists."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _leaf_type(kind: Any) -> Any:
    """The type of the single values: ``int`` of ``tuple[tuple[int, ...], ...]``."""
    while typing.get_origin(kind) in (tuple, typing.Union, types.UnionType):
        kind = typing.get_args(kind)[0]
    return kind


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a single value is of a field's type; a whole number may stand for another, and none may be infinite."""
    leaf = _leaf_type(kind)
    if typing.get_origin(leaf) is typing.Literal:
        return any(value == word and type(value) is type(word) for word in typing.get_args(leaf))
    if leaf is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is leaf


def _type_words(kind: Any) -> str:
    """What a value of another type is told; empty for a table, which checks itself."""
    leaf = _leaf_type(kind)
    if typing.get_origin(leaf) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(leaf)))}"
    return {int: "a whole number", float: "a finite number", bool: "true or false", str: "a word"}.get(leaf, "")


def _kind_words(kind: Any, limits: Limits) -> str:
    """A type for people."""
    words = _type_words(kind).removeprefix("a ").removeprefix("finite ") or "table"
    words = f"list of {words}s" if _is_list(kind) else "" if limits.choices else words
    return f"{words}, or left out" if type(None) in typing.get_args(kind) else words


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _table_of(kind: Any) -> type | None:
    leaf = _leaf_type(kind)
    return leaf if dataclasses.is_dataclass(leaf) and isinstance(leaf, type) else None
