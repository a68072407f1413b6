"""One tower pair on the node where Ray Train put it: starts the tower processes, watches them, stops them together.

A Ray Train worker is a pair, not a tower: its one bundle of resources can never be split over nodes, and the number of
workers is the number of replicas. The towers run the very command that runs without Ray, with the environment that
torchrun would give them. Everything that replicas must agree on goes through files in a folder that all nodes see.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRACE_S = 20.0  # between the loss of one tower and the killing of the other, which may still notice and say so
REFUSED_GRACE_S = 3.0  # the same after a refusal: the other tower only waits for its partner
POLL_S = 0.1
AGREE_EVERY_S = 1.0
STOPPED = 3  # the trainer's status after it was asked to stop and has saved
LOST = 4  # the trainer's status where another tower is gone without a word
PREEMPTED = 75  # ours: the same because a node is going away; the driver starts the run again
RESIZE, ENDED = (
    "resize",
    "ended",
)  # files: save, another number of pairs fits; all have ended


class TowerLost(Exception):
    """A tower was killed or crashed; the run can go on from its last checkpoint."""


@dataclass(frozen=True)
class PairSettings:
    """What every pair of a run is told.

    Attributes:
        command: the training command; `python` is the worker's interpreter.
        folder: a folder of this job that all nodes see: its marks say started, stop and done.
        towers: processes a pair.
        threads: CPU threads a tower.
        run: the trainer's run folder, for the metrics; "" if the command names none.
    """

    command: tuple[str, ...]
    folder: str
    towers: int
    threads: int
    run: str = ""


def run_pair(settings: dict[str, Any]) -> int:
    """The function that Ray Train calls on every worker.

    Returns:
        The training command's exit status, the same on all workers; `PREEMPTED` after a preemption notice.

    Raises:
        TowerLost: Ray Train starts the run again, from its last checkpoint.
    """
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    pair = PairSettings(**{**settings, "command": tuple(settings["command"])})
    replica, replicas = get_context().get_world_rank(), get_context().get_world_size()
    first = replica == 0 and _mark_started(Path(pair.folder))
    meeting = broadcast_from_rank_zero(
        {"host": node_address(), "port": free_port(), "first": first, "attempt": time.time_ns()}
    )
    command = list(pair.command) if meeting["first"] else resumed(pair.command)
    if not meeting["first"] and replica == 0:
        say("restart: going on from the last checkpoint")
    place = Place(replica, replicas, "127.0.0.1" if replicas == 1 else meeting["host"], meeting["port"])
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_tower(pair, command, place, tower)) for tower in range(pair.towers)]
        watch = Watch(pair, replica, replicas, children, str(meeting["attempt"]))
        return watch.to_the_end()


@dataclass(frozen=True)
class Place:
    """Where a pair is among the replicas, and where rank 0 waits for the others."""

    replica: int
    replicas: int
    host: str
    port: int


def tower_environment(pair: PairSettings, place: Place, tower: int) -> dict[str, str]:
    """The variables that torchrun would set for a tower; none for a net that lives in one process."""
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(pair.threads)
    if pair.towers * place.replicas == 1:
        return environment
    if place.replicas == 1 or place.host.startswith("127."):
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment | {
        "RANK": str(place.replica * pair.towers + tower),
        "LOCAL_RANK": str(tower),
        "WORLD_SIZE": str(pair.towers * place.replicas),
        "LOCAL_WORLD_SIZE": str(pair.towers),
        "GROUP_RANK": str(place.replica),
        "MASTER_ADDR": place.host,
        "MASTER_PORT": str(place.port),
    }


@contextlib.contextmanager
def _tower(pair: PairSettings, command: Sequence[str], place: Place, tower: int) -> Any:
    """A tower's process; it is killed if this block ends before it does."""
    program = [sys.executable, *command[1:]] if command[0] in ("python", "python3") else list(command)
    tied = [sys.executable, "-m", "cluster.training.run_with_parent", str(os.getpid()), *program]
    process = subprocess.Popen(tied, env=tower_environment(pair, place, tower))
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


