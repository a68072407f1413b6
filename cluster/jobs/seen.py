"""Looks from every node at a job's paths before its command starts: `python -m cluster.jobs.seen PATH... -- COMMAND`.

`submit` puts this before a command of ours whose cluster has nodes on several hosts. A data set that one node does not
see fails late; a result that was written to the disk of some node is lost.
"""

import logging
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import ClusterError
from cluster.jobs.entry import CANNOT_START, child_environment, program_of
from twotower.terminal import print_error


def nearest_folder(path: Path) -> Path:
    """The folder that a path is in or will be made in."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def unseen(places: Sequence[str]) -> list[str]:
    """Those of the files and folders that are not there on the node where this is called."""
    return [place for place in places if not Path(place).exists()]


def marked(path: str, name: str) -> str:
    """A new file of this name in the folder of `path`: who sees it, sees the folder. Only the folder if read-only."""
    folder = nearest_folder(Path(path))
    mark = folder / name
    try:
        mark.touch()
    except OSError:
        return str(folder)
    return str(mark)


def look_from_every_node(places: Sequence[str]) -> dict[str, list[str]]:
    """What each living node does not see, by its address.

    Raises:
        ClusterError: a node has gone.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    try:
        handles = {}
        for node in (node for node in ray.nodes() if node["Alive"]):
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            remote = ray.remote(unseen).options(num_cpus=0, scheduling_strategy=strategy)
            handles[f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"] = remote.remote(list(places))
        return {name: ray.get(handle) for name, handle in handles.items()}
    except ray.exceptions.RayError as error:
        raise ClusterError(f"a node did not look at the paths: {str(error).splitlines()[0]}") from None
    finally:
        ray.shutdown()


def check(paths: Sequence[str]) -> None:
    """Refuse a path that some node does not see.

    Raises:
        ClusterError: naming it and the node.
    """
    name = f".twotower-seen-{secrets.token_hex(8)}"
    places = {path: marked(path, name) for path in paths}
    try:
        missing = look_from_every_node(list(dict.fromkeys(places.values())))
    finally:
        for place in places.values():
            if place.endswith(name):
                Path(place).unlink(missing_ok=True)
    for path, place in places.items():
        if node := next((node for node, lost in missing.items() if place in lost), None):
            raise ClusterError(
                f"{path}: node {node} does not see it; give a folder that every node of the cluster sees"
            )


def main(arguments: list[str]) -> int:
    """Look at `PATH...`, then become COMMAND."""
    end = arguments.index("--")
    command = program_of(arguments[end + 1 :])
    try:
        check(arguments[:end])
        os.execvpe(command[0], command, child_environment())
    except ClusterError as error:
        print_error(error)
        return 2
    except OSError as error:
        print_error(f"cannot start {command[0]!r}: {error.strerror}")
        return CANNOT_START


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
