"""Starts one process per tower on this machine, and ends them together."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import torch

from trainer import stopping
from trainer.config import TOWERS, TrainConfig
from trainer.errors import PeerError, RunError
from trainer.model import kernels
from trainer.parallel.backend import nccl_environment
from trainer.parallel.mesh import Mesh, connect
from trainer.parallel.world import INTERFACES, PLACES, World, has_interface
from twotower.meeting import meeting_place
from twotower.private import NotPrivateError
from twotower.processes import die_with
from twotower.terminal import print_error
from twotower.verbosity import log

CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)
# DALI's decoder on CPUs ends the process where one image of a batch is refused while others are being decoded; and a
# mapped tar that somebody cuts off while it is read does so, too.
DAMAGE = "; a damaged image or tar can do that, and python -m pipeline verify DATASET --full finds it"
GRACE_S = 15.0  # between the end of one tower and the killing of the others
LAUNCHER = "TWOTOWER_LAUNCHER"  # its process id, for the towers that it starts


def choose_device(requested: str | None, rank: int = 0) -> str:
    """The device of a rank: as requested, or a GPU where there is one, or the CPU.

    Args:
        requested: ``cpu``, ``cuda``, ``cuda:N`` or None.
        rank: rank on this machine; rank r takes GPU r, or shares the only one.

    Raises:
        RunError: there is no such GPU here.
    """
    kernels.check_switch()
    if requested == "cpu" or (requested is None and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if hidden is None else f" with CUDA_VISIBLE_DEVICES={hidden}"
        raise RunError(f"--device {requested}: torch sees no GPU here{why}; leave --device out or say --device cpu")
    count = torch.cuda.device_count()
    if requested and ":" in requested:
        number = requested.partition(":")[2]
        if not number.isdigit() or int(number) >= count:
            raise RunError(f"--device {requested}: torch sees {count} GPUs here, cuda:0 to cuda:{count - 1}")
        return requested
    return f"cuda:{rank % count}"


def default_processes(device: str | None, towers: int) -> int:
    """Processes of a run that nobody has said it of: one per tower where each can have a GPU of its own.

    Args:
        device: as requested; a GPU by its number is one GPU.
        towers: of the net.
    """
    return 2 if device in (None, "cuda") and towers == 2 and torch.cuda.device_count() > 1 else 1


def check_backend(backend: str, device: str, processes: int) -> None:
    """Refuses NCCL where there is no GPU, before any process is started; the rest they decide together.

    Raises:
        RunError: says so.
    """
    if backend == "nccl" and device == "cpu" and processes > 1:
        raise RunError("--backend nccl: it needs a GPU, and this is a CPU; leave --backend out, or say --backend gloo")


def join_mesh(world: World, device: str, train: TrainConfig, backend: str = "auto") -> Mesh:
    """Connects this process to the others of its world; they are waited for as long as the recipe says.

    Args:
        world: where it stands.
        device: ``cpu`` or ``cuda:N``.
        train: how long to wait.
        backend: see :mod:`.backend`: by default NCCL with a GPU a rank; towers on CPUs, or on one GPU together, talk
            through gloo.

    Raises:
        PeerError: they cannot find each other.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):  # torchrun on one machine
        for name in INTERFACES:
            os.environ.setdefault(name, "lo")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    mesh = connect(train.start_timeout_s, backend, device=device, peer_timeout_s=train.peer_timeout_s)
    log.debug("rank %d talks to the others through %s", world.rank, mesh.backend)
    return mesh


def tower_environment(rank: int, meeting: Mapping[str, str], world: int = 2) -> dict[str, str]:
    """As torchrun would set it for one of ``world`` towers, all here; ``meeting``: of :func:`meeting_place`.

    They listen on the loopback interface only, unless the user names another.
    """
    given = {name: os.environ.get(name, "") for name in INTERFACES}
    unset = {name for name, value in given.items() if not value or not has_interface(value)}
    return (
        {name: value for name, value in os.environ.items() if name not in unset.union(PLACES)}
        | dict.fromkeys(unset, "lo")
        | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
        }
        | dict(meeting)
    )


