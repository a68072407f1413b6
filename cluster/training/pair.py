"""A pair of towers on the node where Ray Train put it: starts their processes, watches them, stops them together.

A Ray Train worker is a pair, not a tower: Ray never splits one worker's resources over nodes, and the number of workers
is the number of replicas. The towers run the very command that runs without Ray, in the environment that torchrun
would give them. The pairs of a run tell each other what they must agree on by files in a folder that all nodes see:

    started             the run has begun before: this start resumes it
    stop                the job was asked to stop: save and end
    resize              the cluster holds another number of pairs: save and end, Ray Train starts that number
    done-ATTEMPT-PAIR   how a pair has ended
    ended               all pairs have ended

`python -m cluster.training.pair PID COMMAND...` starts one tower, see `run_with_parent`.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.jobs.entry import program_of, write_json
from twotower import listeners
from twotower.meeting import SECRET, meeting_place, new_secret
from twotower.processes import die_with

POLL_S = 0.1
EXCHANGE_EVERY_S = 1.0
LOSS_GRACE_S = 20.0  # from the loss of one tower to the killing of the other, which may still notice and say so
REFUSAL_GRACE_S = 3.0  # the same after a refusal: the other tower only waits for its partner
SAVE_S = 120.0  # to finish a step and save before a resize; after that the run goes on from its checkpoint before
STOPPED = 3  # the trainer's exit status after it was asked to stop and has saved
LOST = 4  # the trainer's exit status where another tower is gone without a word
PREEMPTED = 75  # ours: stopped and saved because a node is going away; the driver starts the run again
RESIZE, ENDED = "resize", "ended"
GAUGES = {
    "images_per_s": "training rate, images/s",
    "step_time_s": "wall time between two updates, s",
    "data_wait_share": "share of a step spent waiting for images; near 1: the queue is empty",
    "queue_ready_share": "share of batches that were ready when asked for, 0..1",
    "step": "finished updates",
}
METRICS_TAIL_BYTES = 8192


class TowerLost(Exception):
    """A tower was killed or crashed; the run can go on from its last checkpoint."""


@dataclass(frozen=True)
class PairSettings:
    """What every pair of a run is told.

    Attributes:
        command: the training command; `python` is the worker's interpreter.
        folder: a folder of this job that all nodes see, see the top of this file.
        num_towers: processes per pair.
        num_threads: CPU threads per tower.
        run: the trainer's run folder, for the metrics; "" if the command names none.
    """

    command: tuple[str, ...]
    folder: str
    num_towers: int
    num_threads: int
    run: str = ""


@dataclass(frozen=True)
class Rendezvous:
    """Which replica a pair is, and where rank 0 waits for all other towers.

    Attributes:
        replica: number of the pair, of ``num_replicas``.
        host, port: where rank 0 listens; nobody does where there is one pair, whose towers meet in a file.
        meeting: the variables of ``twotower.meeting``: the secret of the run, and that file.
    """

    replica: int
    num_replicas: int
    host: str
    port: int
    meeting: Mapping[str, str] = dataclasses.field(default_factory=dict)


def run_pair(settings: dict[str, Any]) -> int:
    """The function that Ray Train calls on every worker.

    Returns:
        The training command's exit status, the same on all workers; `PREEMPTED` after a preemption notice.

    Raises:
        TowerLost: Ray Train starts the run again, from its last checkpoint.
    """
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    pair = PairSettings(**{**settings, "command": tuple(settings["command"])})
    replica, num_replicas = get_context().get_world_rank(), get_context().get_world_size()
    first_start = replica == 0 and _claim_first_start(Path(pair.folder))
    host = "127.0.0.1" if num_replicas == 1 else str(ray.util.get_node_ip_address())
    (port,) = listeners.free_ports(1, host="")
    mine = {"host": host, "port": port, "first": first_start, "attempt": time.time_ns(), "secret": new_secret()}
    agreed = broadcast_from_rank_zero(mine)  # over Ray's connections, which ask for the cluster's token
    command = list(pair.command) if agreed["first"] else resume_command(pair.command)
    if not agreed["first"] and replica == 0:
        say("restart: going on from the last checkpoint")
    rendezvous = Rendezvous(replica, num_replicas, agreed["host"], agreed["port"], {SECRET: agreed["secret"]})
    with contextlib.ExitStack() as stack:
        if num_replicas == 1:
            rendezvous = dataclasses.replace(rendezvous, meeting=stack.enter_context(meeting_place()))
        towers = [stack.enter_context(_tower(pair, command, rendezvous, tower)) for tower in range(pair.num_towers)]
        return PairMonitor(pair, rendezvous, towers, str(agreed["attempt"])).wait()


def _claim_first_start(folder: Path) -> bool:
    """Whether this is the first start of the job; from now on none is."""
    try:
        (folder / "started").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def resume_command(command: Sequence[str]) -> list[str]:
    """The command for every start but the first: go on from the last checkpoint, overwrite nothing."""
    again = [word for word in command if word != "--overwrite"]
    return again if last_value(command, "--resume") not in ("", "auto", "never") else [*again, "--resume", "auto"]


def run_of(command: Sequence[str]) -> str:
    """The run folder of a training command, of ``--run`` or of ``--resume RUN``; "" if it names none."""
    resumed = last_value(command, "--resume")
    return last_value(command, "--run") or ("" if resumed in ("auto", "never") else resumed)


def last_value(command: Sequence[str], name: str) -> str:
    """The value of an option of a command, the last where it is given twice, as argparse has it; "" without it."""
    found = ""
    for position, word in enumerate(command):
        if word == name and position + 1 < len(command):
            found = command[position + 1]
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found


def tower_environment(pair: PairSettings, rendezvous: Rendezvous, tower: int) -> dict[str, str]:
    """The variables that torchrun would set for a tower; none for a net that lives in one process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(pair.num_threads)}
    world_size = pair.num_towers * rendezvous.num_replicas
    if world_size == 1:
        return environment
    if rendezvous.num_replicas == 1 or rendezvous.host.startswith("127."):
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        environment.setdefault("NCCL_SOCKET_IFNAME", "lo")
    ranks = {
        "RANK": str(rendezvous.replica * pair.num_towers + tower),
        "LOCAL_RANK": str(tower),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(pair.num_towers),
        "GROUP_RANK": str(rendezvous.replica),
        "MASTER_ADDR": rendezvous.host,
        "MASTER_PORT": str(rendezvous.port),
    }
    return environment | ranks | dict(rendezvous.meeting)


