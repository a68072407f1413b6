"""Runs one command on every node of a cluster at once: `python -m cluster.jobs.every_node -- COMMAND...`.

`submit --every-node` makes this of a command. Each node is asked for all of its CPUs and GPUs, so that nothing else of
Ray's runs beside a measurement. The command finds its node's name in TWOTOWER_NODE, which differs between nodes also
where hosts' names do not.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cluster.errors import ClusterError
from cluster.jobs.entry import child_environment, command_of, program_of, shell_code
from twotower.terminal import print_error

NODE = "TWOTOWER_NODE"


def unique_names(hosts: Sequence[str]) -> list[str]:
    """A name for each node: its host's, with a number where several nodes are on one host."""
    counts, seen, names = Counter(hosts), Counter[str](), []
    for host in hosts:
        seen[host] += 1
        names.append(host if counts[host] == 1 else f"{host}-{seen[host]}")
    return names


def run_here(command: list[str], node: str) -> int:
    """Run a command on the node where this is called, and return its exit code as a shell has it."""
    process = subprocess.Popen(program_of(command), env=child_environment() | {NODE: node})
    return shell_code(process.wait())


def run_everywhere(command: list[str]) -> dict[str, int]:
    """Run a command on all living nodes that have a CPU; its exit code by node.

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
    """Run `-- COMMAND...` everywhere, and return the largest exit code."""
    command = command_of(arguments)
    if not command:
        print("error: no command; expected: python -m cluster.jobs.every_node -- COMMAND...", file=sys.stderr)
        return 2
    try:
        codes = run_everywhere(command)
    except ClusterError as error:
        print_error(error)
        return 2
    for name, code in codes.items():
        print(f"node {name}: exit code {code}", flush=True)
    return max(codes.values(), default=2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
