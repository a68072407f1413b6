"""Turns a source into a data set: plan, one Ray task a shard, manifest last. The only file that imports ray."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import ray.exceptions
from ray.util.metrics import Gauge

from pipeline.config import PictureSettings, PrepareOptions
from pipeline.errors import OutputError, PipelineError, SourceError
from pipeline.manifest import INFO_NAME, Manifest, PictureFormat, ShardRecord
from pipeline.preparation import faults, output
from pipeline.preparation.plan import ShardPlan
from pipeline.preparation.progress import ProgressLine
from pipeline.preparation.request import all_settings, check_source, chosen_splits, make_plan
from pipeline.preparation.shard import WORK_NAME, ShardJob, ShardResult, ShardTask, build_shard, read_result
from pipeline.preparation.statistics import Totals
from pipeline.sources import Listing, open_source

TASKS_PER_WORKER = 2  # one in work, one waiting, so that no worker idles while the driver sleeps
RETRIES = 3  # of a shard whose worker or node died; an error of ours is not retried
OBJECT_STORE_BYTES = 256 * 2**20  # only task lists pass through it
POLL_S = 0.5
WORKER_BYTES = 512 * 2**20  # of its own (libraries are shared): 400 MiB measured with torch, on 500x375 photos
NO_CPU_S = 300.0  # an autoscaler may take minutes for the first node
# One thread a worker; the memory of a picture is kept for the next one instead of given back to the system: a tenth
# faster, measured on 500x375 JPEGs.
WORKER_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TOP_PAD_": str(32 * 2**20),
}
CONNECT_S = 5.0


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        manifest: the whole data set.
        num_done: pictures this run worked on; 0 if the data set was whole already.
        elapsed_s: seconds spent on shards, without starting Ray.
        num_indexes: indexes made again from their sound tars.
    """

    manifest: Manifest
    num_done: int
    elapsed_s: float
    num_indexes: int = 0

    @property
    def num_left_out(self) -> int:
        """Pictures of the source that are not in the data set."""
        return sum(split.num_quarantined for split in self.manifest.splits.values())


class Terminated(BaseException):
    """SIGTERM arrived."""


def prepare(options: PrepareOptions) -> Summary:
    """Makes the data set whole: everything, what is missing, or nothing.

    Raises:
        PipelineError: something the user can act on; the folder stays in a state that a later run continues.
    """
    output.check_ours(options.output)
    source = open_source(options)
    if options.verify_source:
        check_source(source)
    listing = chosen_splits(source.listing(), options)
    picture = options.picture_settings(encoded=listing.encoded, channels=listing.channels)
    settings = all_settings(options, listing, picture)
    plan = make_plan(listing, options)
    with output.output_lock(options.output):
        manifest = output.load_manifest(options.output)
        if manifest is not None:
            output.refuse_difference(options.output, *_without_libraries(manifest.settings, settings))
        run = _Run(options, listing, picture, settings, plan, manifest)
        job = ShardJob(
            output=options.output.absolute(),
            source=source,
            picture=picture,
            class_names=tuple(record.name for record in listing.classes),
            fail_on_error=options.on_error == "fail",
        )
        return run.execute(job)


