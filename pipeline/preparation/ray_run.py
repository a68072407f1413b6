"""Shards made by Ray: one task a shard, a bounded number in flight. The only file that imports ray."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.util.metrics import Gauge

from pipeline import signals
from pipeline.config import ImageSettings, PrepareOptions
from pipeline.errors import PipelineError, SourceError, first_line, require
from pipeline.preparation import faults, pieces
from pipeline.preparation.decode import decoding_bytes
from pipeline.preparation.machine import (
    LOCAL,
    LOOPBACK,
    Session,
    check_machine,
    check_owner,
    private_session,
    ray_address,
)
from pipeline.preparation.shard import ShardJob, ShardResult, ShardTask, build_shard
from pipeline.progress import ProgressLine
from pipeline.sources.listing import printable
from twotower.processes import python_path

TASKS_PER_WORKER = 2  # one in work, one waiting, so that no worker idles while the driver sleeps
RETRIES = 3  # of a shard whose worker or node died; an error of ours is not retried
OBJECT_STORE_BYTES = 256 * 2**20  # only task lists pass through it
POLL_S = 0.5
# Of a worker's own (libraries are shared), beside one large image: 400 MiB measured with torch, on 500x375 photos.
WORKER_BYTES = 512 * 2**20
NO_CPU_S = 300.0  # an autoscaler may take minutes for the first node
# One thread a worker; the memory of an image is kept for the next one instead of given back to the system: a tenth
# faster, measured on 500x375 JPEGs.
WORKER_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TOP_PAD_": str(32 * 2**20),
}
START_VARIABLE = "TWOTOWER_RAY_START_S"
START_S = 120.0  # an idle machine takes 3 s


@contextlib.contextmanager
def ray_session(options: PrepareOptions) -> Iterator[Callable[[], int]]:
    """Connects to the cluster, or starts one on this machine.

    Gives a function that tells the number of shards to work on at once: on a cluster, nodes come and go.

    Raises:
        PipelineError: the cluster cannot be reached, or Ray does not start.
    """
    check_machine(options)
    address, given = ray_address(options)
    arguments: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.CRITICAL}
    environment = WORKER_ENVIRONMENT | {"PYTHONPATH": python_path()}
    with contextlib.ExitStack() as stack:
        session = None
        if address == LOCAL:
            given = "Ray does not start on this machine"
            session = stack.enter_context(private_session())
            os.environ |= (
                environment  # inherited; a runtime_env would throw away the workers that Ray starts beforehand
            )
            arguments |= _local_arguments(options, session)
        else:
            arguments["address"] = _resolved(address, given)
            arguments["runtime_env"] = {"env_vars": environment}
        _start(arguments, given, session)
        stack.callback(ray.shutdown)
        yield lambda: options.workers or int(ray.cluster_resources().get("CPU", 0))


def _local_arguments(options: PrepareOptions, session: Session) -> dict[str, Any]:
    """Of ``ray.init`` for a Ray of our own, whose ports are on loopback (see prepare.py) and ask for its token."""
    AuthenticationTokenLoader.instance().reset_cache()  # of an earlier session of this process
    return {
        "num_cpus": options.num_workers(),
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_node_ip_address": LOOPBACK,
        "_temp_dir": str(session.folder),
    }


def _resolved(address: str, given: str) -> str:
    """The address that Ray finds for ``auto``, which may be another user's: it looks at everybody's processes."""
    if address != "auto":
        return address
    try:
        found = ray._private.services.canonicalize_bootstrap_address(address, None)
    except Exception as error:
        raise PipelineError(f"{given}: {first_line(error)}") from None
    host, _, port = str(found or "").rpartition(":")
    if port.isdigit():
        check_owner(host.strip("[]"), int(port), given)
    return address


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


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Lets signals and time limits through while Ray waits for its first server.

    Ray waits in C code that keeps Python's lock, 30 s long, so nothing else of this process runs. Here it waits a
    moment, and again, until the time limit ends it.
    """
    wait = ray._private.node.wait_for_persisted_port

    def wait_on(*arguments: Any, timeout_ms: int = 0, **options: Any) -> int:
        while True:
            try:
                return int(wait(*arguments, timeout_ms=int(POLL_S * 1000), **options))
            except RuntimeError as error:
                if "Timed out" not in str(error):
                    raise
            time.sleep(0.001)  # gives the lock away

    ray._private.node.wait_for_persisted_port = wait_on
    try:
        yield
    finally:
        ray._private.node.wait_for_persisted_port = wait


