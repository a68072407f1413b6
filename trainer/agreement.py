"""What the processes of a run must agree on: where they start, every step before its update, every checkpoint."""

import dataclasses
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from trainer import checkpoint
from trainer.errors import CheckpointError, PeerError
from trainer.exchange import Link
from trainer.model import TOWERS

FINITE, STOP = 1, 2  # flag bits of the control message; above them, tower a's count of plateaus
PLATEAUS_SHIFT = 8


@dataclasses.dataclass(frozen=True)
class Notes:
    """What one process knows of a step before its update.

    Attributes:
        fingerprint: of the batch.
        finite: loss and gradients are finite here.
        stop: a signal has come.
        plateaus: plateaus of the held-out error so far; 0 where it is not known.
        norms: Euclidean norm of all gradients, by tower held here.
    """

    fingerprint: int
    finite: bool
    stop: bool
    plateaus: int
    norms: Mapping[str, float]

    @property
    def flags(self) -> int:
        """Flags and plateaus as one word."""
        return FINITE * self.finite | STOP * self.stop | self.plateaus << PLATEAUS_SHIFT


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What all processes know after the control message of a step: as :class:`Notes`, for all of them together."""

    finite: bool
    stop: bool
    plateaus: int
    norms: dict[str, float]


def agree(link: Link | None, notes: Notes, where: str) -> Verdict:
    """Compares notes before an update: same batch, finite numbers, stop or go on.

    Args:
        link: the wire to the other tower, or None where this process is alone.
        notes: this process's.
        where: the step, for messages.

    Raises:
        PeerError: the other tower is gone or has another batch.
    """
    flags, norms, plateaus = notes.flags, dict(notes.norms), notes.plateaus
    if link:
        theirs = link.control([notes.fingerprint, flags, _bits_of(norms[link.tower])])
        if theirs[0] != notes.fingerprint:
            raise PeerError(f"{where}: the towers have different batches")
        norms[TOWERS[1 - TOWERS.index(link.tower)]] = _double_of(theirs[2])
        plateaus = max(flags, theirs[1]) >> PLATEAUS_SHIFT
        flags = (flags & theirs[1] & FINITE) | ((flags | theirs[1]) & STOP)
    return Verdict(bool(flags & FINITE), bool(flags & STOP), plateaus, dict(sorted(norms.items())))


def handshake(link: Link | None, facts: Mapping[str, Any]) -> None:
    """Refuses to start where the processes would not do the same work.

    Raises:
        PeerError: naming the first fact in which they differ.
    """
    if link is None:
        return
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, facts, group=link.control_group)
    for name in facts:
        if everyone[0][name] != everyone[1][name]:
            raise PeerError(f"the towers have different values of {name}: a {everyone[0][name]}, b {everyone[1][name]}")


def save_together(run: Path, step: int, writers: Sequence[Callable[[], None]], link: Link | None) -> None:
    """Runs the parts of saving a checkpoint one after the other; none begins before all processes did the one before.

    Raises:
        CheckpointError: it cannot be written (a full disk, for example); all stop, the checkpoint before stays.
    """
    for write in writers:
        problem = None
        try:
            write()
        except (OSError, SafetensorError) as error:
            problem = error
        others = link.control([int(problem is None), 0, 0])[0] if link else 1
        if problem is None and others:
            continue
        shutil.rmtree(checkpoint.unfinished(run, step), ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be saved ({problem or 'the other tower could not'}); "
            f"the one before is whole: make room in {run} and go on with --resume auto"
        )


def _bits_of(number: float) -> int:
    """The bits of a double as int64, so that it fits a control word."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _double_of(bits: int) -> float:
    """The inverse of :func:`_bits_of`."""
    return struct.unpack("<d", struct.pack("<q", bits))[0]