@contextlib.contextmanager
def _tower(
    pair: PairSettings, command: Sequence[str], rendezvous: Rendezvous, tower: int
) -> Iterator["subprocess.Popen[bytes]"]:
    """A tower's process; it is killed if this block ends before it does."""
    words = [sys.executable, "-m", "cluster.training.pair", str(os.getpid()), *program_of(command)]
    process = subprocess.Popen(words, env=tower_environment(pair, rendezvous, tower))
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def run_with_parent(parent: int, command: list[str]) -> None:
    """Become the command, and die with the parent (Linux).

    A Ray worker that is killed leaves the processes it started behind. Here the kernel kills them with it, so that a
    restarted run never meets the old one in its folder. This needs a program of its own: a worker has threads, and
    Python code between fork and exec (`preexec_fn`) may then hang.
    """
    if not die_with(parent, signal.SIGKILL):
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Ray's workers block signals
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.execv(command[0], command)


class PairMonitor:
    """Watches the towers of one pair until all pairs have ended.

    Args:
        pair: the run.
        rendezvous: which replica this pair is.
        towers: its processes, tower a's first.
        attempt: this start of the run; the same on all pairs, another after a restart.
    """

    def __init__(
        self, pair: PairSettings, rendezvous: Rendezvous, towers: Sequence["subprocess.Popen[bytes]"], attempt: str
    ) -> None:
        self._folder, self._run = Path(pair.folder), pair.run
        self._replica, self._num_replicas = rendezvous.replica, rendezvous.num_replicas
        self._towers, self._attempt = towers, attempt
        self._stopping = self._preempted = self._resizing = False

    def wait(self) -> int:
        """Wait for the end that the pairs agree on, passing on stop requests and preemption notices.

        Raises:
            TowerLost: see `run_pair`.
        """
        gauges = RunGauges(Path(self._run)) if self._run and self._replica == 0 else None
        first_failure: list[int] = []  # all statuses when a tower first failed: later ones may be our own doing
        kill_at = next_exchange = 0.0
        while True:
            statuses = [tower.poll() for tower in self._towers]
            if any(statuses) and not first_failure:
                first_failure = [status or 0 for status in statuses]
                kill_at = time.monotonic() + (LOSS_GRACE_S if is_recoverable(first_failure) else REFUSAL_GRACE_S)
            if first_failure and max(first_failure) != STOPPED and time.monotonic() > kill_at:
                self._signal(signal.SIGKILL)
            if None not in statuses:
                self._record_end(first_failure or [0])
            if time.monotonic() >= next_exchange:
                if gauges:
                    gauges.update()
                if (agreed := self._exchange()) is not None:
                    return agreed
                next_exchange = time.monotonic() + EXCHANGE_EVERY_S
            time.sleep(POLL_S)

    def _record_end(self, statuses: list[int]) -> None:
        """All towers of this pair have ended: raise if the run must begin again, else write down how."""
        if self._stopping or self._preempted or self._resizing:
            # Our own signal may have come before the trainer could catch it, or before its first step.
            ours = (-signal.SIGTERM, *(() if self._stopping else (128 + signal.SIGTERM,)))
            statuses = [STOPPED if status in ours else status for status in statuses]
        status = exit_status(statuses)
        if self._preempted and status == STOPPED and not self._stopping:
            status = PREEMPTED
        done = self._folder / f"done-{self._attempt}-{self._replica}"
        if not done.exists():
            write_json(done, {"status": status})

    def _exchange(self) -> int | None:
        """Learn what was asked of all pairs, and whether all have ended.

        Ray Train wants the same number of calls on all workers.
        """
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
        status = common_exit_status(self._folder, self._attempt, self._num_replicas) if self._replica == 0 else None
        if status is not None:
            (self._folder / ENDED).touch()
        agreed: int | None = broadcast_from_rank_zero({"status": status})["status"]
        return agreed

    def _signal(self, number: int) -> None:
        for tower in self._towers:
            if tower.poll() is None:
                tower.send_signal(number)


