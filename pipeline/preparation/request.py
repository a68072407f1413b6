"""From what was asked to what is to be done: checks of the input, the plan, and the settings that decide the bytes."""

import dataclasses
import hashlib
from importlib import metadata
from typing import Any

from pipeline.config import PictureSettings, PrepareOptions, byte_settings
from pipeline.errors import ConfigError, SourceError
from pipeline.preparation.plan import ShardPlan, plan_split
from pipeline.preparation.progress import ProgressLine
from pipeline.sources import Listing, Source

READ_BYTES = 8 * 2**20


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


def make_plan(listing: Listing, options: PrepareOptions) -> list[ShardPlan]:
    """Every shard of every split."""
    return [
        shard
        for split in sorted(listing.splits)
        for shard in plan_split(
            split, len(listing.splits[split]), seed=options.seed, shard_size=options.shard_size, limit=options.limit
        )
    ]


def chosen_splits(listing: Listing, options: PrepareOptions) -> Listing:
    """The listing with the splits that were asked for.

    Raises:
        ConfigError: the source has no such split.
    """
    unknown = [split for split in options.splits if split not in listing.splits]
    if unknown:
        raise ConfigError(f"--splits {unknown[0]}: the source has {', '.join(sorted(listing.splits))}")
    kept = {split: rows for split, rows in listing.splits.items() if not options.splits or split in options.splits}
    return dataclasses.replace(listing, splits=kept)


def all_settings(options: PrepareOptions, listing: Listing, picture: PictureSettings) -> dict[str, Any]:
    """Everything that decides the bytes of the data set, as the manifest records it."""
    return {
        "source": options.source,
        "seed": options.seed,
        "shard_size": options.shard_size,
        "limit": options.limit,
        "label_order": listing.label_order,
        "val_fraction": options.val_fraction if options.source in ("folder", "webdataset") else None,
        "input_sha256": listing.digest(),
        **byte_settings(picture),
        "libraries": _libraries(picture),
    }


def _libraries(picture: PictureSettings) -> dict[str, str]:
    """Versions that can change a byte."""
    names = ["pillow"]
    if picture.encoding in ("jpeg", "original") or picture.channels == 3:
        names.append("simplejpeg")
    if picture.resize_px and picture.channels == 3 and picture.filter == "bicubic":
        names.append("torch")
    return {name: metadata.version(name) for name in names}
