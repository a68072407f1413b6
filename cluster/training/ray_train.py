"""Trains with Ray Train V2: `python -m cluster.training.ray_train --replicas N -- python -m trainer train ...`.

Places one worker a tower pair (``pair.py``), restarts the run from its last checkpoint when a worker or a node
is lost, passes a stop request on, and exits with the training command's own status.
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

from cluster.errors import ClusterError
from cluster.training.pair import PREEMPTED, PairSettings, run_pair

WAIT_LINE_S = 10.0


@dataclass(frozen=True)
class Need:
    """The resources of one pair, and how many pairs."""

    cpus: int
    gpus: int
    replicas: int


def fitting_pairs(nodes: Sequence[dict[str, float]], need: Need) -> int:
    """How many pairs the nodes can hold; a pair is never split over two.

    Args:
        nodes: every living node's resources, such as {"CPU": 8.0, "GPU": 2.0}.
        need: resources of a pair.
    """
    total = 0
    for node in nodes:
        by_cpu = int(node.get("CPU", 0) // need.cpus)
        total += min(by_cpu, int(node.get("GPU", 0) // need.gpus)) if need.gpus else by_cpu
    return total


def choose_gpus(nodes: Sequence[dict[str, float]], towers: int, replicas: int) -> int:
    """GPUs a pair: one a tower where they suffice, else one for both towers, else none (gloo on CPUs)."""
    for gpus in (towers, 1):
        if fitting_pairs(nodes, Need(1, gpus, replicas)) >= replicas:
            return gpus
    return 0


def wait_for_room(need: Need, timeout_s: float) -> None:
    """Wait until the cluster can hold the pairs; an autoscaler is asked for nodes.

    Raises:
        ClusterError: it cannot after `timeout_s`; Ray Train itself would wait for ever.
    """
    deadline, asked = time.monotonic() + timeout_s, False
    try:
        while (found := fitting_pairs(_nodes(), need)) < need.replicas:
            shows = ", ".join(f"{node.get('CPU', 0):g} CPUs {node.get('GPU', 0):g} GPUs" for node in _nodes())
            if time.monotonic() >= deadline:
                raise ClusterError(_missing(need, shows))
            print(f"waiting for resources: {found}/{need.replicas} pairs fit (nodes: {shows})", flush=True)
            if not asked:
                _ask_autoscaler([{"CPU": need.cpus} | ({"GPU": need.gpus} if need.gpus else {})] * need.replicas)
                asked = True
            time.sleep(min(WAIT_LINE_S, max(0.1, deadline - time.monotonic())))
    finally:
        if asked:
            _ask_autoscaler([])  # a request stands until the next one, and would keep idle nodes for ever


def _missing(need: Need, shows: str) -> str:
    wants = f"{need.replicas} x {need.cpus} CPUs" + (f" and {need.gpus} GPUs" if need.gpus else "")
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


def option(command: Sequence[str], name: str) -> str:
    """The value of an option of the training command, "" if it is not given."""
    for position, word in enumerate(command):
        if word == name and position + 1 < len(command):
            return command[position + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return ""


def train(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    """Run the training command on the cluster and return its exit status.

    Raises:
        ClusterError: resources are missing, or the run was lost more often than --max-failures.
    """
    import ray

    run = option(command, "--run")
    if not run or not Path(run).is_absolute():
        raise ClusterError(
            f"--run {run or '(missing)'}: the training command needs an absolute folder that all nodes see"
        )
    # Ray gives the job's address to this process only, and Ray Train's own actors look for it, too.
    address = {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]} if "RAY_ADDRESS" in os.environ else {}
    ray.init(address="auto", logging_level=logging.ERROR, runtime_env={"env_vars": address})
    _, most = arguments.replicas
    gpus = arguments.gpus_per_pair
    gpus = choose_gpus(_nodes(), arguments.towers, most) if gpus is None else gpus
    need = Need(arguments.cpus_per_pair or arguments.towers, gpus, arguments.replicas[0])
    wait_for_room(need, arguments.wait)
    folder = Path(run).parent / f".{Path(run).name}.ray" / f"job-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    settings = PairSettings(tuple(command), str(folder), arguments.towers, max(1, need.cpus // arguments.towers), run)
    _pass_stop_on(folder)
    place = f"{most} pair{'s' if most > 1 else ''} of {arguments.towers} towers"
    print(f"train: {place}, {need.cpus} CPUs and {need.gpus} GPUs each, on {len(_nodes())} nodes", flush=True)
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
            folder.parent.rmdir()  # unless another job of this run uses it


def _fit(settings: PairSettings, need: Need, arguments: argparse.Namespace, attempt: int) -> int:
    """Hand the run to Ray Train; its exit status, or PREEMPTED."""
    from ray.train import TrainingFailedError
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    least, most = arguments.replicas
    resources: dict[str, float] = {"CPU": float(need.cpus)}
    if need.gpus:
        resources["GPU"] = float(need.gpus)
    workers: Any = most if least == most else (least, most)
    callbacks: list[Any] = []
    if least < most:
        from cluster.training.resize import SaveBeforeResize

        callbacks.append(SaveBeforeResize(settings.folder))
    name = f"{Path(settings.folder).name}-{attempt}"  # never used before: Ray Train resumes a run by its name, silently
    run_config: Any = RunConfig(
        name=name,
        storage_path=str(Path(settings.folder).parent),
        failure_config=FailureConfig(max_failures=arguments.max_failures),
        logging_config=LoggingConfig(log_level="WARNING"),
        callbacks=callbacks,
    )
    trainer = DataParallelTrainer(
        run_pair,
        train_loop_config=asdict(settings),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=need.gpus > 0,
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
    text = str(next(iter(failures.values())))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _pass_stop_on(folder: Path) -> None:
    """SIGTERM and SIGINT, which Ray sends to this process only, reach the towers through a file that they look for."""

    def ask(number: int, frame: FrameType | None) -> None:
        (folder / "stop").touch()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)


def _replicas(text: str) -> tuple[int, int]:
    """N, or LEAST:MOST for an elastic run."""
    least, _, most = text.partition(":")
    pair = int(least), int(most or least)
    if not 1 <= pair[0] <= pair[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: expected N, or LEAST:MOST with 1 <= LEAST <= MOST")
    return pair


def add_options(parser: "argparse._ActionsContainer") -> None:
    """The options that `submit` passes on, see `entrypoint`."""
    parser.add_argument(
        "--towers", type=int, choices=(1, 2), metavar="N", help="train with Ray Train, N processes a pair"
    )
    parser.add_argument(
        "--replicas", type=_replicas, metavar="N", help="tower pairs; LEAST:MOST: as many as there is room for"
    )
    parser.add_argument("--cpus-per-pair", type=int, default=0, metavar="N", help="CPUs a pair (default: one a tower)")
    parser.add_argument("--gpus-per-pair", type=int, metavar="N", help="GPUs a pair (default: what the cluster has)")
    parser.add_argument(
        "--max-failures", type=int, default=3, metavar="N", help="restarts after lost workers (default: 3)"
    )
    parser.add_argument(
        "--resize-every",
        type=float,
        default=60,
        metavar="S",
        help="with LEAST:MOST: seconds between two looks for room for more pairs (default: 60)",
    )
    parser.add_argument(
        "--wait", type=float, default=60, metavar="S", help="seconds to wait for resources (default: 60)"
    )


def entrypoint(arguments: argparse.Namespace, command: Sequence[str]) -> tuple[str, ...]:
    """The command as it runs on the cluster: through this module if a training option was given, else as it is."""
    if arguments.towers is None and arguments.replicas is None:
        return tuple(command)
    least, most = arguments.replicas or (1, 1)
    words = [
        "python",
        "-m",
        "cluster.training.ray_train",
        "--towers",
        str(arguments.towers or 2),
        "--replicas",
        f"{least}:{most}",
    ]
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
    return parsed, parsed.command[1:] if parsed.command[:1] == ["--"] else parsed.command


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
