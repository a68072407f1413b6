"""``python -m pipeline COMMAND``: prepare data sets and look after them.

A command is a module of ``pipeline.commands`` with ``add_parser(subparsers)``, which sets ``run=`` to a function that
takes the parsed arguments and returns the exit code, and one name in :data:`COMMANDS`. Heavy imports go into ``run``.
"""

import twotower.linux_only  # noqa: F401  before all that other systems lack

# isort: split
import argparse
import importlib
import os
import signal
import sys

from pipeline.errors import PipelineError
from twotower import verbosity

COMMANDS = ("prepare", "verify", "status", "inspect", "statistics", "reindex", "bench")
EXIT_CODES = "exit codes: 0 done, 1 a bug of ours, 2 something to fix (one line says what), 130 and 143 stopped"


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Prepare data sets once (Ray), read them with DALI.",
        epilog=f"example: python -m pipeline prepare --source digits --output data/digits\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
        return args.run(args)
    except PipelineError as error:
        verbosity.log.debug("the error arose here:", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing half-done is left under a final name", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output, head for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
