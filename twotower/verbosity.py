"""How much a command says: ``--quiet`` and ``--verbose``, one meaning in all three packages.

Quiet: no progress and no remarks; results, warnings and errors stay. Verbose: besides, what happens inside, one line
each with its time, on stderr, and where an error arose. Processes that a command starts inherit it.
"""

import argparse
import logging
import os
import sys
from typing import Any

from twotower.addresses import masked
from twotower.version import ShowVersion
from twotower.words import one_line

VARIABLE = "TWOTOWER_VERBOSITY"
LEVELS = ("quiet", "normal", "verbose")
log = logging.getLogger("twotower")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the two options; to be given before a command or after it."""
    group = parser.add_mutually_exclusive_group()
    about = {"dest": "verbosity", "action": "store_const", "default": argparse.SUPPRESS}
    text = "no progress and no remarks: results, warnings and errors only"
    group.add_argument("--quiet", "-q", const="quiet", help=text, **about)  # type: ignore[arg-type]
    text = "say on stderr what happens inside, with times, and where an error arose"
    group.add_argument("--verbose", "-v", const="verbose", help=text, **about)  # type: ignore[arg-type]


def add_common_options(parser: argparse.ArgumentParser, commands: argparse._SubParsersAction) -> None:
    """Adds ``--version`` to a program, ``--quiet`` and ``--verbose`` to it and to each of its commands."""
    parser.add_argument("--version", action=ShowVersion)
    add_options(parser)
    for command in set(commands.choices.values()):
        add_options(command)


def apply(arguments: argparse.Namespace) -> None:
    """Makes the options hold, in this process and in those that it starts; ends it where the variable has no sense."""
    level = getattr(arguments, "verbosity", None) or os.environ.get(VARIABLE) or "normal"
    if level not in LEVELS:
        print(f"error: {VARIABLE} is {level!r}: expected one of {', '.join(LEVELS)}", file=sys.stderr)
        raise SystemExit(2)
    if level != "normal":
        os.environ[VARIABLE] = level
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.DEBUG if level == "verbose" else logging.CRITICAL)
    if level == "verbose":
        handler = logging.StreamHandler()
        handler.setFormatter(_Lines("%(asctime)s [%(process)d] %(message)s"))
        log.addHandler(handler)


def is_quiet() -> bool:
    """Whether progress and remarks are unwanted."""
    return os.environ.get(VARIABLE) == "quiet"


def remark(text: str, *, stdout: bool = False) -> None:
    """Prints a line that a quiet command leaves out."""
    if not is_quiet():
        print(one_line(masked(text)), file=sys.stdout if stdout else sys.stderr, flush=True)


class _Lines(logging.Formatter):
    """A message in one line; an error's trace below it, indented, so that no line of it can pass for one of ours."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(masked(super().formatMessage(record)))

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"    {one_line(masked(line))}" for line in super().formatException(ei).split("\n"))


def say_written(path: object) -> None:
    """Names a file that was written besides the result, on stderr: stdout may be JSON."""
    remark(f"wrote {path}")
