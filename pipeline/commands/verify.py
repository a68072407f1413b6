"""``verify``: check a data set against its manifest."""

import argparse
import sys
from pathlib import Path

from pipeline.errors import DatasetError
from pipeline.manifest import read_manifest
from twotower.words import pluralize, say

SHOWN = 20
CHECKED = {
    "fast": "sizes, headers, counts, indexes",
    "hashes": "every sha256, headers, counts, indexes",
    "full": "every sha256, headers, counts, indexes, sample checksums; DALI's decoder takes every image",
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "verify",
        help="check every hash, count and index of a data set",
        description="Check a data set against its manifest and name what is wrong: sizes, headers, counts, indexes,\n"
        "every sha256 (not with --fast); with --full every checksum, and DALI's decoder gets every image.",
        epilog="example: python -m pipeline verify data/digits --full\n"
        "exit codes: 0 valid, 2 something is wrong (every finding is a line)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the data set")
    level = parser.add_mutually_exclusive_group()
    level.add_argument(
        "--fast", dest="level", action="store_const", const="fast", help="headers, sizes, counts, indexes only"
    )
    level.add_argument("--full", dest="level", action="store_const", const="full", help="decode every image too")
    parser.set_defaults(run=run, level="hashes")


def run(args: argparse.Namespace) -> int:
    """Verifies and prints the findings."""
    manifest = read_manifest(args.folder)
    from pipeline.inspection.verify import check_dataset, undecodable
    from pipeline.progress import ProgressLine

    total = sum(split.num_samples for split in manifest.splits.values())
    with ProgressLine(total, verb="checked") as progress:
        problems = check_dataset(args.folder, manifest, level=args.level, report=progress.advance)
    if not problems and args.level == "full" and manifest.image.encoding != "raw":
        problems = undecodable(args.folder, manifest)
    for problem in problems[:SHOWN]:
        say(f"{args.folder / problem.file}: {problem.reason}", file=sys.stderr)
    if problems:
        more = f" (the first {SHOWN} are shown)" if len(problems) > SHOWN else ""
        raise DatasetError(f"{len(problems)} problems{more}; the same prepare command repairs {args.folder}")
    shards = sum(len(split.shards) for split in manifest.splits.values())
    say(
        f"{args.folder} is valid ({manifest.fingerprint[:12]}): {pluralize(total, 'sample')} in "
        f"{pluralize(shards, 'shard')}"
    )
    say(manifest.found_lines()[0])
    print(f"checked: {CHECKED[args.level]}")
    return 0
