"""What will be done: which sample goes into which shard, the settings that decide the bytes, and what it will cost.

The plan is decided by the listing and the options alone: no clock, no global state.
"""

import dataclasses
import hashlib
import itertools
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import numpy as np

from pipeline.config import ImageSettings, PrepareOptions, byte_settings
from pipeline.errors import ConfigError, ImageError, SourceError
from pipeline.manifest import PassedOver, found_lines
from pipeline.preparation.image import make_image
from pipeline.preparation.output import check_ours, check_places
from pipeline.preparation.shard import read_item
from pipeline.preparation.tar_writer import BLOCK
from pipeline.progress import ProgressLine
from pipeline.sources import open_source, reasons
from pipeline.sources.listing import Item, Listing, Source, Tally
from pipeline.sources.split import shuffled
from pipeline.sources.walk import FOLLOW, links_out
from twotower.words import listed, pluralize, say, say_lines

READ_BYTES = 8 * 2**20
SAMPLE_IMAGES = 200  # of a dry run, for at most SAMPLE_S
SAMPLE_S = 5.0
SHOWN_CLASSES = 5
OVERHEAD_BYTES = 3 * BLOCK + 2 * BLOCK + BLOCK // 2  # three headers, cls and json blocks, half a block of padding


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """One shard to be written.

    Attributes:
        name: path of the tar inside the data set, ``train/train-000000.tar``.
        split: the split it belongs to.
        start: position in the shuffled split of its first sample.
        rows: (n,) rows of the split's listing, in the order of writing.
    """

    name: str
    split: str
    start: int
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for, brought together with what the source holds.

    Attributes:
        options: what was asked for.
        source: reads the images.
        listing: the images of the chosen splits.
        image: what to make of each.
        settings: everything that decides the bytes of the data set, as the manifest records it.
        shards: every shard of every split.
        passed_over: what is not tried, by split and reason.
        warnings: what a person should know before the work, a line each.
    """

    options: PrepareOptions
    source: Source
    listing: Listing
    image: ImageSettings
    settings: dict[str, Any]
    shards: list[ShardPlan]
    passed_over: tuple[PassedOver, ...]
    warnings: tuple[str, ...]

    @property
    def num_planned(self) -> int:
        """Images of all shards."""
        return sum(len(shard.rows) for shard in self.shards)

    @property
    def num_found(self) -> int:
        """Everything that the input holds."""
        return self.num_planned + sum(row.count for row in self.passed_over)


def make_request(options: PrepareOptions) -> Request:
    """Lists the source and plans every shard.

    Raises:
        PipelineError: an option or the input cannot be used.
    """
    source = open_source(options)
    listing = chosen_splits(_listing(source, options), options)
    image = options.image_settings(encoded=listing.encoded, channels=listing.channels)
    settings = all_settings(options, listing, image)
    shards = make_plan(listing, options)
    return Request(
        options, source, listing, image, settings, shards, passed_over(listing, shards), tuple(all_warnings(listing))
    )


def _listing(source: Source, options: PrepareOptions) -> Listing:
    """The source's listing; where it refuses an input that leads elsewhere by links, the message names the option."""
    try:
        return source.listing()
    except SourceError as error:
        hint = "" if options.follow_links or options.input is None or FOLLOW in str(error) else links_out(options.input)
        raise SourceError(f"{error}{hint}") from None


def make_plan(listing: Listing, options: PrepareOptions) -> list[ShardPlan]:
    """Every shard of every split."""
    return [
        shard
        for split in sorted(listing.splits)
        for shard in plan_split(
            split, len(listing.splits[split]), seed=options.seed, shard_size=options.shard_size, limit=options.limit
        )
    ]


