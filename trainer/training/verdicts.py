"""What became of steps: read by the host ``lag`` steps after they were launched, in their order."""

import collections
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from trainer.errors import DivergedError
from trainer.parallel.mesh import Mesh
from trainer.parallel.status import GlobalStatus, PendingStatus

SHOWN_KEYS = 4  # of the images of a step that went wrong


@dataclasses.dataclass
class LaunchedStep:
    """A step that was launched, with what the host knew of it then.

    Attributes:
        step: of the run, from 0.
        epoch: of its batch, from 0.
        keys: of its images.
        learning_rate: of its weights.
        begin_s, waited_s: when it began (of ``perf_counter``), and what it waited for its batch, s.
        queue_ready_share: batches ready over the queue's depth, 0..1.
        status: what all processes tell of it, on its way.
    """

    step: int
    epoch: int
    keys: tuple[str, ...]
    begin_s: float
    waited_s: float
    queue_ready_share: float
    learning_rate: float = 0.0
    status: PendingStatus | None = None

    def __str__(self) -> str:
        """For messages."""
        return f"step {self.step} (first key here {self.keys[0]})"

    def begin(self, mesh: Mesh | None, towers: Sequence[str], told: Tensor) -> None:
        """What :func:`trainer.parallel.status.exchange_status` gives is known on the device: it goes to the host."""
        self.status = PendingStatus(mesh, towers, told, str(self))

    def read(self) -> GlobalStatus:
        """What became of it; waits for it.

        Raises:
            PeerError: another process has another batch, or other gradients.
        """
        assert self.status
        return self.status.read()

    def diverged(self, verdict: GlobalStatus) -> DivergedError:
        """What to raise where loss or gradients were not finite."""
        shown = ", ".join(f"{name} {value:.3g}" for name, value in verdict.norms.items())
        return DivergedError(
            f"step {self.step}: not finite (loss {verdict.loss:.4g}, gradient norms {shown}); the update was not "
            f"applied; batch keys {', '.join(self.keys[:SHOWN_KEYS])}, ...; lower optimizer.learning_rate or inspect "
            "these images"
        )


class Verdicts:
    """Steps whose outcome the host has not read yet.

    On a GPU the host launches a step while the one before is computed, so it reads one step late: losses, norms, stop
    requests of all processes. They read the same words after the same steps, so they all end with the same step.

    Args:
        lag: how many steps may be launched before the outcome of one is read.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._launched: collections.deque[LaunchedStep] = collections.deque()
        self._read_s = 0.0

    def add(self, launched: LaunchedStep) -> None:
        """The newest."""
        self._launched.append(launched)

    def due(self, *, leave: int) -> Iterator[LaunchedStep]:
        """Those to be read so that only ``leave`` are left, oldest first."""
        while len(self._launched) > leave:
            yield self._launched.popleft()

    def took_s(self, launched: LaunchedStep) -> float:
        """Wall time of a step that has just been read; of several under way each has what follows the one before."""
        begin_s, self._read_s = max(launched.begin_s, self._read_s), time.perf_counter()
        return self._read_s - begin_s


def default_lag(device: str, mesh: Mesh | None) -> int:
    """1 where a device works by itself and no message holds up the host; else 0: the host waits for it in any case."""
    return int(device.startswith("cuda") and (mesh is None or mesh.link.between_gpus))


def step_row(launched: LaunchedStep, verdict: GlobalStatus, *, took_s: float, replicas: int) -> dict[str, Any]:
    """A step's row of metrics.jsonl."""
    return {
        "kind": "step",
        "step": launched.step + 1,  # 1 is the first
        "epoch": launched.epoch,  # 0 is the first
        "loss": verdict.loss,  # mean over the batch before this step's update, nats
        "learning_rate": launched.learning_rate,
        "images_per_s": len(launched.keys) * replicas / took_s,  # of all replicas, over the step's wall time
        "data_wait_share": min(1.0, launched.waited_s / took_s),  # of the step's wall time, 0..1
        "queue_ready_share": launched.queue_ready_share,  # batches ready over the queue's depth, 0..1
        "gradient_norm": verdict.norms,  # Euclidean, {tower: norm}
    }
