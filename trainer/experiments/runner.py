"""Runs the tasks of an experiment: here, some at once, or on a Ray cluster, through ``cluster.training.tasks``.

Both give the same: each task with the exit status of its training command, in the order in which they end. A request
to stop ends the trainings, which save, and starts no more.
"""

import collections
import dataclasses
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trainer.errors import RunError
from trainer.experiments.folder import STOP_NAME, RunTask
from trainer.stopping import StopRequest
from trainer.training import run_lock
from twotower import listeners
from twotower.processes import python_path

POLL_S = 0.2
START_S = 120.0  # for a cluster to answer


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a task ended.

    Attributes:
        task: which.
        status: of its training command: 0 finished, 3 stopped and saved, else failed.
        reason: why it could not be run, where its own log does not say.
    """

    task: RunTask
    status: int
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Orders:
    """How tasks are run.

    Attributes:
        words: the training command of a task, see :meth:`RunTask.command`.
        stop: whether a signal has asked to end.
        tick: called about five times a second with the tasks in work; all that may be, on a cluster.
    """

    words: Callable[[RunTask], list[str]]
    stop: StopRequest
    tick: Callable[[Sequence[RunTask]], None]


def run_here(tasks: Sequence[RunTask], orders: Orders, *, parallel: int) -> Iterator[Ending]:
    """Runs tasks as processes of this machine, ``parallel`` at once."""
    waiting = collections.deque(tasks)
    running: dict[subprocess.Popen[bytes], RunTask] = {}
    told = False
    try:
        while running or (waiting and not orders.stop.name):
            while waiting and len(running) < parallel and not orders.stop.name:
                task = waiting.popleft()
                try:
                    running[_start(task, orders.words(task))] = task
                except (RunError, OSError) as error:
                    yield Ending(task, 2, str(error))
            if orders.stop.name and not told:
                told = True
                for child in running:
                    child.terminate()
            for child in [child for child in running if child.poll() is not None]:
                yield Ending(running.pop(child), _shell_code(child.returncode))
            orders.tick(list(running.values()))
            time.sleep(POLL_S)
    finally:
        for child in running:  # an error of ours: nothing goes on without us
            child.terminate()
            child.wait()


def _start(task: RunTask, words: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Starts a training; waits for one that a killed experiment left, until it has saved."""
    run_lock.refuse_held(task.run, patience_s=run_lock.PATIENCE_S)
    child = [sys.executable, "-m", "trainer.experiments.child", str(os.getpid()), sys.executable, *words[1:]]
    with task.log.open("ab") as log:
        return subprocess.Popen(child, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment())


def _environment() -> dict[str, str]:
    """Ours, so that children import this very tree, and show no bar in a log."""
    return os.environ | {"PYTHONPATH": python_path()}


def _shell_code(status: int) -> int:
    return status if status >= 0 else 128 - status


@dataclasses.dataclass(frozen=True)
class Place:
    """A Ray cluster, and what a task needs of it.

    Attributes:
        address: as Ray takes it: ``auto``, or HOST:PORT.
        cpus: of a task.
        gpus: of a task.
    """

    address: str
    cpus: int
    gpus: int


def check_cluster(address: str) -> None:
    """Looks whether a cluster can be at an address, before anything is written for it.

    Raises:
        RunError: nobody answers there, or another user of this machine does.
    """
    if told := listeners.refusal(address):
        raise RunError(f"--address {address}: {told}")


def run_on_cluster(tasks: Sequence[RunTask], orders: Orders, place: Place) -> Iterator[Ending]:
    """Runs tasks on a Ray cluster whose nodes see the data set and the experiment's folder under the same paths.

    The trainer knows no Ray: a process of ``cluster`` does this, told by lines of JSON.

    Raises:
        RunError: the cluster cannot be reached, or was lost.
    """
    if not tasks:
        return
    left = {task.name: task for task in tasks}
    stop_file = tasks[0].folder / STOP_NAME
    lines = "".join(
        json.dumps({"name": task.name, "command": orders.words(task), "log": str(task.log)}) + "\n" for task in tasks
    )
    words = [sys.executable, "-m", "trainer.experiments.child", str(os.getpid()), sys.executable]
    words += ["-m", "cluster.training.tasks", "--address", place.address, "--stop-file", str(stop_file)]
    words += ["--cpus", str(place.cpus), "--gpus", str(place.gpus)]
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as errors:
        told.write(lines.encode())
        told.seek(0)
        process = subprocess.Popen(words, stdin=told, stdout=subprocess.PIPE, stderr=errors, env=_environment())
        try:
            ready, deadline = False, time.monotonic() + START_S
            for line in _lines(process, lambda: _look(orders, left, stop_file)):
                found = json.loads(line) if line.startswith("{") else {}
                ready = ready or "ready" in found
                if not ready and time.monotonic() > deadline:  # Ray's own wait for a server has no end
                    process.kill()
                    raise RunError(f"--address {place.address}: no Ray cluster answers within {START_S:.0f} s")
                if "name" not in found:
                    if line and "ready" not in found:
                        print(line, flush=True)
                    continue
                yield Ending(left.pop(found["name"]), int(found["status"]), found.get("reason", ""))
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
        if left and not orders.stop.name:
            errors.seek(0)
            said = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
            reason = said[-1].removeprefix("error: ") if said else f"its driver ended with status {process.returncode}"
            raise RunError(f"--address {place.address}: {reason}")


def _look(orders: Orders, left: dict[str, RunTask], stop_file: Path) -> None:
    """Passes a stop on by a file, which tasks on every node look for."""
    if orders.stop.name and not stop_file.exists():
        stop_file.touch()
    orders.tick(list(left.values()))


def _lines(process: "subprocess.Popen[bytes]", look: Callable[[], None]) -> Iterator[str]:
    """Lines of a process's output as they come, and an empty one where none comes; ``look`` is called meanwhile."""
    assert process.stdout is not None
    held = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            look()
            if not selector.select(POLL_S):
                yield ""
                continue
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                return
            *whole, held = (held + chunk).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
