"""Saves checkpoints beside the training: a step waits for a copy in memory, not for the disk.

Every process of the first replica copies its towers and writes them in a thread. That all have written, or that one
could not, they learn from the control message that each step sends anyway; then rank 0 makes the checkpoint visible,
in a thread again. Nothing is visible before it is complete, so a kill at any moment leaves the checkpoint before.
"""

import dataclasses
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trainer.config import TOWERS
from trainer.errors import CheckpointError, RunError, TrainerError
from trainer.model.alexnet import AlexNet
from trainer.parallel.mesh import Mesh
from trainer.parallel.status import GlobalStatus, all_could
from trainer.training import checkpoint
from trainer.training.optimizer import PaperSGD
from trainer.training.run_lock import read_holder
from twotower.verbosity import log


@dataclasses.dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint under way; see :class:`trainer.training.checkpoint.CheckpointRecord`."""

    step: int
    config: str
    loader: dict[str, Any] | None
    top1: float | None


class AsyncCheckpointer:
    """Saves one checkpoint at a time. Every process of a run has one, and all call the same methods.

    Args:
        run: run folder.
        net: this process's towers.
        optimizer: their velocities.
        mesh: the other processes, or None where this one is alone.
        keep: newest checkpoints to keep.
    """

    def __init__(self, run: Path, net: AlexNet, optimizer: PaperSGD, *, mesh: Mesh | None, keep: int) -> None:
        self._run, self._net, self._optimizer, self._mesh, self._keep = run, net, optimizer, mesh, keep
        self._writes = mesh is None or mesh.coord.replica == 0
        self._leads = mesh is None or mesh.coord.rank == 0
        self._holder = read_holder(run)
        self._draft: PendingCheckpoint | None = None
        self._is_complete = False  # all processes have written; what is left is rank 0's
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None

    @property
    def written(self) -> bool:
        """This process's part is on the disk, and the others may still write."""
        return self._draft is not None and not self._is_complete and not self._is_busy()

    @property
    def failed(self) -> bool:
        """This process could not write its part."""
        return not self._is_busy() and self._problem is not None

    def begin(self, draft: PendingCheckpoint) -> None:
        """Copies the towers as they are now, and begins to write them; the checkpoint before must be finished."""
        assert self._draft is None
        self._draft, self._is_complete = draft, False
        if self._writes:
            folder = checkpoint.unfinished(self._run, draft.step)
            towers = checkpoint.snapshot(self._net, self._optimizer)
            self._start(lambda: checkpoint.write_towers(folder, towers))

    def advance(self, verdict: GlobalStatus) -> None:
        """Takes what the control message of a step told.

        Raises:
            CheckpointError: a process could not write (a full disk, for example); the checkpoint before stays.
        """
        if verdict.unsaved:
            self._give_up()
        if verdict.written and self._draft is not None and not self._is_complete:
            self._is_complete = True
            if self._leads:
                self._start(self._commit)

    def finish(self) -> None:
        """Waits until the checkpoint under way is visible; all processes must call it.

        Raises:
            CheckpointError: as :meth:`advance`.
        """
        if self._draft is None:
            return
        for stage in (self._wait, self._commit_now):
            stage()
            if not all_could(self._problem is None, self._mesh):
                self._give_up()
        self._draft = None

    def _commit_now(self) -> None:
        if self._leads and not self._is_complete:
            self._start(self._commit)
            self._wait()

    def _start(self, work: Callable[[], None]) -> None:
        """Does something in a thread; what goes wrong there is told to all at the next control message."""

        def run() -> None:
            try:
                work()
            except (OSError, SafetensorError, TrainerError) as error:
                self._problem = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def _wait(self) -> None:
        if self._thread:
            self._thread.join()

    def _is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _commit(self) -> None:
        """Makes the checkpoint visible, and removes those that are not kept."""
        draft = self._draft
        assert draft is not None
        towers = TOWERS[: self._net.config.towers]
        facts: dict[str, Any] = {"config": draft.config, "loader": draft.loader, "top1": draft.top1}
        self._check_holder()
        written = checkpoint.commit(self._run, draft.step, towers=towers, **facts)
        log.debug("checkpoint %s is complete", written)
        checkpoint.rotate(self._run, written, self._keep)

    def _check_holder(self) -> None:
        """A process that was halted for long, on a disk without locks, may have been taken for dead."""
        holder = read_holder(self._run)
        if holder not in (None, self._holder):
            raise RunError(f"{self._run} is now held by {holder}")

    def _give_up(self) -> None:
        """Raises CheckpointError, in every process."""
        step = self._draft.step if self._draft else 0
        self._draft = None
        self._wait()
        shutil.rmtree(checkpoint.unfinished(self._run, step), ignore_errors=True)
        full = any(words in str(self._problem) for words in ("No space left", "quota exceeded"))
        todo = f"make room in {self._run}" if full else f"see to it that {self._run} can be written"
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be saved ({self._problem or 'another process could not'}); "
            f"the one before is complete: {todo}, and go on with --resume auto"
        )
