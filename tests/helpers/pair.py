"""Runs a function in gloo processes, a tower each (rank = 2 x replica + tower), and brings back what they return."""

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.parallel.launch import tower_environment
from trainer.parallel.mesh import Mesh
from twotower.meeting import meeting_place

ROOT = Path(__file__).resolve().parents[2]


def run_pair(function: Callable[..., Any], *arguments: Any, timeout_s: float = 200) -> tuple[Any, Any]:
    """Calls ``function(link, *arguments)`` on both towers; raises what either raised.

    ``function`` must be a module-level function, so that it can be named across processes.
    """
    first, second = run_mesh(call_with_link, function, *arguments, replicas=1, timeout_s=timeout_s)
    return first, second


def call_with_link(mesh: Mesh, function: Callable[..., Any], *arguments: Any) -> Any:
    """For functions that know of one pair only."""
    return function(mesh.link, *arguments)


def run_mesh(function: Callable[..., Any], *arguments: Any, replicas: int, timeout_s: float = 200) -> list[Any]:
    """Calls ``function(mesh, *arguments)`` in 2 x ``replicas`` processes; what they return, by rank."""
    world = 2 * replicas
    with meeting_place() as meeting, tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job"
        job.write_bytes(pickle.dumps((function.__module__, function.__name__, arguments)))
        children = []
        for rank in range(world):
            threads = {"OMP_NUM_THREADS": "1"}  # unless the environment says otherwise
            environment = threads | tower_environment(rank, meeting, world) | {"PYTHONPATH": str(ROOT)}
            out = (Path(folder) / f"log-{rank}").open("wb")
            command = [sys.executable, "-m", "tests.helpers.pair", str(job), f"{folder}/result-{rank}"]
            children.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
        try:
            for child in children:
                child.wait(timeout_s)
        finally:
            for child in children:
                child.kill()
        for rank, child in enumerate(children):
            log = (Path(folder) / f"log-{rank}").read_text()
            assert child.returncode == 0, f"rank {rank} ended with {child.returncode}:\n{log}"
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world)]


def _child() -> None:
    """One tower."""
    import importlib

    from trainer.parallel.mesh import connect

    module, name, arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
    mesh = connect(150.0, "gloo")
    result = getattr(importlib.import_module(module), name)(mesh, *arguments)
    Path(sys.argv[2]).write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _child()