class Watch:
    """Watches the towers of one pair until all pairs are done."""

    def __init__(
        self,
        pair: PairSettings,
        replica: int,
        replicas: int,
        children: Sequence["subprocess.Popen[bytes]"],
        attempt: str,
    ) -> None:
        self._folder, self._run = Path(pair.folder), pair.run
        self._replica, self._replicas = replica, replicas
        self._children, self._attempt = children, attempt
        self._stopping = self._preempted = self._resizing = False

    def to_the_end(self) -> int:
        """Wait for the agreed end, passing on stop requests and preemption notices.

        Raises:
            TowerLost: see `run_pair`.
        """
        from cluster.training.gauges import RunGauges

        gauges = RunGauges(Path(self._run)) if self._run and self._replica == 0 else None
        first_bad: list[int] = []  # the statuses when a tower first failed: what follows may be our own doing
        kill_at = next_talk = 0.0
        while True:
            statuses = [child.poll() for child in self._children]
            if any(statuses) and not first_bad:
                first_bad = [status or 0 for status in statuses]
                kill_at = time.monotonic() + (GRACE_S if worth_another_try(first_bad) else REFUSED_GRACE_S)
            if first_bad and max(first_bad) != STOPPED and time.monotonic() > kill_at:
                self._signal(signal.SIGKILL)
            if None not in statuses:
                self._note_end(first_bad or [0])
            if time.monotonic() >= next_talk:
                if gauges:
                    gauges.update()
                agreed = self._talk()
                if agreed is not None:
                    return agreed
                next_talk = time.monotonic() + AGREE_EVERY_S
            time.sleep(POLL_S)

    def _note_end(self, statuses: list[int]) -> None:
        """All towers of this pair have ended: raise if the run must begin again, else write down how."""
        if (
            self._stopping or self._preempted or self._resizing
        ):  # our own signal may come before the trainer can catch it
            statuses = [STOPPED if status == -signal.SIGTERM else status for status in statuses]
        status = verdict(statuses)
        if self._preempted and status == STOPPED and not self._stopping:
            status = PREEMPTED
        done = self._folder / f"done-{self._attempt}-{self._replica}"
        if not done.exists():
            write_mark(done, {"status": status})

    def _talk(self) -> int | None:
        """Exchange news with the other pairs: the same number of calls on all, as Ray Train wants."""
        from ray.train import get_preemption_info
        from ray.train.collective import broadcast_from_rank_zero

        if (self._folder / "stop").exists() and not self._stopping:
            self._stopping = True
            self._signal(signal.SIGTERM)
        if get_preemption_info() is not None and not self._preempted:
            self._preempted = True
            say("this node is going away: saving")
            self._signal(signal.SIGTERM)
        if (self._folder / RESIZE).exists() and not self._resizing:
            self._resizing = True
            say("the cluster holds another number of pairs: saving")
            self._signal(signal.SIGTERM)
        ended = agreed_end(self._folder, self._attempt, self._replicas) if self._replica == 0 else None
        if ended is not None:
            (self._folder / ENDED).touch()
        answer: int | None = broadcast_from_rank_zero({"status": ended})["status"]
        return answer

    def _signal(self, number: int) -> None:
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)


def verdict(statuses: Sequence[int]) -> int:
    """A pair's exit status from those of its towers at the moment when the first one failed.

    Raises:
        TowerLost: see `worth_another_try`.
    """
    if worth_another_try(statuses):
        tower, status = next(found for found in enumerate(statuses) if worth_another_try(found[1:]))
        crashed = "lost another one" if status == LOST else "crashed"
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else crashed
        raise TowerLost(f"tower {'ab'[tower]} {how}")
    return max(statuses)


def worth_another_try(statuses: Sequence[int]) -> bool:
    """Whether a tower was ended by a signal, by an error that nobody foresaw (1), or by the loss of another tower (4).

    Refusals (2) would come again.
    """
    return any(status < 0 or status in (1, LOST) for status in statuses)


def agreed_end(folder: Path, attempt: str, replicas: int) -> int | None:
    """The common exit status once every pair is done, or as soon as one has failed; None before."""
    marks = [json.loads(path.read_text()) for path in folder.glob(f"done-{attempt}-*")]
    statuses = [int(mark["status"]) for mark in marks]
    bad = [status for status in statuses if status not in (0, STOPPED, PREEMPTED)]
    if bad:
        return bad[0]
    return max(statuses) if len(statuses) == replicas else None


def ask_to_save(folder: Path, timeout_s: float) -> bool:
    """Ask all pairs, from outside, to save and end, and wait for it; whether they did in time."""
    ended, resize = folder / ENDED, folder / RESIZE
    ended.unlink(missing_ok=True)
    resize.touch()
    deadline = time.monotonic() + timeout_s
    while not ended.exists() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    resize.unlink()
    return ended.exists()


def resumed(command: Sequence[str]) -> list[str]:
    """The command for every start but the first: go on from the last checkpoint, overwrite nothing."""
    return [word for word in command if word != "--overwrite"] + ["--resume", "auto"]


def write_mark(path: Path, record: dict[str, Any]) -> None:
    """Write a small JSON file whole or not at all."""
    part = path.with_name(f".{path.name}")
    part.write_text(json.dumps(record))
    part.replace(path)


def _mark_started(folder: Path) -> bool:
    """Whether this is the first start of the job."""
    try:
        (folder / "started").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def say(text: str) -> None:
    """One line of the log; Ray Train replaces `print` by its own, which shows everything twice."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def node_address() -> str:
    """The address under which the other nodes know this one."""
    import ray

    return str(ray.util.get_node_ip_address())
