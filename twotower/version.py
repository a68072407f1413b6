"""Which twotower this is: its version and, in a checkout, its commit."""

import argparse
import os
import subprocess
from pathlib import Path
from typing import Any

from twotower import __version__

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "TWOTOWER_COMMIT"  # a Ray job runs in a copy of the tree without history


def describe() -> str:
    """``twotower 0.1.0, commit 949cfae47b48``; without a commit where none is known."""
    commit = find_commit()
    return f"twotower {__version__}" + (f", commit {commit}" if commit else "")


def find_commit() -> str:
    """Commit of the working tree, 12 digits, with ``+changes`` if it is not clean; empty where none is known.

    A copy without history that lies in a checkout of something else has not that one's commit.
    """
    if _git("rev-parse", "--show-toplevel") != str(ROOT):
        return os.environ.get(COMMIT, "")
    commit, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain")
    return commit + ("+changes" if commit and changes else "")


def _git(*words: str) -> str:
    """What git says about the tree; empty where there is no git, or no checkout that it trusts."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # set in a hook
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


class ShowVersion(argparse.Action):
    """``--version``, as argparse's own, but git is asked only where somebody wants to know."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print version and commit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Prints, and ends the program."""
        print(describe())
        parser.exit()