def start_towers(
    run: Path,
    data: Path,
    *,
    device: str | None,
    skip_list: Path | None = None,
    replicas: int = 1,
    profile_steps: int = 0,
    backend: str = "auto",
    held: Sequence[int] = (),
) -> int:
    """Runs the towers of a prepared run, ``replicas`` pairs of them, to their end; see :func:`run_towers`."""
    command = [sys.executable, "-m", "trainer", "tower", "--run", str(run), "--data", str(data)]
    command += ["--device", device] if device else []
    command += ["--skip-list", str(skip_list)] if skip_list else []
    command += ["--profile", str(profile_steps)] if profile_steps else []
    command += ["--backend", backend] if backend != "auto" else []
    chosen = choose_device(device)
    on_one = backend == "nccl" and shares_gpu(device, 2 * replicas)
    return run_towers(command, 2 * replicas, device=chosen, nccl_on_one_gpu=on_one, held=held)


def shares_gpu(requested: str | None, world: int) -> bool:
    """Whether some of ``world`` ranks on this machine get the same device from :func:`choose_device`."""
    return bool(requested and ":" in requested) or torch.cuda.device_count() < world


def run_towers(
    command: Sequence[str],
    world: int,
    *,
    device: str = "cpu",
    nccl_on_one_gpu: bool = False,
    held: Sequence[int] = (),
) -> int:
    """Runs a command as ``world`` towers on this machine, each with its share of the cores, to the end of all.

    SIGTERM, SIGINT and SIGHUP are passed on; in training each tower then finishes its step and saves. If one tower ends
    badly, the others get ``GRACE_S`` to notice it. They inherit the handles ``held``: a lock is theirs, too, so that it
    lasts while they save although this process was killed. With ``nccl_on_one_gpu``
    they are told what NCCL needs for that.

    Returns:
        Exit status: 0, or that of the first tower that failed (128 + number where a signal ended it).

    Raises:
        Stopped: a signal came, and the towers ended before they had anything to finish.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // world)
    children: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    with _meeting_place() as meeting, stopping.handled_by(pass_on):
        with stopping.held_back():  # each tower takes it when it is ready to
            for rank in range(world):
                environment = tower_environment(rank, meeting, world) | kernels.environment(device)
                environment |= nccl_environment(rank, os.environ) if nccl_on_one_gpu else {}
                if not _is_number_of_threads(environment.get("OMP_NUM_THREADS", "")):
                    environment["OMP_NUM_THREADS"] = str(threads)
                environment[LAUNCHER] = str(os.getpid())
                child = subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=held)
                children.append(child)
                log.debug("rank %d is process %d: %s", rank, child.pid, " ".join(command))
        status = _wait(children, asked)
    if asked and status == 128 + asked[0]:
        raise stopping.Stopped(asked[0])
    return status


@contextlib.contextmanager
def _meeting_place() -> Iterator[dict[str, str]]:
    """:func:`twotower.meeting.meeting_place`.

    Raises:
        PeerError: there is no place for it.
    """
    with contextlib.ExitStack() as stack:
        try:
            meeting = stack.enter_context(meeting_place())
        except (NotPrivateError, OSError) as error:
            raise PeerError(f"the towers cannot meet: {error}; set TMPDIR to a folder of your own") from None
        yield meeting


def _is_number_of_threads(text: str) -> bool:
    """Whether OpenMP takes a value of OMP_NUM_THREADS: numbers from 1, one a level."""
    return bool(re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", text))


def _wait(children: Sequence[subprocess.Popen[bytes]], asked: Sequence[int]) -> int:
    """Waits for all towers; the first bad end starts the grace of the others."""
    first_failure: int | None = None
    deadline = float("inf")
    while any(child.poll() is None for child in children):
        for rank, child in enumerate(children):
            if first_failure is None and child.poll():
                first_failure = _status(rank, child.returncode, asked)
                stopped = first_failure - 128 in asked  # before it knew the others: they have done nothing either
                deadline = time.monotonic() + (0 if stopped else GRACE_S)
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)
    for rank, child in enumerate(children):
        if first_failure is None and child.returncode:
            first_failure = _status(rank, child.returncode, asked)
    return first_failure or 0


def _status(rank: int, code: int, asked: Sequence[int]) -> int:
    """Exit status of a tower that failed; says so where neither the tower nor :func:`run_towers` says it."""
    if code >= 0:
        return code
    if -code not in asked:
        number = signal.Signals(-code)
        hint = DAMAGE if number in CRASHES else ""
        print_error(f"tower {TOWERS[rank % 2]} (rank {rank}) was ended by {number.name}{hint}")
    return 128 - code


def die_with_parent() -> None:
    """Asks Linux to end this process when its launcher dies, so that no tower is left behind."""
    if not die_with(int(os.environ.get(LAUNCHER, os.getppid())), signal.SIGTERM):
        sys.exit(1)
