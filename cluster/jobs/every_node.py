"""Runs one command on every node of a Ray cluster, all at once: what ``submit --every-node`` makes of a command.

Each node is asked for all of its processors and GPUs, so that nothing else of Ray's runs beside a measurement. The
command finds its node's name in ``TWOTOWER_NODE``, which differs between nodes also where hosts' names do not.
"""

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cluster.errors import ClusterError
from cluster.jobs.entry import child_environment

NODE = "TWOTOWER_NODE"


def unique_names(hosts: Sequence[str]) -> list[str]:
    """Names of nodes: the host's, numbered where several nodes are on one host."""
    counts, seen, names = Counter(hosts), Counter[str](), []
    for host in hosts:
        seen[host] += 1
        names.append(host if counts[host] == 1 else f"{host}-{seen[host]}")
    return names


def run_here(command: list[str], node: str) -> int:
    """Runs a command on the node where this is called; its exit code as a shell has it."""
    program = [sys.executable, *command[1:]] if command[0] in ("python", "python3") else command
    status = subprocess.Popen(program, env=child_environment() | {NODE: node}).wait()
    return status if status >= 0 else 128 - status


def run_everywhere(command: list[str]) -> dict[str, int]:
    """Exit code of the command by node.

    Raises:
        ClusterError: a node has gone.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # the same line from two nodes is two facts
    ray.init(address="auto", log_to_driver=True)
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"])
    nodes = [node for node in nodes if node["Resources"].get("CPU")]
    names = unique_names([node["NodeManagerHostname"] for node in nodes])
    handles: dict[str, Any] = {}
    for name, node in zip(names, nodes, strict=True):
        remote = ray.remote(run_here).options(
            num_cpus=node["Resources"]["CPU"],
            num_gpus=node["Resources"].get("GPU", 0),
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        handles[name] = remote.remote(command, name)
    try:
        return {name: ray.get(handle) for name, handle in handles.items()}
    except ray.exceptions.RayError as error:
        raise ClusterError(f"a node did not finish: {str(error).splitlines()[0]}") from None


def main(arguments: list[str]) -> int:
    """Runs ``-- COMMAND...`` everywhere; the largest exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.jobs.every_node", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("command", nargs=argparse.REMAINDER)
    command = parser.parse_args(arguments).command
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        print("error: cluster.jobs.every_node: no command", file=sys.stderr)
        return 2
    try:
        codes = run_everywhere(command)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, code in codes.items():
        print(f"node {name}: exit code {code}", flush=True)
    return max(codes.values(), default=2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