def _start(arguments: dict[str, Any], given: str, session: Session | None) -> None:
    """``ray.init``, whose errors are of many classes, and which may wait for ever.

    Raises:
        PipelineError: it fails.
    """
    limit_s = _start_limit_s()
    waited = f"{given}: no answer within {limit_s:g} s; set {START_VARIABLE} to wait longer (seconds)"
    try:
        # Ray's C++ parts tell of every try
        with _utf8_only(), _interruptible(), signals.quiet(), signals.time_limit(limit_s, waited):
            faults.reach("ray-starting")
            ray.init(**arguments)
    except Exception as error:
        with contextlib.suppress(Exception):
            ray.shutdown()
        folder = ""
        if session:
            session.keep = session.folder.exists()
            kept = f"its files are in {session.folder}, " if session.keep else ""
            folder = f"; {kept}RAY_TMPDIR names another folder"
        raise PipelineError(f"{given}: {first_line(error)}{folder}") from None


def _start_limit_s() -> float:
    text = os.environ.get(START_VARIABLE) or str(START_S)
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = -1.0
    require(0 < limit_s < 1e6, START_VARIABLE, text, "seconds, more than 0")
    return limit_s


def run_shards(
    job: ShardJob,
    tasks: Iterator[ShardTask],
    num_shards: int,
    *,
    workers: Callable[[], int],
    tick: Callable[[], None],
) -> Iterator[ShardResult]:
    """Yields the shards as they are finished, a bounded number in flight: memory does not grow with the data set.

    More are in flight than can run, so an autoscaler sees what is wanted; the bound follows the nodes that join.

    Args:
        job: what all shards share.
        tasks: the shards, taken one by one as there is room.
        num_shards: how many those are.
        workers: tells how many can run at once.
        tick: called at least twice a second.

    Raises:
        PipelineError: the first error of a shard (the others stop), Ray broke, or no node with a CPU came for minutes.
    """
    try:
        yield from _run_shards(_Sender(job, num_shards), tasks, workers, tick)
    except (OSError, ray.exceptions.RayError) as error:  # no OSError of Ray's may be taken for one of the output
        raise PipelineError(f"Ray failed ({first_line(error)}); run the same command again to go on") from None


def _run_shards(
    sender: "_Sender", tasks: Iterator[ShardTask], workers: Callable[[], int], tick: Callable[[], None]
) -> Iterator[ShardResult]:
    running: dict[Any, ShardTask] = {}
    exhausted = False
    last_cpu_s = time.monotonic()
    while running or not exhausted:
        at_once = max(workers(), 1)
        last_cpu_s = time.monotonic() if ray.cluster_resources().get("CPU") else last_cpu_s
        if time.monotonic() - last_cpu_s > NO_CPU_S:
            raise PipelineError(f"no node of the Ray cluster has had a CPU for {NO_CPU_S:.0f} s")
        while not exhausted and len(running) < at_once * TASKS_PER_WORKER:
            task = next(tasks, None)
            exhausted = task is None
            if task is not None:
                running[sender.send(task, at_once)] = task
        done, _ = ray.wait(list(running), timeout=POLL_S) if running else ([], [])
        for reference in done:
            task = running.pop(reference)
            result = _result(reference, task)
            pieces.remove_pieces(sender.job, task)
            yield result
        tick()


class _Sender:
    """Hands shards to Ray: whole, or, the last ones of the run, in pieces and with who joins them.

    Args:
        job: what all shards share.
        num_shards: shards of the run.
    """

    def __init__(self, job: ShardJob, num_shards: int) -> None:
        self.job = job
        self._num_shards = num_shards
        self._sent = 0
        self._shared = ray.put(job)
        memory = _worker_memory(job.image)
        self._build, self._piece, self._join = (
            ray.remote(function).options(num_cpus=1, memory=memory, max_retries=RETRIES, scheduling_strategy="SPREAD")
            for function in (build_shard, pieces.build_piece, pieces.join_pieces)
        )

    def send(self, task: ShardTask, at_once: int) -> Any:
        """Ray's reference to the result of a shard."""
        count = pieces.num_pieces(task, self._sent, self._num_shards, at_once)
        self._sent += 1
        if count == 1:
            return self._build.remote(self._shared, task)
        parts = [self._piece.remote(self._shared, part) for part in pieces.cut(task, count)]
        return self._join.remote(self._shared, task, *parts)


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


def _worker_memory(settings: ImageSettings) -> int:
    """Bytes that a task declares: at most what the largest node has, since for more it would wait for ever."""
    nodes = [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]
    needed = worker_bytes(settings)
    return min(needed, max(nodes, default=needed))


def worker_bytes(settings: ImageSettings) -> int:
    """What a worker may take: its own, the largest file that --max-bytes allows, and what decoding that may take."""
    return WORKER_BYTES + settings.max_bytes + decoding_bytes(settings)


def _result(reference: Any, task: ShardTask) -> ShardResult:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from None
        raise RuntimeError(f"{task.name}: {error}") from error  # not as the cause's class: the output is not to blame
    except ray.exceptions.RayError as error:
        raise SourceError(f"{task.name}: its worker died {RETRIES + 1} times ({first_line(error)})") from None
