"""``prepare`` from its options to a complete data set: plan, make the shards that are missing, manifest last.

Ray is imported only when there are shards to make; a data set that is complete is checked without it.
"""

import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pipeline.config import PrepareOptions
from pipeline.errors import OutputError, SourceError
from pipeline.manifest import FORMAT, INFO_NAME, MANIFEST_NAME, ImageFormat, Manifest, ShardRecord
from pipeline.preparation import faults, output
from pipeline.preparation.machine import BEFORE_RAY, check_machine
from pipeline.preparation.plan import Request, ShardPlan, check_source, make_request, print_warnings
from pipeline.preparation.shard import WORK_NAME, ShardJob, ShardResult, ShardTask, read_result
from pipeline.preparation.statistics import Totals
from pipeline.progress import ProgressLine
from pipeline.quarantine import read_quarantine
from pipeline.sources import open_source
from pipeline.sources.walk import shown
from twotower.verbosity import log
from twotower.words import pluralize


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        manifest: the complete data set.
        num_done: images this run worked on; 0 if the data set was complete already.
        elapsed_s: seconds spent on shards, with the start of Ray and its workers.
        startup_s: those of them until the first worker had its libraries and began with an image.
        num_indexes: indexes regenerated from their valid tars.
        warnings: what only the work has shown, a line each.
    """

    manifest: Manifest
    num_done: int
    elapsed_s: float
    startup_s: float = 0.0
    num_indexes: int = 0
    warnings: tuple[str, ...] = ()


def prepare(options: PrepareOptions) -> Summary:
    """Makes the data set whole: everything, what is missing, or nothing.

    Raises:
        PipelineError: something the user can act on; the folder stays in a state that a later run continues.
    """
    folder = options.output
    output.check_places(options.input, folder)
    output.check_ours(folder)
    if options.verify_source:
        check_source(open_source(options))
    if not (folder / MANIFEST_NAME).is_file():
        check_machine(options)  # before anything is listed or written
    request = make_request(options)
    print_warnings(request.warnings)
    faults.reach("listed")
    with output.output_lock(folder):
        manifest = output.load_manifest(folder)
        if manifest is not None:
            output.refuse_difference(folder, manifest.settings, request.settings, libraries=False)
        try:
            output.sweep(folder)
            repaired = None if manifest is None else _repair(request, manifest)
            summary = repaired or _make(request, manifest)
            return dataclasses.replace(summary, warnings=_lost(request, summary.manifest))
        except OSError as error:
            raise OutputError(f"cannot write {error.filename or folder}: {error.strerror or error}") from None


def _make(request: Request, before: Manifest | None) -> Summary:
    """Makes every shard that is not there as its record says, then everything else, the manifest last.

    Args:
        request: what was asked for.
        before: the manifest of the same data set, where only files beside the shards are damaged. What it counted
            stands, although a file that is passed over may have come or gone since.
    """
    folder = request.options.output
    output.begin(folder, request.settings, _totals(request))
    records = (read_result(folder / WORK_NAME, _stem(shard), with_positions=True) for shard in request.shards)
    valid = output.valid_shards(folder, (record.shard for record in records if record))
    missing = [shard for shard in request.shards if shard.name not in valid]
    log.debug("%d of %d shards are valid already", len(valid), len(request.shards))
    elapsed_s, startup_s = _build(request, missing)
    results, totals = _collect(request)
    draft = Manifest(
        format=FORMAT,
        source=request.options.source,
        settings=request.settings,
        image=ImageFormat(request.image.encoding, request.image.channels, None, None),
        classes=request.listing.classes,
        label_order=request.listing.label_order,
        splits={},
        files={},
        num_found=before.num_found if before else request.num_found,
        passed_over=before.passed_over if before else request.passed_over,
    )
    manifest = output.finish(folder, draft, results, totals)
    output.clear_work(folder)
    return Summary(manifest, _num_images(missing), elapsed_s, startup_s)


def _repair(request: Request, manifest: Manifest) -> Summary | None:
    """Brings damaged files of a data set back to their recorded bytes; None if everything must be regenerated."""
    folder = request.options.output
    damaged_files = output.file_damage(folder, manifest)
    if damaged_files.keys() - {INFO_NAME}:
        output.refuse_difference(folder, manifest.settings, request.settings)
        return None  # statistics and quarantine list come from all shards
    recorded = {shard.name: shard for split in manifest.splits.values() for shard in split.shards}
    valid = output.valid_shards(folder, recorded.values())
    restored = output.restore_indexes(folder, (shard for name, shard in recorded.items() if name not in valid))
    damaged = [shard for shard in request.shards if shard.name in recorded.keys() - valid - restored]
    elapsed_s = startup_s = 0.0
    if damaged:
        output.refuse_difference(folder, manifest.settings, request.settings)
        totals = {split: count for split, count in _totals(request).items() if split in manifest.splits}
        output.begin(folder, request.settings, totals)
        elapsed_s, startup_s = _build(request, damaged, recorded)
    if damaged_files:
        output.write_info(folder, manifest)
    output.clear_work(folder)
    return Summary(manifest, _num_images(damaged), elapsed_s, startup_s, len(restored))


def _build(
    request: Request, missing: list[ShardPlan], recorded: dict[str, ShardRecord] | None = None
) -> tuple[float, float]:
    """Makes these shards on Ray, each as ``recorded`` if that is given; the seconds of all, and of the start-up."""
    if not missing:
        return 0.0, 0.0
    start_s = time.time()  # the clock that workers share, give or take what their nodes differ
    began_s = math.inf
    os.environ.update(BEFORE_RAY)
    # Read when Ray is imported. Without it Ray takes 127.0.0.1 for the machine's outer address: a Ray of our own would
    # listen on every interface, and one that listens on loopback (`python -m cluster up --local`) would not be found.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    from pipeline.preparation.ray_run import (  # imports ray, which takes longer than everything else here
        Gauges,
        ray_session,
        run_shards,
    )

    options, num_missing, total = request.options, _num_images(missing), _num_images(request.shards)
    job = ShardJob(
        output=options.output.absolute(),
        source=request.source,
        image=request.image,
        class_names=tuple(record.name for record in request.listing.classes),
        fail_on_error=options.on_error == "fail",
    )
    with ray_session(options) as workers, ProgressLine(total, total - num_missing) as progress:
        gauges = Gauges(options.output.name, progress)
        left_out = 0
        for result in run_shards(job, _tasks(request, missing), len(missing), workers=workers, tick=gauges.update):
            began_s = min(began_s, result.began_s)
            left_out += result.num_left_out
            if left_out > options.error_limit(total):
                reason = next(line for line in result.quarantine if line["action"] == "left_out")
                raise SourceError(
                    f"{pluralize(left_out, 'image')} cannot be used, more than --max-errors {options.max_errors}; "
                    f"the last: {reason['source']}: {reason['reason']}"
                )
            if recorded is not None and result.shard != recorded[result.shard.name]:
                raise SourceError(f"{result.shard.name} came out different: the input changed")
            log.debug("%s made: %d images, %d left out", result.shard.name, result.num_planned, result.num_left_out)
            progress.advance(result.num_planned)
            faults.reach("driver-shard-done")
        elapsed_s = time.time() - start_s
        return elapsed_s, min(max(began_s - start_s, 0.0), elapsed_s)


def _lost(request: Request, manifest: Manifest) -> tuple[str, ...]:
    """Lines about the splits, and the classes of the other splits, of which no image can be used."""
    lines = [
        f"{split} is left out: none of its {count:,} images can be used"
        for split, count in manifest.dropped_splits.items()
    ]
    left_out: dict[str, Counter[str]] = {split: Counter() for split in manifest.splits}
    for row in read_quarantine(request.options.output):
        if row["action"] == "left_out" and row["split"] in left_out:
            left_out[row["split"]][row["class"]] += 1
    for split, counts in left_out.items():
        planned = [shard.rows for shard in request.shards if shard.split == split and counts]
        labels = request.listing.splits[split].labels[np.concatenate(planned)] if planned else np.zeros(0, np.int32)
        totals = Counter[str]()
        for label, total in enumerate(np.bincount(labels).tolist()):
            totals[request.listing.classes[label].name] += total
        if empty := sorted(name for name, count in counts.items() if count == totals[name]):
            lines.append(f"classes of which no image of {split} can be used: {shown(empty)}")
    return tuple(lines)


def _tasks(request: Request, shards: Iterable[ShardPlan]) -> Iterator[ShardTask]:
    """The shards with their images, one by one: all at once would be a million rows."""
    for shard in shards:
        items = request.listing.splits[shard.split].items(shard.rows)
        yield ShardTask(name=shard.name, split=shard.split, start=shard.start, items=items)


def _collect(request: Request) -> tuple[list[ShardResult], Totals | None]:
    """Every shard's record in the order of the plan, and the train split's statistics."""
    results: list[ShardResult] = []
    totals: Totals | None = None
    work = request.options.output / WORK_NAME
    for shard in request.shards:
        result = read_result(work, _stem(shard), with_positions=True)
        if result is None:
            raise OutputError(f"the record of {shard.name} vanished from {work}: run prepare again")
        if shard.split == "train":
            totals = result.totals if totals is None else totals.merge(result.totals)
        results.append(dataclasses.replace(result, totals=dataclasses.replace(result.totals, position_sum=None)))
    return results, totals


def _totals(request: Request) -> dict[str, int]:
    """Images planned for each split."""
    return {
        split: _num_images(shard for shard in request.shards if shard.split == split)
        for split in dict.fromkeys(shard.split for shard in request.shards)
    }


def _num_images(shards: Iterable[ShardPlan]) -> int:
    return sum(len(shard.rows) for shard in shards)


def _stem(shard: ShardPlan) -> str:
    return Path(shard.name).stem
