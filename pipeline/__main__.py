"""``python -m pipeline COMMAND``: prepare data sets and look after them.

A command is a module of ``pipeline.commands`` with ``add_parser(subparsers)``, which sets ``run=`` to a function that
takes the parsed arguments and returns the exit code, and one name in :data:`COMMANDS`. Heavy imports go into ``run``.
"""

import twotower.linux_only  # noqa: F401  before all that other systems lack

# isort: split
from pipeline import signals

if __name__ == "__main__":
    signals.listen()  # before anything else is imported

import argparse
import importlib
import sys

from pipeline.errors import PipelineError
from pipeline.preparation import faults
from twotower import verbosity
from twotower.command_line import Parser
from twotower.words import MOST_OF_A_LINE, cut, one_line

COMMANDS = ("prepare", "verify", "status", "inspect", "statistics", "reindex", "bench")
EXIT_CODES = (
    "exit codes: 0 done, 1 a bug of ours, 2 something to fix (one line says what), 3 some images could not be used "
    "(prepare), 128 + N ended by signal N; those of all commands are in docs/commands.md"
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = Parser(
        prog="python -m pipeline",
        description="Prepare data sets once (Ray), read them with DALI.",
        epilog=f"example: python -m pipeline prepare --source digits --output data/digits\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"pipeline.commands.{name}").add_parser(subparsers)
    verbosity.add_common_options(parser, subparsers)
    return parser


def main() -> int:
    """Runs a command; errors that the user can fix are one line on stderr."""
    args = make_parser().parse_args()
    verbosity.apply(args)
    try:
        faults.reach("command")
        return args.run(args)
    except PipelineError as error:
        verbosity.log.debug("the error arose here:", exc_info=True)
        print(f"error: {cut(one_line(str(error)), MOST_OF_A_LINE)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(signals.supervise(main))
