"""``bench``: how fast the loader is, by stages."""

import argparse
import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure reading, decoding and the whole loader",
        description="Measure the loader on the training split: reading only, reading and decoding, everything.",
        epilog="example: python -m pipeline bench --data data/digits --json\n"
        "         python -m pipeline bench --data data/imagenet --recipe configs/paper.toml --sweep",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="the data set (a folder or a URL)")
    parser.add_argument(
        "--recipe", type=Path, metavar="TOML", help="take the [data] table of a recipe (default: the paper's)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda:N or auto: a GPU where there is one (default auto)")
    parser.add_argument("--batch-size", type=int, default=0, metavar="N", help="samples per batch (default 128)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="decoding threads (default: all cores)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="length of one repeat (default 2)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="repeats a stage (default 5)")
    parser.add_argument("--sweep", action="store_true", help="try every share of the GPU's hardware JPEG decoder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    config = _config(args)  # before torch is loaded, which takes seconds
    from pipeline.loader.bench import BenchOptions, run_bench

    options = BenchOptions(args.device, args.batch_size, args.seconds, args.repeats, args.sweep, args.threads)
    result = run_bench(args.data, config, options)
    if args.json:
        print(json.dumps(dataclasses.asdict(result), indent=1))
        return 0
    print(f"{result.images}, batch {result.batch_size}, {result.device}, {result.repeats} repeats")
    print(
        f"{'stage':8} {'images/s':>9} {'slowest':>9} {'fastest':>9} {'MB/s':>8} {'cores':>6} "
        f"{'us/image':>9} {'first batch':>12}"
    )
    for row in result.stages:
        print(
            f"{row.name:8} {row.images_per_s:9,.0f} {row.images_per_s_min:9,.0f} {row.images_per_s_max:9,.0f} "
            f"{row.mb_per_s:8,.1f} {row.cores:6.2f} {row.cpu_us_per_image:9.0f} {row.first_batch_s:10.2f} s"
        )
    for share, rate in (result.hw_decoder_images_per_s or {}).items():
        print(f"hw_decoder_load {share}: {rate:,.0f} images/s decoded")
    shuffle = result.shuffle
    print(
        f"shuffle (1: perfect) displacement {shuffle.displacement:.2f}, spread of neighbors {shuffle.spread:.2f}, "
        f"batchmates meeting again {shuffle.batchmates:.1f} times as often"
    )
    print(f"peak memory {result.peak_memory_mb:,.0f} MB")
    return 0


def _config(args: argparse.Namespace) -> Any:
    """The recipe's [data] table as a LoaderConfig, its crop the recipe's ``model.image_px``; None for the default."""
    from pipeline.loader.config import LoaderConfig
    from twotower.fields import settings_of

    if not args.recipe:
        return None
    try:
        recipe = tomllib.loads(args.recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"recipe {args.recipe} cannot be read: {error}") from None
    table, model = recipe.get("data", {}), recipe.get("model", {})
    unknown = sorted(set(table) - {field.name for field in settings_of(LoaderConfig)})
    if unknown:
        raise ConfigError(f"recipe {args.recipe}: data.{unknown[0]} is no field of the [data] table")
    return LoaderConfig(**table | {"crop_px": model["image_px"]} if "image_px" in model else table)
