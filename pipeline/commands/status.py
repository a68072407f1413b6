"""``status``: how far a data set is."""

import argparse
import dataclasses
import json
from pathlib import Path

from twotower.words import pluralize, say, say_lines


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "status",
        help="how far prepare is, read from the output folder",
        description="Tell how far a data set is, from its folder alone: any user on any node can ask.",
        epilog="example: python -m pipeline status data/imagenet --json",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the data set")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the state."""
    from pipeline.inspection.status import read_status

    status = read_status(args.folder)
    if args.json:
        print(json.dumps(dataclasses.asdict(status)))
        return 0
    say(f"{args.folder}: {status.stage}")
    for name, split in status.splits.items():
        share = split.done / max(split.total, 1)
        left_out = f", {split.left_out:,} left out" if split.left_out else ""
        say(
            f"{name}: {split.done:,} / {split.total:,} images ({share:.0%}) in "
            f"{pluralize(split.shards, 'shard')}{left_out}"
        )
    say_lines(status.found)
    if status.images_per_s and status.left_s is not None and status.stage != "whole":
        print(f"{status.images_per_s:,.0f} images/s, {status.left_s:,.0f} s left")
    if status.stage == "stopped":
        print("run the same prepare command again to finish it")
    return 0
