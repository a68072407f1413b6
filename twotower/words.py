"""Words for people: also names that a stranger chose, so that none of them can write a line of its own."""

import json
import re
from collections.abc import Iterable
from typing import Any, TextIO

IRREGULAR = {"class": "classes", "index": "indexes", "batch": "batches", "process": "processes", "this": "these"}
# Printed by Python's own measure, and yet nothing is seen: fillers of Hangul, an empty Braille cell, what joins letters
# and what chooses a variant of one. Two names that look alike would be two. (Marks that turn the direction of writing,
# spaces without width, escapes and bells are not printable by that measure.)
UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")

MOST_OF_A_LINE = 4000  # characters of an error: a message that had to name a million things would hide them all


def pluralize(number: int, noun: str) -> str:
    """``1 step``, ``1,437 steps``, ``2 damaged indexes``."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """The plural of a noun, whatever stands before it."""
    before, space, last = noun.rpartition(" ")
    return before + space + IRREGULAR.get(last, f"{last}s")


def listed(names: Iterable[object], *, most: int = 8, between: str = ", ") -> str:
    """``a, b, c``; of more than ``most`` names the first, and how many there are: ``a, b, ... (3,000)``.

    A message stays readable whatever a folder, an archive or a list holds; each name is cut, see :func:`cut`.
    """
    words = list(names)
    shown = between.join(cut(str(word)) for word in words[:most])
    return shown if len(words) <= most else f"{shown}{between}... ({len(words):,})"


def cut(text: str, length: int = 200) -> str:
    """A text of at most ``length`` characters; of a longer one its beginning and its end."""
    if len(text) <= length:
        return text
    return f"{text[: length * 2 // 3]}...{text[-(length // 3) :]}"


def one_line(text: str) -> str:
    """Text with every character that is not seen escaped: a name may hold newlines, terminal codes, marks of direction.

    The one way of all three packages to show what a stranger may have named: files, classes, keys, jobs, errors.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_escaped, text))


def lines_of(text: str) -> str:
    """Text of several lines that are ours, each of them shown as :func:`one_line` does."""
    return "\n".join(map(one_line, text.split("\n")))


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line, whatever names are in it."""
    print(one_line(text), file=file, flush=True)


def say_lines(lines: Iterable[str]) -> None:
    """Prints lines, each as :func:`say` does."""
    for line in lines:
        say(line)


def shortened(value: object, most: int = 60) -> str:
    """How Python writes a value, in one line of at most so many characters."""
    text = one_line(repr(value[: most * 8] if isinstance(value, str | bytes | list | tuple) else value))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON for people and programs: letters stay as they are, what one does not see is escaped as JSON does."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    if text.isascii() and "\x7f" not in text:
        return text
    return "".join(sign if _is_seen(sign) or sign == "\n" else _in_json(sign) for sign in text)


def _is_seen(sign: str) -> bool:
    return sign.isprintable() and not UNSEEN.match(sign)


def _in_json(sign: str) -> str:
    return r"\u007f" if sign == "\x7f" else json.dumps(sign)[1:-1]


def _escaped(sign: str) -> str:
    if _is_seen(sign):
        return sign
    if "\udc80" <= sign <= "\udcff":  # a byte of a path that is no UTF-8
        return f"\\x{ord(sign) - 0xDC00:02x}"
    return sign.encode("unicode_escape", "surrogatepass").decode()
