"""Words for people."""

from collections.abc import Iterable

IRREGULAR = {"class": "classes", "index": "indexes", "batch": "batches", "process": "processes", "this": "these"}

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
    """Text with every character that is not printed escaped: a file's name may hold newlines and terminal codes."""
    if text.isprintable():
        return text
    return "".join(map(_escaped, text))


def _escaped(sign: str) -> str:
    if sign.isprintable():
        return sign
    if "\udc80" <= sign <= "\udcff":  # a byte of a path that is no UTF-8
        return f"\\x{ord(sign) - 0xDC00:02x}"
    return sign.encode("unicode_escape", "surrogatepass").decode()
