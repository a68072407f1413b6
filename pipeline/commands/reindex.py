"""``reindex``: make DALI's indexes for tars that others wrote."""

import argparse
from pathlib import Path

from pipeline.errors import SourceError
from twotower.words import pluralize, say


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "reindex",
        help="make DALI's indexes for tars that others wrote",
        description="Write NAME.idx beside every NAME.tar below a folder that has none (or every one, with --force).\n"
        "Truncated tars and names that DALI would not read are refused. Our own data sets need none: verify them.",
        epilog="example: python -m pipeline reindex downloaded-tars",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder of tars, or one tar")
    parser.add_argument("--force", action="store_true", help="replace indexes that are there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the indexes."""
    from pipeline.preparation.tar_writer import write_index

    tars = [args.path] if args.path.is_file() else sorted(args.path.rglob("*.tar"))
    if not tars:
        raise SourceError(f"{args.path}: no .tar files here")
    written = 0
    for tar in tars:
        if args.force or not tar.with_suffix(".idx").exists():
            say(f"{tar.with_suffix('.idx')}: {pluralize(write_index(tar), 'sample')}")
            written += 1
    print(f"{pluralize(written, 'index')} written, {len(tars) - written:,} there already")
    return 0
