"""Words for people."""

IRREGULAR = {"class": "classes", "index": "indexes", "batch": "batches", "process": "processes", "this": "these"}


def pluralize(number: int, noun: str) -> str:
    """``1 step``, ``1,437 steps``, ``2 damaged indexes``."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """The plural of a noun, whatever stands before it."""
    before, space, last = noun.rpartition(" ")
    return before + space + IRREGULAR.get(last, f"{last}s")
