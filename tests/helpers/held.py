"""``python -m tests.helpers.held STAGE train ...``: the trainer, which stops itself (SIGSTOP) once, at a stage.

Who started it sees a process that is stopped, does to it or to its disk whatever it likes, and lets it go on (SIGCONT):
no test has to hit a moment. Of two processes the first tower stops; the other one soon waits for it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.__main__ import run

STAGES = ("start", "step", "evaluation", "checkpoint", "end")
STEP, BATCH = 6, 1  # where it stops: before the update after so many, before so many batches have been seen
ORDER: list[str] = []
GRACE = "HELD_GRACE_S"  # variable: launch.GRACE_S, where nothing hangs on how long that is


def hold() -> None:
    """Stops this process, the first time."""
    if not ORDER and os.environ.get("RANK", "0") == "0":
        ORDER.append("held")
        os.kill(os.getpid(), signal.SIGSTOP)


def before(owner: Any, name: str, when: Callable[..., bool] = lambda *_, **__: True) -> None:
    """Holds before a function of a class or module is called."""
    inner = getattr(owner, name)

    def held(*arguments: Any, **more: Any) -> Any:
        if when(*arguments, **more):
            hold()
        return inner(*arguments, **more)

    setattr(owner, name, held)


def family(top: int) -> list[int]:
    """A process of ours and its towers; what else it starts, such as git, comes and goes."""
    towers = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{top}/task/{top}/children").read_text().split():
            with contextlib.suppress(OSError):
                if __name__.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                    towers.append(int(child))
    return [top, *towers]


def stopped_one(top: "subprocess.Popen[Any]", timeout_s: float = 100) -> int:
    """Waits until one of a family has stopped itself; which one."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for process in family(top.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                    return process
        assert top.poll() is None, top.communicate()
        time.sleep(0.02)
    raise AssertionError("it did not come to that stage")


def hold_at(stage: str) -> None:
    """Prepares the trainer to stop at a stage."""
    from trainer.parallel import launch
    from trainer.training import checkpoint
    from trainer.training.loop import Trainer
    from trainer.training.step import StepWork

    run_towers = launch.run_towers

    def start(command: Sequence[str], world: int, **more: Any) -> int:
        position = list(command).index("trainer")
        words = [*command[:position], __spec__.name, stage, *command[position + 1 :]]
        return run_towers(words, world, **more)

    launch.run_towers = start
    launch.GRACE_S = float(os.environ.get(GRACE, launch.GRACE_S))
    if stage == "start":  # the run is locked and prepared; its towers are not ready
        before(launch, "join_mesh")
        before(Trainer, "__init__")
    elif stage == "step":  # the gradients are there, the update is not
        before(StepWork, "_tell", lambda _, inputs, *__: inputs.step == STEP)
    elif stage == "evaluation":
        _hold_in_evaluation(Trainer)
    elif stage == "checkpoint":  # the towers are on the disk, the checkpoint is not yet one
        before(checkpoint, "commit")
    elif stage == "end":
        before(Trainer, "_close")


def _hold_in_evaluation(trainer: Any) -> None:
    inner = trainer._until_stopped

    def batches(self: Any, found: Iterable[Any], most: int) -> Iterator[Any]:
        def slowly() -> Iterator[Any]:
            for number, batch in enumerate(found):
                if number == BATCH:
                    hold()
                yield batch

        return inner(self, slowly(), most)

    trainer._until_stopped = batches


if __name__ == "__main__":
    hold_at(sys.argv.pop(1))
    sys.exit(run())
