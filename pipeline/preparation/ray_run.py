"""Shards made by Ray: one task a shard, a bounded number in flight. The only file that imports ray."""

import contextlib
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

from pipeline.config import PrepareOptions
from pipeline.errors import PipelineError, SourceError, Terminated, first_line
from pipeline.preparation.shard import ShardJob, ShardResult, ShardTask, build_shard
from pipeline.progress import ProgressLine
from pipeline.sources.listing import printable

TASKS_PER_WORKER = 2  # one in work, one waiting, so that no worker idles while the driver sleeps
RETRIES = 3  # of a shard whose worker or node died; an error of ours is not retried
OBJECT_STORE_BYTES = 256 * 2**20  # only task lists pass through it
POLL_S = 0.5
WORKER_BYTES = 512 * 2**20  # of its own (libraries are shared): 400 MiB measured with torch, on 500x375 photos
NO_CPU_S = 300.0  # an autoscaler may take minutes for the first node
# One thread a worker; the memory of an image is kept for the next one instead of given back to the system: a tenth
# faster, measured on 500x375 JPEGs.
WORKER_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TOP_PAD_": str(32 * 2**20),
}
CONNECT_S = 5.0


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
    arguments: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "error"}
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
        with _utf8_only():
            ray.init(**arguments)
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise PipelineError(f"--address {address}: no Ray cluster answers there ({first_line(error)})") from None
    previous = signal.signal(signal.SIGTERM, _terminate)  # after ray.init, which sets its own
    try:
        yield lambda: options.workers or int(ray.cluster_resources().get("CPU", 0))
    finally:
        signal.signal(signal.SIGTERM, previous)
        ray.shutdown()


@contextlib.contextmanager
def _utf8_only() -> Iterator[None]:
    """Lets Ray start although the command line or the working folder is no UTF-8.

    Ray sends both to its server for display and for imports, and fails with a UnicodeEncodeError at the first byte
    that is none. All paths of a job are absolute, and our code is found by PYTHONPATH.
    """
    told = ray._private.utils.get_entrypoint_name
    ray._private.utils.get_entrypoint_name = lambda: printable(told())
    folder = str(Path.cwd())
    try:
        with contextlib.chdir(folder if printable(folder) == folder else "/"):
            yield
    finally:
        ray._private.utils.get_entrypoint_name = told


def run_shards(
    job: ShardJob, tasks: Iterator[ShardTask], *, workers: Callable[[], int], tick: Callable[[], None]
) -> Iterator[ShardResult]:
    """Yields the shards as they are finished, a bounded number in flight: memory does not grow with the data set.

    More are in flight than can run, so an autoscaler sees what is wanted; the bound follows the nodes that join.

    Args:
        job: what all shards share.
        tasks: the shards, taken one by one as there is room.
        workers: tells how many can run at once.
        tick: called at least twice a second.

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
            yield _result(reference, running.pop(reference))
        tick()


class Gauges:
    """How far a run is, on Ray's Prometheus endpoint: twotower_images_per_s and twotower_images, stage ``prepare``.

    Args:
        name: of the output folder, the label ``run``.
        progress: what is counted.
    """

    def __init__(self, name: str, progress: ProgressLine) -> None:
        self._progress = progress
        name = printable(name)
        texts = {"images_per_s": "images prepared a second", "images": "images prepared so far"}
        self._gauges = {}
        for key, text in texts.items():
            self._gauges[key] = Gauge(f"twotower_{key}", description=text, tag_keys=("run", "stage"))
            self._gauges[key].set_default_tags({"run": name, "stage": "prepare"})

    def update(self) -> None:
        """Publishes, and prints the plain line when it is time to; to be called at least every second."""
        self._gauges["images_per_s"].set(self._progress.rate())
        self._gauges["images"].set(self._progress.done)
        self._progress.tick()


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


def _worker_memory() -> int:
    """Bytes that a task declares: at most what the largest node has, since for more it would wait for ever."""
    nodes = [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]
    return min(WORKER_BYTES, max(nodes, default=WORKER_BYTES))


def _result(reference: Any, task: ShardTask) -> ShardResult:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise SourceError(f"{task.name}: its worker died {RETRIES + 1} times ({first_line(error)})") from None


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