def plan_split(split: str, count: int, *, seed: int, shard_size: int, limit: int | None = None) -> list[ShardPlan]:
    """Cuts a shuffled split into shards of equal size, give or take one sample.

    Args:
        split: name of the split.
        count: images in it.
        seed: seed of the shuffle.
        shard_size: most samples in a shard.
        limit: only the first ``limit`` images of the shuffled order.
    """
    order = shuffled(count, seed, f"shuffle {split}")[:limit]
    num_shards = -(-len(order) // shard_size)
    bounds = [len(order) * shard // max(num_shards, 1) for shard in range(num_shards + 1)]
    return [
        ShardPlan(name=f"{split}/{split}-{shard:06d}.tar", split=split, start=start, rows=order[start:end])
        for shard, (start, end) in enumerate(itertools.pairwise(bounds))
    ]


def check_source(source: Source) -> None:
    """Compares the input with its published md5, reading all of it.

    Raises:
        SourceError: a file differs, or none has a published checksum.
    """
    expected = source.checksums()
    total = sum(path.stat().st_size for path in expected)
    with ProgressLine(total // 2**20, verb="checked", unit="MiB") as progress:
        for path, md5 in expected.items():
            digest = hashlib.md5(usedforsecurity=False)
            with path.open("rb") as file:
                while chunk := file.read(READ_BYTES):
                    digest.update(chunk)
                    progress.advance(len(chunk) // 2**20)
            if digest.hexdigest() != md5:
                raise SourceError(
                    f"{path}: its md5 is {digest.hexdigest()}, published is {md5} (a copy compressed again differs too)"
                )


def chosen_splits(listing: Listing, options: PrepareOptions) -> Listing:
    """The listing with the splits that were asked for; the others are counted as passed over.

    Raises:
        ConfigError: the source has no such split.
    """
    unknown = [split for split in options.splits if split not in listing.splits]
    if unknown:
        raise ConfigError(f"--splits {unknown[0]}: the source has {listed(sorted(listing.splits))}")
    kept = {split: rows for split, rows in listing.splits.items() if not options.splits or split in options.splits}
    tally = Tally()
    tally.extend(listing.passed_over)
    for split in listing.splits.keys() - kept.keys():
        rows = listing.splits[split]
        tally.add(reasons.NOT_CHOSEN, rows.names[0], split=split, count=len(rows))
    return dataclasses.replace(listing, splits=kept, passed_over=tally.records())


def all_warnings(listing: Listing) -> list[str]:
    """What the source warns of, and the classes that not every split has."""
    warnings = list(listing.warnings)
    present = {
        split: np.bincount(rows.labels, minlength=len(listing.classes)) > 0 for split, rows in listing.splits.items()
    }
    for split, here in sorted(present.items()):
        elsewhere = np.any([others for other, others in present.items() if other != split], axis=0)
        only = np.flatnonzero(here & ~elsewhere).tolist() if len(present) > 1 else []
        if only:
            warnings.append(f"classes that only {split} has: {_class_names(listing, only)}")
    absent = np.flatnonzero(~np.any(list(present.values()), axis=0)).tolist()
    if absent:
        warnings.append(f"classes without an image: {_class_names(listing, absent)}")
    return warnings


def _class_names(listing: Listing, labels: list[int]) -> str:
    return listed([listing.classes[label].name for label in labels], most=SHOWN_CLASSES)


def passed_over(listing: Listing, shards: list[ShardPlan]) -> tuple[PassedOver, ...]:
    """What the listing passes over, and what ``--limit`` leaves out of the plan."""
    tally = Tally()
    tally.extend(listing.passed_over)
    for split, rows in listing.splits.items():
        planned = [shard.rows for shard in shards if shard.split == split]
        num_left = len(rows) - sum(map(len, planned))
        if num_left:
            order = np.concatenate(planned)
            first = int(np.setdiff1d(np.arange(len(order) + 1), order)[0])  # the smallest row that is not planned
            tally.add(reasons.OVER_LIMIT, rows.names[first], split=split, count=num_left)
    return tally.records()


def all_settings(options: PrepareOptions, listing: Listing, image: ImageSettings) -> dict[str, Any]:
    """Everything that decides the bytes of the data set, as the manifest records it."""
    libraries = ["pillow"]  # those whose version can change a byte
    if image.encoding in ("jpeg", "original") or image.channels == 3:
        libraries.append("simplejpeg")
    if image.resize_px and image.channels == 3 and image.filter == "bicubic":
        libraries.append("torch")
    return {
        "source": options.source,
        "seed": options.seed,
        "shard_size": options.shard_size,
        "limit": options.limit,
        "label_order": listing.label_order,
        "val_fraction": options.val_fraction if options.source in ("folder", "webdataset") else None,
        "input_sha256": listing.digest(),
        **byte_settings(image),
        "libraries": {name: metadata.version(name) for name in libraries},
    }


@dataclasses.dataclass(frozen=True)
class Cost:
    """What some images cost.

    Attributes:
        seconds: median seconds per image on one core, warmed up.
        size_bytes: mean bytes a sample takes in a tar.
        num_images: images measured.
        num_refused: how many of them cannot be used.
    """

    seconds: float
    size_bytes: float
    num_images: int
    num_refused: int


def print_plan(options: PrepareOptions) -> None:
    """Prints splits, shards, bytes, free disk and time, without writing anything (``--dry-run``).

    Raises:
        PipelineError: the same as prepare, before it starts to work.
    """
    check_places(options.input, options.output)
    check_ours(options.output)
    if options.verify_source:
        check_source(open_source(options))
    request = make_request(options)
    print_warnings(request.warnings)
    listing = request.listing
    say(f"source {options.source}: {pluralize(len(listing.classes), 'class')}, labels in {listing.label_order} order")
    for split in sorted(listing.splits):
        counts = [len(shard.rows) for shard in request.shards if shard.split == split]
        print(
            f"{split}: {pluralize(sum(counts), 'image')} in {pluralize(len(counts), 'shard')} of "
            f"{min(counts):,} to {max(counts):,}"
        )
    total = request.num_planned
    say_lines(found_lines(request.num_found, {"to be stored": total}, request.passed_over))
    cost = measure(request)
    folder = next(path for path in (options.output.absolute(), *options.output.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free, cost.size_bytes * total
    enough = "" if free > needed else "  NOT ENOUGH"
    say(f"needs about {needed / 1e9:,.2f} GB; {free / 1e9:,.2f} GB are free at {folder}{enough}")
    workers = options.num_workers()
    print(
        f"about {_duration(cost.seconds * total / workers)} with {workers} workers "
        f"({1 / cost.seconds:,.0f} images/s per core over {pluralize(cost.num_images, 'measured image')}, "
        f"{cost.num_refused} of them unusable)"
    )
    print("nothing was written (--dry-run)")


def print_warnings(warnings: Iterable[str]) -> None:
    """Prints what a person should know before the work, a line each, on stderr."""
    for warning in warnings:
        say(f"warning: {warning}", file=sys.stderr)


def measure(request: Request) -> Cost:
    """Makes some images spread evenly over the listing, for at most some seconds."""
    rows = max(request.listing.splits.values(), key=len)
    items = rows.items(np.unique(np.linspace(0, len(rows) - 1, SAMPLE_IMAGES).astype(np.int64)))

    def make(item: Item) -> int | None:
        """Bytes that the sample takes in a tar; None if the image cannot be used."""
        try:
            return len(make_image(read_item(request.source, item, request.image), request.image).data) + OVERHEAD_BYTES
        except ImageError:
            return None

    make(items[0])  # loads the libraries, which may take longer than everything after it
    times, sizes = [], []
    start_s = time.perf_counter()
    for item in items:
        begun_s = time.perf_counter()
        sizes.append(make(item))
        times.append(time.perf_counter() - begun_s)
        if time.perf_counter() - start_s > SAMPLE_S:
            break
    usable = [size for size in sizes if size is not None]
    return Cost(statistics.median(times), statistics.fmean(usable or [0]), len(times), len(times) - len(usable))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
