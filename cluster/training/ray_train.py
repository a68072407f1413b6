"""Trains with Ray Train V2: `python -m cluster.training.ray_train --replicas N -- python -m trainer train ...`.

Places one worker per pair of towers (pair.py), starts the run again from its last checkpoint when a worker or a node is
lost, passes a stop request on, and exits with the training command's own status. `submit` with --towers or --replicas
makes this of a training command.
"""

import argparse
import contextlib
import itertools
import logging
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.errors import ClusterError, last_line
from cluster.jobs.entry import command_of
from cluster.training.pair import PREEMPTED, PairSettings, run_of, run_pair, save_before_resize
from twotower.words import listed, pluralize

WAIT_LINE_S = 10.0


@dataclass(frozen=True)
class Need:
    """The resources of one pair, and how many pairs."""

    num_cpus: int
    num_gpus: int
    num_replicas: int


def fitting_pairs(nodes: Sequence[dict[str, float]], need: Need) -> int:
    """How many pairs the nodes can hold; a pair is never split over two.

    Args:
        nodes: every living node's resources, such as {"CPU": 8.0, "GPU": 2.0}.
        need: resources of a pair.
    """
    total = 0
    for node in nodes:
        by_cpu = int(node.get("CPU", 0) // need.num_cpus)
        total += min(by_cpu, int(node.get("GPU", 0) // need.num_gpus)) if need.num_gpus else by_cpu
    return total


def choose_gpus(nodes: Sequence[dict[str, float]], num_towers: int, num_replicas: int) -> int:
    """GPUs per pair: one per tower where they suffice, else one for both towers, else none (gloo on CPUs)."""
    for num_gpus in (num_towers, 1):
        if fitting_pairs(nodes, Need(1, num_gpus, num_replicas)) >= num_replicas:
            return num_gpus
    return 0


def wait_for_room(need: Need, timeout_s: float) -> None:
    """Wait until the cluster can hold the pairs; an autoscaler is asked for nodes.

    Raises:
        ClusterError: it cannot after `timeout_s`; Ray Train itself would wait for ever.
    """
    deadline, asked = time.monotonic() + timeout_s, False
    bundle = {"CPU": need.num_cpus} | ({"GPU": need.num_gpus} if need.num_gpus else {})
    try:
        while (found := fitting_pairs(_nodes(), need)) < need.num_replicas:
            shows = listed([f"{node.get('CPU', 0):g} CPUs {node.get('GPU', 0):g} GPUs" for node in _nodes()])
            if time.monotonic() >= deadline:
                raise ClusterError(_missing(need, shows))
            print(f"waiting for resources: {found}/{need.num_replicas} pairs fit (nodes: {shows})", flush=True)
            if not asked:
                _ask_autoscaler([bundle] * need.num_replicas)
                asked = True
            time.sleep(min(WAIT_LINE_S, max(0.1, deadline - time.monotonic())))
    finally:
        if asked:
            _ask_autoscaler([])  # a request stands until the next one, and would keep idle nodes for ever


def _missing(need: Need, shows: str) -> str:
    wants = f"{need.num_replicas} x {need.num_cpus} CPUs" + (f" and {need.num_gpus} GPUs" if need.num_gpus else "")
    return (
        f"missing resources: the towers need {wants}, each on one node; the nodes have: {shows}; "
        "add nodes, or lower --replicas or --cpus-per-pair"
    )


def _ask_autoscaler(bundles: list[dict[str, int]]) -> None:
    """Say which bundles the cluster should be able to hold; nobody listens where there is no autoscaler."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=list(bundles))


def _nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def train(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    """Run the training command on the cluster and return its exit status.

    Raises:
        ClusterError: resources are missing, or the run was lost more often than --max-failures.
    """
    import ray

    run = run_of(command)
    if not run or not Path(run).is_absolute():
        raise ClusterError(
            f"--run {run or '(missing)'}: the training command needs an absolute folder that all nodes see"
        )
    # Ray gives the job's address to this process only, and Ray Train's own actors look for it, too.
    address = {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]} if "RAY_ADDRESS" in os.environ else {}
    ray.init(address="auto", logging_level=logging.ERROR, runtime_env={"env_vars": address})
    least, most = arguments.replicas
    gpus = arguments.gpus_per_pair
    gpus = choose_gpus(_nodes(), arguments.towers, most) if gpus is None else gpus
    need = Need(arguments.cpus_per_pair or arguments.towers, gpus, least)
    wait_for_room(need, arguments.wait)
    folder = Path(run).parent / f".{Path(run).name}.ray" / f"job-{secrets.token_hex(4)}"
    made = [place for place in folder.parents if not place.exists()]
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ClusterError(f"--run {run} cannot be written: {last_line(str(error))}") from error
    num_threads = max(1, need.num_cpus // arguments.towers)
    settings = PairSettings(tuple(command), str(folder), arguments.towers, num_threads, run)
    _pass_stop_on(folder)
    pairs = f"{pluralize(most, 'pair')} of {pluralize(arguments.towers, 'tower')}"
    each = f"{pluralize(need.num_cpus, 'CPU')} and {pluralize(need.num_gpus, 'GPU')} each"
    print(f"train: {pairs}, {each}, on {pluralize(len(_nodes()), 'node')}", flush=True)
    try:
        for attempt in itertools.count():
            status = _fit(settings, need, arguments, attempt)
            if status != PREEMPTED:
                break
            print("a node is going away: the run goes on elsewhere", flush=True)
            wait_for_room(need, arguments.wait)
        return status
    finally:
        for path in (folder, *folder.parent.glob(f"{folder.name}-*")):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            for place in dict.fromkeys((folder.parent, *made)):  # unless the run, or another job of it, uses it
                place.rmdir()


def _pass_stop_on(folder: Path) -> None:
    """SIGTERM and SIGINT, which Ray sends to this process only, reach the towers through a file that they look for."""

    def ask(number: int, frame: FrameType | None) -> None:
        (folder / "stop").touch()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)


def _fit(settings: PairSettings, need: Need, arguments: argparse.Namespace, attempt: int) -> int:
    """Hand the run to Ray Train; its exit status, or PREEMPTED."""
    from ray.train import TrainingFailedError
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    least, most = arguments.replicas
    resources: dict[str, float] = {"CPU": float(need.num_cpus)}
    if need.num_gpus:
        resources["GPU"] = float(need.num_gpus)
    workers: Any = most if least == most else (least, most)
    folder = Path(settings.folder)
    run_config: Any = RunConfig(
        name=f"{folder.name}-{attempt}",  # never used before: Ray Train resumes a run by its name, silently
        storage_path=str(folder.parent),
        failure_config=FailureConfig(max_failures=arguments.max_failures),
        logging_config=LoggingConfig(log_level="WARNING"),
        callbacks=[save_before_resize(folder)] if least < most else [],
    )
    trainer = DataParallelTrainer(
        run_pair,
        train_loop_config=asdict(settings),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=need.num_gpus > 0,
            resources_per_worker=resources,
            placement_strategy="SPREAD",
            elastic_resize_monitor_interval_s=arguments.resize_every,
        ),
        run_config=run_config,
    )
    try:
        result: Any = trainer.fit()
    except TrainingFailedError as error:
        raise ClusterError(
            f"training failed after {arguments.max_failures} restarts: {_cause(error)}; the last checkpoint is in "
            f"{settings.run}/checkpoints: submit again with --resume auto"
        ) from error
    return int(result.return_value or 0)


def _cause(error: BaseException) -> str:
    """The last line of what the workers reported."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    return last_line(str(next(iter(failures.values()))), type(error).__name__)


def _parse_replicas(text: str) -> tuple[int, int]:
    """N, or LEAST:MOST for an elastic run."""
    first, _, second = text.partition(":")
    try:
        least, most = int(first), int(second or first)
    except ValueError:
        least, most = 0, 0
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"{text!r}: expected N, or LEAST:MOST with 1 <= LEAST <= MOST")
    return least, most


def add_options(parser: "argparse._ActionsContainer") -> None:
    """Add the options of a training job, which `submit` passes on, see `entrypoint`."""
    add = parser.add_argument
    add("--towers", type=int, choices=(1, 2), metavar="N", help="train with Ray Train, N processes per pair")
    fits = "pairs of towers; LEAST:MOST: as many as there is room for"
    add("--replicas", type=_parse_replicas, metavar="N", help=fits)
    add("--cpus-per-pair", type=int, default=0, metavar="N", help="CPUs per pair (default: one per tower)")
    add("--gpus-per-pair", type=int, metavar="N", help="GPUs per pair (default: what the cluster has)")
    add("--max-failures", type=int, default=3, metavar="N", help="restarts after lost workers (default: 3)")
    looks = "with LEAST:MOST: seconds between two looks for room for more pairs (default: 60)"
    add("--resize-every", type=float, default=60, metavar="S", help=looks)
    add("--wait", type=float, default=60, metavar="S", help="seconds to wait for resources (default: 60)")


def entrypoint(arguments: argparse.Namespace, command: Sequence[str]) -> tuple[str, ...]:
    """The command as it runs on the cluster: through this module if a training option was given, else as it is."""
    if arguments.towers is None and arguments.replicas is None:
        return tuple(command)
    least, most = arguments.replicas or (1, 1)
    words = ["python", "-m", "cluster.training.ray_train"]
    words += ["--towers", str(arguments.towers or 2), "--replicas", f"{least}:{most}"]
    words += ["--cpus-per-pair", str(arguments.cpus_per_pair), "--max-failures", str(arguments.max_failures)]
    words += ["--wait", f"{arguments.wait:g}", "--resize-every", f"{arguments.resize_every:g}"]
    if arguments.gpus_per_pair is not None:
        words += ["--gpus-per-pair", str(arguments.gpus_per_pair)]
    return (*words, "--", *command)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the training command after `--`."""
    parser = argparse.ArgumentParser(prog="python -m cluster.training.ray_train", description=__doc__.splitlines()[0])
    add_options(parser)
    parser.set_defaults(towers=2, replicas=(1, 1))
    parser.add_argument("command", nargs=argparse.REMAINDER)
    parsed = parser.parse_args(arguments)
    return parsed, command_of(parsed.command)


def main(arguments: list[str]) -> int:
    """Train, and turn errors into one line."""
    parsed, command = parse(arguments)
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # the towers run in the working tree, as everywhere
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # a progress line is news although it resembles the one before
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        return train(parsed, command)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
