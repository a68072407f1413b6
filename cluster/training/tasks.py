"""Runs commands as Ray tasks: `python -m cluster.training.tasks --address A --cpus N --gpus N --stop-file F < LINES`.

A line of stdin is a task, {"name": ..., "command": [...], "log": PATH}. The first line of stdout, {"ready": true}, says
that the cluster answers, each later one how a task ended, {"name": ..., "status": ..., "node": ...}, as they end. Logs
and whatever a command writes are on a disk that all nodes see. A task whose worker or node dies is given to another, so
its command must be one that goes on when it is given again. `python -m trainer experiment --address A` starts this.
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, last_line
from cluster.jobs.entry import child_environment, program_of, shell_code
from cluster.jobs.loopback_node import STAY_ON_LOOPBACK
from cluster.jobs.tree import TREE
from cluster.training.pair import LOST, SAVE_S
from cluster.training.ray_train import Need, wait_for_room
from twotower import listeners
from twotower.processes import python_path
from twotower.terminal import print_error

RETRIES = 5  # of a task whose worker or node died
REFUSED = 2  # a command's status where there is something to mend, such as a run that another process holds
TRIES, PAUSE_S = 4, 5.0  # a task that follows one of a killed node: the old process may be about to end
POLL_S = 0.5
ROOM_S = 60.0  # to wait for a node that is large enough


def run_command(command: list[str], log: str, stop_file: str) -> tuple[int, str]:
    """The task: runs a command on this node to its end.

    Args:
        command: program and arguments; `python` is the worker's interpreter.
        log: gets what it says.
        stop_file: where it exists, the command is asked to end.

    Returns:
        Exit status as a shell has it, and the node's name.
    """
    import ray

    node = ray.util.get_node_ip_address()
    for attempt in range(TRIES):
        if Path(stop_file).exists():
            return 128 + signal.SIGTERM, node
        status = _run_once(command, log, stop_file)
        if status != REFUSED or attempt + 1 == TRIES:
            break
        time.sleep(PAUSE_S)
    return status, node


def _run_once(command: list[str], log: str, stop_file: str) -> int:
    words = [sys.executable, "-m", "cluster.training.pair", str(os.getpid()), *program_of(command)]
    with Path(log).open("ab") as stream:
        child = subprocess.Popen(
            words,
            cwd=TREE,
            env=child_environment() | {"PYTHONPATH": python_path()},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )
    try:
        while child.poll() is None and not Path(stop_file).exists():
            time.sleep(POLL_S)
    finally:  # a cancelled task, too
        if child.poll() is None:
            child.terminate()
    try:
        return shell_code(child.wait(SAVE_S))
    except subprocess.TimeoutExpired:
        child.kill()
        return shell_code(child.wait())


def check_address(address: str) -> None:
    """Refuses an address where nothing listens, which Ray would wait for, or another user, who would get the token.

    Raises:
        ClusterError: says so.
    """
    if told := listeners.refusal(address):
        raise ClusterError(told)


def run_all(tasks: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Hands all tasks to Ray, so that an autoscaler sees what is wanted, and tells of each end.

    Raises:
        ClusterError: the cluster cannot be reached, or has no node that is large enough.
    """
    check_address(arguments.address)
    os.environ.setdefault(STAY_ON_LOOPBACK, "0")  # else Ray looks for a cluster of `up --local` elsewhere, for ever
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # who names a token wants it to be sent
    import ray
    from ray.exceptions import RayError

    try:
        if arguments.address == "auto":  # Ray looks at everybody's processes
            check_address(str(ray._private.services.canonicalize_bootstrap_address("auto", None)))
        ray.init(
            address=arguments.address,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
        )
    except ClusterError:
        raise
    except Exception as error:  # of many classes
        raise ClusterError(f"no Ray cluster answers: {last_line(str(error))}") from None
    print(json.dumps({"ready": True}), flush=True)
    # `ray job stop` sends it to all processes of a job, and the kernel where who started this is gone: tasks then save
    signal.signal(signal.SIGTERM, lambda *_: Path(arguments.stop_file).touch())
    wait_for_room(Need(arguments.cpus, arguments.gpus, 1), ROOM_S)
    task = ray.remote(run_command).options(
        num_cpus=arguments.cpus, num_gpus=arguments.gpus, max_retries=RETRIES, scheduling_strategy="SPREAD"
    )
    running = {task.remote(row["command"], row["log"], arguments.stop_file): row["name"] for row in tasks}
    while running:
        for reference in ray.wait(list(running), timeout=POLL_S)[0]:
            row: dict[str, Any] = {"name": running.pop(reference)}
            try:
                row["status"], row["node"] = ray.get(reference)
            except RayError as error:
                row |= {"status": LOST, "reason": f"lost {RETRIES + 1} times: {last_line(str(error))}"}
            print(json.dumps(row), flush=True)


def main(words: list[str]) -> int:
    """Runs the tasks of stdin; status 0 where each has been told of, however it ended."""
    parser = argparse.ArgumentParser(prog="python -m cluster.training.tasks", description=__doc__.splitlines()[0])
    parser.add_argument("--address", required=True)
    parser.add_argument("--stop-file", required=True)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0)
    arguments = parser.parse_args(words)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; who started this tells by the file
    try:
        run_all([json.loads(line) for line in sys.stdin if line.strip()], arguments)
        return 0
    except ClusterError as error:
        print_error(error)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
