"""Command lines whose mistakes are one line: a parser that names the nearest word instead of listing all."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from twotower.words import one_line


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The likeliest of the known words that was meant, "" if none is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else ""


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations. What is wrong is one line on stderr, and exit code 2.

    Commands without a help text are not offered: they are our own.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def hint(self, option: str, value: str | None) -> str:
        """What to do instead of an option that there is not, "" if nothing is known; ``value``: what followed it."""
        near = nearest(option, self._option_string_actions)
        return f"did you mean {near}?" if near else ""

    def parse_known_args(  # type: ignore[override]  # of three forms in the library's types
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As the library's, but an unknown option is said before what is missing because of it."""
        words = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:  # a command's own parser
            self._refuse_unknown(words)
        return super().parse_known_args(words, namespace)

    def _refuse_unknown(self, words: list[str]) -> None:
        for position, word in enumerate(words):
            option, equals, value = word.partition("=")
            if word == "--":
                return
            if word.startswith("--") and option not in self._option_string_actions:
                after = words[position + 1] if position + 1 < len(words) else "-"
                given = value if equals else None if after.startswith("-") else after
                self.error(f"unknown option {option}" + (f": {hint}" if (hint := self.hint(option, given)) else ""))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            offered = [choice.dest for choice in action._choices_actions]
            near = nearest(str(value), offered)
            advice = f"did you mean {near}?" if near else f"expected one of {', '.join(offered)}"
            self.error(f"unknown command {value!r}: {advice}")
        super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        """Ends with one line."""
        self.exit(2, f"error: {one_line(message)} (see {self.prog} --help)\n")