class _Run:
    """One run on a locked folder."""

    def __init__(
        self,
        options: PrepareOptions,
        listing: Listing,
        picture: PictureSettings,
        settings: dict[str, Any],
        plan: list[ShardPlan],
        manifest: Manifest | None,
    ) -> None:
        self._options = options
        self._listing = listing
        self._settings = settings
        self._plan = plan
        self._manifest = manifest
        self._folder = options.output
        self._work = options.output / WORK_NAME
        self._head = output.DatasetHead(
            source=options.source,
            settings=settings,
            picture=PictureFormat(picture.encoding, picture.channels, None, None),
            classes=listing.classes,
            label_order=listing.label_order,
        )

    def execute(self, job: ShardJob) -> Summary:
        """Writes what is missing and makes the manifest."""
        try:
            output.sweep(self._folder)
            if self._manifest is not None:
                repaired = self._repair(job, self._manifest)
                if repaired is not None:
                    return repaired
            output.begin(self._folder, self._settings, self._totals())
            sound = self._sound()
            missing = [shard for shard in self._plan if shard.name not in sound]
            elapsed_s = self._build(job, missing)
            return self._finish(missing, elapsed_s)
        except OSError as error:
            raise OutputError(f"cannot write {error.filename or self._folder}: {error.strerror or error}") from None

    def _repair(self, job: ShardJob, manifest: Manifest) -> Summary | None:
        """Brings damaged shards back to their recorded bytes; None if everything must be made again."""
        damaged_files = output.file_damage(self._folder, manifest)
        if damaged_files.keys() - {INFO_NAME}:
            output.refuse_difference(self._folder, manifest.settings, self._settings)
            return None  # statistics and quarantine list come from all shards
        recorded = {shard.name: shard for split in manifest.splits.values() for shard in split.shards}
        sound = output.sound_shards(self._folder, recorded.values())
        unsound = [shard for name, shard in recorded.items() if name not in sound]
        restored = output.restore_indexes(self._folder, unsound)
        sound |= restored
        damaged = [shard for shard in self._plan if shard.name in recorded.keys() - sound]
        elapsed_s = 0.0
        if damaged:
            output.refuse_difference(self._folder, manifest.settings, self._settings)
            output.begin(self._folder, self._settings, self._totals())
            elapsed_s = self._build(job, damaged, recorded)
        if damaged_files:
            output.write_info(self._folder, manifest)
        output.clear_work(self._folder)
        return Summary(manifest, sum(len(shard.rows) for shard in damaged), elapsed_s, len(restored))

    def _totals(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for shard in self._plan:
            totals[shard.split] = totals.get(shard.split, 0) + len(shard.rows)
        return totals

    def _sound(self) -> set[str]:
        """Names of the shards that need no work: recorded, and their files as recorded."""
        results = (read_result(self._work, Path(shard.name).stem, with_positions=True) for shard in self._plan)
        return output.sound_shards(self._folder, (result.shard for result in results if result))

    def _build(self, job: ShardJob, missing: list[ShardPlan], recorded: dict[str, ShardRecord] | None = None) -> float:
        """Makes these shards, checks them against ``recorded``; returns the seconds without Ray's start."""
        if not missing:
            return 0.0
        total = sum(len(shard.rows) for shard in self._plan)
        done = total - sum(len(shard.rows) for shard in missing)
        with ray_session(self._options) as workers, ProgressLine(total, done) as progress:
            start_s = time.monotonic()
            gauges = Gauges(self._folder.name, progress)
            left_out, most = 0, self._options.error_limit(total)

            def report(result: ShardResult) -> None:
                nonlocal left_out
                left_out += result.num_left_out
                if left_out > most:
                    reason = next(line for line in result.quarantine if line["action"] == "left_out")
                    raise SourceError(
                        f"{left_out:,} pictures cannot be used, more than --max-errors {self._options.max_errors}; "
                        f"the last: {reason['source']}: {reason['reason']}"
                    )
                if recorded is not None and result.shard != recorded[result.shard.name]:
                    raise SourceError(f"{result.shard.name} came out different: the input changed")
                progress.advance(result.num_planned)
                faults.reach("driver-shard-done")

            run_shards(job, self._tasks(missing), workers=workers, report=report, tick=gauges.update)
            return time.monotonic() - start_s

    def _tasks(self, missing: list[ShardPlan]) -> Iterator[ShardTask]:
        for shard in missing:
            items = self._listing.splits[shard.split].items(shard.rows)
            yield ShardTask(name=shard.name, split=shard.split, start=shard.start, items=items)

    def _finish(self, missing: list[ShardPlan], elapsed_s: float) -> Summary:
        results, totals = self._results()
        manifest = output.finish(self._folder, self._head, results, totals)
        output.clear_work(self._folder)
        return Summary(manifest, sum(len(shard.rows) for shard in missing), elapsed_s)

    def _results(self) -> tuple[list[ShardResult], Totals | None]:
        """Every shard's record in the order of the plan, and the train split's statistics."""
        results: list[ShardResult] = []
        totals: Totals | None = None
        for shard in self._plan:
            result = read_result(self._work, Path(shard.name).stem, with_positions=True)
            if result is None:
                raise OutputError(f"the record of {shard.name} vanished from {self._work}: run prepare again")
            if shard.split == "train":
                totals = result.totals if totals is None else totals.merge(result.totals)
            results.append(dataclasses.replace(result, totals=dataclasses.replace(result.totals, position_sum=None)))
        return results, totals


class Gauges:
    """How far a run is, on Ray's Prometheus endpoint: twotower_images_per_s and twotower_pictures, stage ``prepare``.

    Args:
        name: of the output folder, the label ``run``.
        progress: what is counted.
    """

    def __init__(self, name: str, progress: ProgressLine) -> None:
        self._progress = progress
        texts = {"images_per_s": "pictures prepared a second", "pictures": "pictures prepared so far"}
        self._gauges = {}
        for key, text in texts.items():
            self._gauges[key] = Gauge(f"twotower_{key}", description=text, tag_keys=("run", "stage"))
            self._gauges[key].set_default_tags({"run": name, "stage": "prepare"})

    def update(self) -> None:
        """Publishes, and prints the plain line when it is time to; to be called at least every second."""
        self._gauges["images_per_s"].set(self._progress.rate())
        self._gauges["pictures"].set(self._progress.done)
        self._progress.tick()


@contextlib.contextmanager
def ray_session(options: PrepareOptions) -> Iterator[Callable[[], int]]:
    """Connects to the cluster, or starts one on this machine.

    Gives a function that tells the number of shards to work on at once: on a cluster, nodes come and go.

    Raises:
        PipelineError: the cluster cannot be reached.
    """
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    _check_reachable(address)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments: dict[str, Any] = {
        "address": address,
        "log_to_driver": False,
        "logging_level": "error",
    }
    environment = WORKER_ENVIRONMENT | {"PYTHONPATH": path}
    if address == "local":
        os.environ |= environment  # inherited; a runtime_env would throw away the workers that Ray starts beforehand
        arguments |= {
            "num_cpus": options.num_workers(),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        arguments["runtime_env"] = {"env_vars": environment}
    try:
        ray.init(**arguments)
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise PipelineError(
            f"--address {address}: no Ray cluster answers there ({str(error).splitlines()[0]})"
        ) from None
    previous = signal.signal(signal.SIGTERM, _terminate)  # after ray.init, which sets its own
    try:
        yield lambda: options.workers or int(ray.cluster_resources().get("CPU", 0))
    finally:
        signal.signal(signal.SIGTERM, previous)
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself waits for minutes for an address where nothing listens.

    Raises:
        PipelineError: nothing does.
    """
    found = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if not found:
        return  # "local" or "auto"
    try:
        socket.create_connection((found.group(1), int(found.group(2))), timeout=CONNECT_S).close()
    except OSError as error:
        raise PipelineError(f"--address {address}: no Ray cluster answers there ({error})") from None


def run_shards(
    job: ShardJob,
    tasks: Iterator[ShardTask],
    *,
    workers: Callable[[], int],
    report: Callable[[ShardResult], None],
    tick: Callable[[], None],
) -> None:
    """Works through the tasks with a bounded number in flight, so that memory does not grow with the data set.

    More are in flight than can run, so an autoscaler sees what is wanted; the bound follows the nodes that join.

    Raises:
        PipelineError: the first error of a shard; the others stop. Or no node with a CPU came for minutes.
    """
    remote = ray.remote(build_shard).options(
        num_cpus=1, memory=_worker_memory(), max_retries=RETRIES, scheduling_strategy="SPREAD"
    )
    shared = ray.put(job)
    running: dict[Any, ShardTask] = {}
    exhausted = False
    last_cpu_s = time.monotonic()
    while running or not exhausted:
        at_once = workers()
        last_cpu_s = time.monotonic() if ray.cluster_resources().get("CPU") else last_cpu_s
        if time.monotonic() - last_cpu_s > NO_CPU_S:
            raise PipelineError(f"no node of the Ray cluster has had a CPU for {NO_CPU_S:.0f} s")
        while not exhausted and len(running) < max(at_once, 1) * TASKS_PER_WORKER:
            task = next(tasks, None)
            exhausted = task is None
            if task is not None:
                running[remote.remote(shared, task)] = task
        done, _ = ray.wait(list(running), timeout=POLL_S) if running else ([], [])
        for reference in done:
            report(_result(reference, running.pop(reference)))
        tick()


def _worker_memory() -> int:
    """Bytes that a task declares: at most what the largest node has, since for more it would wait for ever."""
    nodes = [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]
    return min(WORKER_BYTES, max(nodes, default=WORKER_BYTES))


def _result(reference: Any, task: ShardTask) -> ShardResult:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PipelineError):
            raise cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{task.name}: its worker died {RETRIES + 1} times ({reason})") from None


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _without_libraries(*settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A whole data set stays whole under newer libraries; only a run that makes shards must have the same."""
    return [{key: value for key, value in row.items() if key != "libraries"} for row in settings]
