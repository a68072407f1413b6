"""Starts one process per tower on this machine, and ends them together."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.config import TOWERS
from trainer.errors import RunError
from trainer.model import kernels
from trainer.parallel.mesh import Mesh, connect

GRACE_S = 15.0  # between the end of one tower and the killing of the others


def choose_device(requested: str | None, rank: int = 0) -> str:
    """The device of a rank: as requested, or a GPU where there is one, or the CPU.

    Args:
        requested: ``cpu``, ``cuda``, ``cuda:N`` or None.
        rank: rank on this machine; rank r takes GPU r, or shares the only one.
    """
    if requested == "cpu" or (requested is None and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise RunError(f"--device {requested}: torch sees no GPU here; leave --device out or say --device cpu")
    if requested and ":" in requested:
        return requested
    return f"cuda:{rank % torch.cuda.device_count()}"


def join_mesh(device: str, timeout_s: float) -> Mesh:
    """Connects this process to the others as the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) says.

    NCCL needs a GPU a rank; towers on CPUs, or on one GPU together, talk through gloo.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "2"))
    own_gpu = device.startswith("cuda") and torch.cuda.device_count() >= here
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    return connect(timeout_s, "nccl" if own_gpu else "gloo")


def tower_environment(rank: int, port: int, world: int = 2) -> dict[str, str]:
    """As torchrun would set it for one of ``world`` towers, all here; the store listens on ``port`` of this machine."""
    return (
        {"GLOO_SOCKET_IFNAME": "lo"}
        | os.environ
        | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
    )


def start_towers(
    run: Path,
    data: Path,
    *,
    device: str | None,
    skip_list: Path | None = None,
    replicas: int = 1,
    profile_steps: int = 0,
    held: Sequence[int] = (),
) -> int:
    """Runs the towers of a prepared run, ``replicas`` pairs of them, to their end; see :func:`run_towers`."""
    command = [sys.executable, "-m", "trainer", "tower", "--run", str(run), "--data", str(data)]
    command += ["--device", device] if device else []
    command += ["--skip-list", str(skip_list)] if skip_list else []
    command += ["--profile", str(profile_steps)] if profile_steps else []
    return run_towers(command, 2 * replicas, device=choose_device(device), held=held)


def run_towers(command: Sequence[str], world: int, *, device: str = "cpu", held: Sequence[int] = ()) -> int:
    """Runs a command as ``world`` towers on this machine, each with its share of the cores, to the end of all.

    SIGTERM and SIGINT are passed on; in training each tower then finishes its step and saves. If one tower ends badly,
    the others get ``GRACE_S`` to notice it. They inherit the handles ``held``: a lock is theirs, too, so that it lasts
    while they save although this process was killed.

    Returns:
        Exit status: 0, or that of the first tower that failed (128 + number where a signal ended it).
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, len(os.sched_getaffinity(0)) // world)
    children = []
    for rank in range(world):
        environment = tower_environment(rank, store.port, world) | kernels.environment(device)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        children.append(subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=held))
    with _passing_signals(children):
        return _wait(children)


@contextlib.contextmanager
def _passing_signals(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Sends SIGTERM and SIGINT on to the children."""

    def pass_on(number: int, _frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for all towers; the first bad end starts the grace of the others."""
    first_failure: int | None = None
    deadline = float("inf")
    while any(child.poll() is None for child in children):
        for rank, child in enumerate(children):
            if first_failure is None and child.poll():
                first_failure = _status(rank, child.returncode)
                deadline = time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)
    for rank, child in enumerate(children):
        if first_failure is None and child.returncode:
            first_failure = _status(rank, child.returncode)
    return first_failure or 0


def _status(rank: int, code: int) -> int:
    """Exit status of a tower that failed; says so where the tower could not say it itself."""
    if code < 0:
        print(
            f"error: tower {TOWERS[rank % 2]} (rank {rank}) was ended by {signal.Signals(-code).name}", file=sys.stderr
        )
        return 128 - code
    return code


def die_with_parent() -> None:
    """Asks Linux to end this process when its launcher dies, so that no tower is left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() == 1:
        sys.exit(1)
