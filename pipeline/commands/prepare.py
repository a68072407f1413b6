"""``prepare``: turn images into a data set."""

import argparse
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import ENCODINGS, FILTERS, ON_ERROR, PrepareOptions
from pipeline.errors import OutputError
from pipeline.files import CACHE_VARIABLE, is_url, parse_path
from pipeline.manifest import QUARANTINE_NAME, Manifest, read_manifest
from pipeline.preparation import faults
from pipeline.quarantine import read_quarantine
from pipeline.sources import SOURCES, open_source, reasons
from twotower.words import pluralize, say, say_lines

if TYPE_CHECKING:
    from pipeline.preparation.prepare import Summary

SHOWN_CONVERSIONS = 5  # the most frequent ones; quarantine.jsonl has all
LEFT_OUT = 3

DESCRIPTION = """\
Turn images into a data set of WebDataset tars. Run it again after any interruption: it finishes what is missing,
repairs what is damaged, and does nothing when the data set is complete."""
EPILOG = """\
examples:
  python -m pipeline prepare --source digits --output data/digits
  python -m pipeline prepare --source folder --input photos --output data/photos --resize 256 --workers 8
  python -m pipeline prepare --source folder --input photos --labels val.csv --output data/photos
  python -m pipeline prepare --source imagenet --input archives --output data/imagenet --dry-run
  python -m pipeline prepare --source imagenet --input s3://bucket/archives --output data/imagenet
  python -m pipeline prepare --source fashion-mnist --input /usr/share/datasets/fashion-mnist --output data/fashion
exit codes:
  0 whole; 3 whole, but some images were left out (OUTPUT/quarantine.jsonl says why) or a folder could not be read;
  2 something to fix; 1 a bug of ours; 129, 130 and 143 stopped by a hang-up, Ctrl-C and SIGTERM (the same command
  continues)"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "prepare",
        help="turn images into shards, on Ray",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_places(parser)
    _add_images(parser)
    _add_running(parser)
    parser.set_defaults(run=run)


def _add_places(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("from where, to where")
    group.add_argument("--source", required=True, metavar="NAME", help=f"one of {', '.join(SOURCES)}")
    group.add_argument("--input", type=parse_path, metavar="PATH|URL", help="what the source reads")
    group.add_argument(
        "--labels",
        type=parse_path,
        metavar="FILE",
        help="classes of pictures that lie in no class folders: a CSV or lines NAME LABEL (source folder)",
    )
    group.add_argument(
        "--follow-links",
        action="store_true",
        help="read also what links lead to that lies outside of the input (default: such links are passed over)",
    )
    group.add_argument("--output", required=True, metavar="DIR|URL", help="a new folder, or one begun before")
    group.add_argument("--seed", type=int, default=_default("seed"), help="of shuffle and split (default: %(default)s)")
    group.add_argument(
        "--shard-size", type=int, default=_default("shard_size"), metavar="N", help="most samples a tar (%(default)s)"
    )
    group.add_argument(
        "--val-fraction",
        type=float,
        default=_default("val_fraction"),
        metavar="F",
        help="share of each class for val, where a folder has no splits (default: %(default)s)",
    )


def _add_images(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images")
    group.add_argument(
        "--resize", default="default", metavar="N|none", help="side in pixels (default: 256 for files, none for pixels)"
    )
    group.add_argument(
        "--encoding",
        default="default",
        metavar="|".join(ENCODINGS),
        help="default: jpeg for files, png for pixels, original for files with --resize none",
    )
    group.add_argument(
        "--quality", type=int, default=_default("quality"), metavar="Q", help="of JPEG, 1 to 100 (default: %(default)s)"
    )
    group.add_argument(
        "--filter",
        default=_default("filter"),
        metavar="|".join(FILTERS),
        help="of resizing: bicubic, or averaging the area that each pixel covers (default: %(default)s)",
    )
    group.add_argument(
        "--label-order",
        default=_default("label_order"),
        metavar="alphabetical|ilsvrc",
        help="of imagenet's classes (default: alphabetical by WordNet id)",
    )
    group.add_argument(
        "--on-error",
        default=_default("on_error"),
        metavar="|".join(ON_ERROR),
        help="for images that cannot be used (default: %(default)s)",
    )
    group.add_argument("--max-errors", metavar="N|P%", help="stop when more images cannot be used (default: no limit)")
    for option, unit in (("max_pixels", "pixels"), ("max_bytes", "bytes")):
        group.add_argument(
            f"--{option.replace('_', '-')}",
            type=int,
            default=_default(option),
            metavar="N",
            help=f"more {unit} than this are refused before decoding (default: %(default)s)",
        )


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument(
        "--workers", type=int, default=0, metavar="N", help="shards in work at once (default: every core)"
    )
    group.add_argument(
        "--splits", type=_names, default=(), metavar="A,B", help="only these (default: all the source has)"
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N images of each split, for a trial")
    group.add_argument("--verify-source", action="store_true", help="check the published md5 of the input first")
    group.add_argument("--dry-run", action="store_true", help="print the plan and an estimate, write nothing")
    group.add_argument("--address", metavar="A", help="of a Ray cluster (default: this machine)")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _default(option: str) -> object:
    return PrepareOptions.__dataclass_fields__[option].default


def run(args: argparse.Namespace) -> int:
    """Prepares, prints a summary, and returns the exit code."""
    url = args.output if is_url(args.output) else None
    args.output = _staging_folder(url) if url else Path(args.output)
    options = PrepareOptions(**{name: getattr(args, name) for name in PrepareOptions.__dataclass_fields__})
    open_source(options)  # a wrong name or a missing input is refused before anything slow is imported
    if url:
        from pipeline.preparation.output import check_places

        check_places(options.input, url)
    if args.dry_run:
        from pipeline.preparation.plan import print_plan

        print_plan(options)
        return 0
    if url:
        return _run_to_url(options, url)
    return _run_to_folder(options)


def _staging_folder(url: str) -> Path:
    from pipeline.preparation.publish import staging_folder

    return staging_folder(url)


def _run_to_url(options: PrepareOptions, url: str) -> int:
    """Prepares in a local folder, publishes, and removes the local folder."""
    from pipeline.preparation.publish import Remote

    remote = Remote(url)
    manifest = remote.published(options)
    if manifest is not None:
        say(
            f"{url} is complete already: every file is there with its size, nothing to do ({manifest.fingerprint[:12]})"
        )
        return exit_code(manifest)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = f"set {CACHE_VARIABLE} to a folder with room"
        raise OutputError(f"cannot make {options.output} for the data set ({error.strerror}); {fix}") from None
    code = _run_to_folder(options)
    if code in (0, LEFT_OUT):
        remote.publish(options.output, read_manifest(options.output))
        shutil.rmtree(options.output)
        say(f"published: {url}")
    return code


def _run_to_folder(options: PrepareOptions) -> int:
    from pipeline.preparation.prepare import prepare

    summary = prepare(options)
    print_summary(options.output, summary)
    faults.reach("summary")
    return exit_code(summary.manifest)


def exit_code(manifest: Manifest) -> int:
    """Tells by the exit code whether images are missing: left out, or in a folder that cannot be read."""
    unreadable = any(row.reason == reasons.UNREADABLE for row in manifest.passed_over)
    return LEFT_OUT if manifest.num_left_out or unreadable else 0


def print_summary(folder: Path, summary: "Summary") -> None:
    """Counts, shards, bytes and rate, in a few lines."""
    manifest = summary.manifest
    if summary.num_indexes:
        say(f"{folder}: {pluralize(summary.num_indexes, 'damaged index')} regenerated from the tars")
    elif not summary.num_done:
        say(f"{folder} is complete already: every file checked by sha256, nothing to do")
    for name, split in manifest.splits.items():
        size = sum(shard.size_bytes for shard in split.shards) / 1e6
        say(
            f"{name}: {pluralize(split.num_samples, 'image')} in {pluralize(len(split.shards), 'shard')}, "
            f"{size:,.1f} MB"
        )
    if summary.num_done:
        rate = summary.num_done / max(summary.elapsed_s, 1e-9)
        working = summary.num_done / max(summary.elapsed_s - summary.startup_s, 1e-9)
        print(
            f"prepared {pluralize(summary.num_done, 'image')} in {summary.elapsed_s:.1f} s, {rate:,.0f} images/s; "
            f"{working:,.0f} images/s without the {summary.startup_s:.1f} s in which Ray and its workers started"
        )
    print(f"classes: {len(manifest.classes):,}")
    say_lines(manifest.found_lines())
    print_converted(folder)
    for warning in summary.warnings:
        say(f"warning: {warning}", file=sys.stderr)
    if manifest.num_left_out:
        say(
            f"left out: {pluralize(manifest.num_left_out, 'image')} that cannot be used; see {folder / QUARANTINE_NAME}"
        )
    say(f"data set: {folder} ({manifest.fingerprint[:12]})")


def print_converted(folder: Path) -> None:
    """Says how many stored images were converted, and what was done to most of them: to one, several things may be."""
    reasons_of = [row["reason"] for row in read_quarantine(folder) if row["action"] == "converted"]
    counts = Counter(words for reason in reasons_of for words in reason.split("; "))
    if counts:
        words = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common(SHOWN_CONVERSIONS))
        more = ", ..." if len(counts) > SHOWN_CONVERSIONS else ""
        say(f"converted: {len(reasons_of):,} images ({words}{more}); see {folder / QUARANTINE_NAME}")