def exit_status(statuses: Sequence[int]) -> int:
    """A pair's exit status from those of its towers at the moment when the first one failed.

    Raises:
        TowerLost: see `is_recoverable`.
    """
    for tower, status in zip("ab", statuses, strict=False):
        if is_recoverable([status]):
            crashed = "lost another one" if status == LOST else "crashed"
            how = f"was ended by {signal.Signals(-status).name}" if status < 0 else crashed
            raise TowerLost(f"tower {tower} {how}")
    return max(statuses)


def is_recoverable(statuses: Sequence[int]) -> bool:
    """Whether a tower was ended by a signal, by an error that nobody foresaw (1), or by the loss of another tower (4).

    A refusal (2) would come again.
    """
    return any(status < 0 or status in (1, LOST) for status in statuses)


def common_exit_status(folder: Path, attempt: str, num_replicas: int) -> int | None:
    """The run's exit status once every pair has ended, or as soon as one has failed; None before."""
    marks = [json.loads(path.read_text()) for path in folder.glob(f"done-{attempt}-*")]
    statuses = [int(mark["status"]) for mark in marks]
    failed = [status for status in statuses if status not in (0, STOPPED, PREEMPTED)]
    if failed:
        return failed[0]
    return max(statuses) if len(statuses) == num_replicas else None


def say(text: str) -> None:
    """One line of the log; Ray Train replaces `print` by its own, which shows everything twice."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def save_before_resize(folder: Path) -> Any:
    """A callback for Ray Train's controller: the towers save before their number changes, so that no step is lost.

    While all workers are well, Ray Train V2 looks every `elastic_resize_monitor_interval_s` whether the cluster now
    holds another number of them (`make_decision_for_running_worker_group` in ray/train/v2/_internal/execution/
    scaling_policy/elastic.py; it learns of a new node within 20 s more). It then ends all workers without a word and
    starts anew. The controller waits in this callback.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2._internal.execution.controller.state import ResizingState

    class SaveBeforeResize(ControllerCallback):
        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            if isinstance(current_state, ResizingState):  # comes only before a resize of living workers
                ask_to_save(folder, SAVE_S)

    return SaveBeforeResize()


def ask_to_save(folder: Path, timeout_s: float) -> bool:
    """Ask all pairs, from outside, to save and end, and wait for it; whether they did in time."""
    ended, resize = folder / ENDED, folder / RESIZE
    ended.unlink(missing_ok=True)  # of the resize before
    resize.touch()
    deadline = time.monotonic() + timeout_s
    while not ended.exists() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    resize.unlink()
    return ended.exists()


class RunGauges:
    """A run's metrics on Ray's Prometheus endpoint, as twotower_NAME with the names of `GAUGES`.

    They are read from the metrics.jsonl that the trainer writes anyway.

    Args:
        run: the trainer's run folder.
    """

    def __init__(self, run: Path) -> None:
        from ray.util.metrics import Gauge

        self._path = run / "metrics.jsonl"
        self._gauges = {}
        for name, text in GAUGES.items():
            self._gauges[name] = Gauge(f"twotower_{name}", description=text, tag_keys=("run", "stage"))
            self._gauges[name].set_default_tags({"run": run.name, "stage": "train"})
        self._last: tuple[float, float] | None = None  # step, when it was seen

    def update(self) -> None:
        """Publish the last step."""
        record = latest_step(self._path)
        if record is None or "step" not in record:
            return
        for name in GAUGES.keys() & record.keys():
            self._gauges[name].set(record[name])
        now = time.monotonic()
        if self._last and record["step"] > self._last[0]:
            self._gauges["step_time_s"].set((now - self._last[1]) / (record["step"] - self._last[0]))
        if self._last is None or record["step"] > self._last[0]:
            self._last = (record["step"], now)


def latest_step(path: Path) -> dict[str, float] | None:
    """The last whole step record of a metrics.jsonl, or None if there is none yet."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - METRICS_TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]  # what follows the last newline may be half a line
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # the first line of the tail may be cut
            continue
        if isinstance(record, dict) and record.get("kind") == "step":
            return {name: value for name, value in record.items() if type(value) in (int, float)}
    return None


if __name__ == "__main__":
    run_with_parent(int(sys.argv[1]), sys.argv[2:])
