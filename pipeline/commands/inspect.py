"""``inspect``: see what a data set holds."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.manifest import Manifest, read_manifest
from twotower.verbosity import say_written
from twotower.words import json_text, listed, one_line, pluralize, say, say_lines

if TYPE_CHECKING:
    from pipeline.inspection.inspect import Contents

BAR = 40
SHOWN_CLASSES = 20
QUANTILES = (0, 5, 50, 95, 100)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "inspect",
        help="see what a data set holds: classes, sizes, images",
        description="Print classes, sizes and aspects of the sources; make a contact sheet; show one sample.",
        epilog="examples:\n"
        "  python -m pipeline inspect data/digits --sheet digits.png\n"
        "  python -m pipeline inspect data/digits --sample train-00000042 --image 42.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the data set")
    parser.add_argument("--split", help="only this split (default: all; for the sheet: train)")
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help="write a contact sheet of images spread over the shards"
    )
    parser.add_argument("--images", type=int, default=64, metavar="N", help="on the sheet (default: %(default)s)")
    parser.add_argument("--sample", metavar="KEY", help="show one sample")
    parser.add_argument("--image", type=Path, metavar="PNG", help="write the sample's image")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Inspects."""
    manifest = read_manifest(args.folder)
    if args.split and args.split not in manifest.splits:
        raise ConfigError(f"--split {args.split}: the data set has {listed(manifest.splits)}")
    if args.sample:
        _show_sample(args, manifest)
        return 0
    from pipeline.inspection.inspect import read_contents

    splits = [args.split] if args.split else list(manifest.splits)
    contents = {split: read_contents(args.folder, manifest, split) for split in splits}
    if args.json:
        print(json_text({split: _figures(manifest, found) for split, found in contents.items()}))
    else:
        _print_head(args.folder, manifest)
        for split, found in contents.items():
            _print_split(split, manifest, found)
    if args.sheet:
        _write_sheet(args, manifest)
    return 0


def _write_sheet(args: argparse.Namespace, manifest: Manifest) -> None:
    from pipeline.inspection.inspect import contact_sheet, spread_samples

    split = args.split or ("train" if "train" in manifest.splits else next(iter(manifest.splits)))
    samples = list(spread_samples(args.folder, manifest, split, max(1, args.images)))
    contact_sheet(samples, manifest).save(args.sheet, "PNG")
    say_written(args.sheet)


def _show_sample(args: argparse.Namespace, manifest: Manifest) -> None:
    from pipeline.inspection.inspect import find_sample, open_image

    sample = find_sample(args.folder, manifest, args.sample)
    print(json_text(dataclasses.asdict(sample) | {"image": pluralize(len(sample.image), "byte")}, indent=1))
    if args.image:
        open_image(sample, manifest).save(args.image, "PNG")
        say_written(args.image)


def _print_head(folder: Path, manifest: Manifest) -> None:
    form = manifest.image
    size = f"{form.width_px}x{form.height_px}" if form.width_px else "several sizes"
    say(
        f"{folder}: source {manifest.source}, {pluralize(len(manifest.classes), 'class')} in "
        f"{manifest.label_order} order"
    )
    form_words = f"{form.encoding}, {pluralize(form.channels, 'channel')}, {size}"
    print(f"images: {form_words}; fingerprint {manifest.fingerprint[:12]}")
    say_lines(manifest.found_lines())


def _print_split(split: str, manifest: Manifest, contents: "Contents") -> None:
    record = manifest.splits[split]
    megabytes = sum(shard.size_bytes for shard in record.shards) / 1e6
    print(
        f"\n{split}: {pluralize(record.num_samples, 'sample')} in {pluralize(len(record.shards), 'shard')}, "
        f"{megabytes:,.1f} MB, {record.num_quarantined:,} left out"
    )
    most = max(contents.classes.values())
    for label, record_class in list(enumerate(manifest.classes))[:SHOWN_CLASSES]:
        count = contents.classes[label]
        say(f"  {label:4d} {one_line(record_class.title[:28]):28s} {count:8,d} {'#' * round(BAR * count / most)}")
    if len(manifest.classes) > SHOWN_CLASSES:
        rest = [contents.classes[label] for label in range(len(manifest.classes))]
        print(
            f"  ... {pluralize(len(rest) - SHOWN_CLASSES, 'more class')}; smallest {min(rest):,}, "
            f"largest {pluralize(max(rest), 'sample')}"
        )
    for name, values in contents.quantiles(QUANTILES).items():
        print(f"  {name:10s}" + "".join(f"  {q:3d}%: {value:8.4g}" for q, value in zip(QUANTILES, values, strict=True)))
    for words, count in contents.converted.most_common():
        say(f"  converted: {words}: {count:,}")


def _figures(manifest: Manifest, contents: "Contents") -> dict[str, object]:
    return {
        "num_samples": sum(contents.classes.values()),
        "classes": [contents.classes[label] for label in range(len(manifest.classes))],
        "quantiles": contents.quantiles(QUANTILES),
        "converted": dict(contents.converted),
    }
