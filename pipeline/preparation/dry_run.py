"""What ``prepare`` would do, without doing it: the plan, and an estimate from a measured sample."""

import dataclasses
import shutil
import statistics
import time

import numpy as np

from pipeline.config import PictureSettings, PrepareOptions
from pipeline.errors import PictureError
from pipeline.preparation.image import make_picture
from pipeline.preparation.output import check_ours
from pipeline.preparation.request import check_source, chosen_splits, make_plan
from pipeline.preparation.tar_writer import BLOCK
from pipeline.sources import Item, Listing, Source, open_source

SAMPLE_PICTURES = 200
SAMPLE_S = 5.0
OVERHEAD_BYTES = 3 * BLOCK + 2 * BLOCK + BLOCK // 2  # three headers, cls and json blocks, half a block of padding


@dataclasses.dataclass(frozen=True)
class Sample:
    """What some pictures cost.

    Attributes:
        seconds: median seconds a picture on one core, warmed up.
        size_bytes: mean bytes a sample takes in a tar.
        num_pictures: pictures measured.
        num_refused: how many of them cannot be used.
    """

    seconds: float
    size_bytes: float
    num_pictures: int
    num_refused: int


def print_plan(options: PrepareOptions) -> None:
    """Prints splits, shards, bytes, free disk and time.

    Raises:
        PipelineError: the same as prepare, before it starts to work.
    """
    check_ours(options.output)
    source = open_source(options)
    if options.verify_source:
        check_source(source)
    listing = chosen_splits(source.listing(), options)
    picture = options.picture_settings(encoded=listing.encoded, channels=listing.channels)
    plan = make_plan(listing, options)
    print(f"source {options.source}: {len(listing.classes):,} classes, labels in {listing.label_order} order")
    for split in sorted(listing.splits):
        counts = [len(shard.rows) for shard in plan if shard.split == split]
        print(f"{split}: {sum(counts):,} pictures in {len(counts):,} shards of {min(counts):,} to {max(counts):,}")
    total = sum(len(shard.rows) for shard in plan)
    _print_estimate(options, measure(source, listing, picture), total)


def measure(source: Source, listing: Listing, picture: PictureSettings) -> Sample:
    """Makes some pictures spread evenly over the listing, for at most some seconds."""
    items = _spread(listing)
    times, sizes, refused = [], [], 0
    start_s = time.monotonic()
    for item in [items[0], *items]:  # the first loads the libraries
        begun_s = time.perf_counter()
        try:
            sizes.append(len(make_picture(source.read(item), picture).data) + OVERHEAD_BYTES)
        except PictureError:
            refused += 1
        times.append(time.perf_counter() - begun_s)
        if time.monotonic() - start_s > SAMPLE_S and len(times) > 2:
            break
    measured = len(times) - 1
    return Sample(statistics.median(times[1:]), statistics.fmean(sizes[1:] or [0]), measured, refused)


def _spread(listing: Listing) -> list[Item]:
    rows = max(listing.splits.values(), key=len)
    return rows.items(np.unique(np.linspace(0, len(rows) - 1, SAMPLE_PICTURES).astype(np.int64)))


def _print_estimate(options: PrepareOptions, sample: Sample, total: int) -> None:
    folder = next(path for path in (options.output.absolute(), *options.output.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free, sample.size_bytes * total
    verdict = "" if free > needed else "  NOT ENOUGH"
    print(f"needs about {needed / 1e9:,.2f} GB; {free / 1e9:,.2f} GB are free at {folder}{verdict}")
    workers = options.num_workers()
    print(
        f"about {_duration(sample.seconds * total / workers)} with {workers} workers "
        f"({1 / sample.seconds:,.0f} images/s a core over {sample.num_pictures} measured pictures, "
        f"{sample.num_refused} of them unusable)"
    )
    print("nothing was written (--dry-run)")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
