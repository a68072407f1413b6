"""What the processes of a run must agree on: where they start, every step before its update, every checkpoint.

The words of a step are a tensor on the device that computes it: a GPU knows from them whether the update may be applied
(:func:`exchange_status`), and the host reads them when it likes (:class:`PendingStatus`).
"""

import dataclasses
import hashlib
import itertools
import json
import math
import platform
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.config import TOWERS
from trainer.errors import PeerError
from trainer.parallel.mesh import Mesh, Replicas
from trainer.parallel.proof import all_gather_bytes, all_gather_json
from twotower.terminal import warn
from twotower.words import one_line

FINITE, STOP, WRITTEN, FAILED = 1, 2, 4, 8  # flag bits of the control message; above them, tower a's count of plateaus
PLATEAUS_SHIFT = 8
PAIR_WORDS, REPLICA_WORDS, HOST_WORDS = 3, 4, 3  # int64: from the peer, from each replica, of this process
NORM_TOLERANCE = 1e-5  # machines of several kinds may add up the same gradients in another order


@dataclasses.dataclass(frozen=True)
class LocalStatus:
    """What the host of one process knows of a step before it is made.

    Attributes:
        fingerprint: of this process's rows of the batch, which both towers of a pair have.
        order_fingerprint: of what decides the whole batch, for all replicas.
        stop: a signal has come.
        plateaus: plateaus of the held-out error so far; 0 where it is not known.
        written: this process's part of the checkpoint under way is on the disk.
        unsaved: it could not be written.
    """

    fingerprint: int
    order_fingerprint: int
    stop: bool
    plateaus: int
    written: bool = False
    unsaved: bool = False

    @property
    def words(self) -> tuple[int, int, int]:
        """Both fingerprints; flags and plateaus as one word, without what only the device knows."""
        saving = WRITTEN * self.written | FAILED * self.unsaved
        return self.fingerprint, self.order_fingerprint, STOP * self.stop | saving | self.plateaus << PLATEAUS_SHIFT


@dataclasses.dataclass(frozen=True)
class GlobalStatus:
    """What all processes know after the control messages of a step.

    Attributes:
        finite: loss and gradients are, in all of them.
        stop: one must.
        plateaus: of the held-out error so far.
        norms: Euclidean norm of all gradients, by tower.
        loss: of all images; nan where tower a is not held.
        written: each process's part of the checkpoint under way is on the disk.
        unsaved: one could not write it.
    """

    finite: bool
    stop: bool
    plateaus: int
    norms: dict[str, float]
    loss: float
    written: bool
    unsaved: bool


def exchange_status(
    mesh: Mesh | None, words: Tensor, finite: Tensor, norms: Mapping[str, Tensor], loss: Tensor
) -> tuple[Tensor, Tensor]:
    """Compares notes before an update: same batch, same gradients in all replicas, finite numbers, stop or go on.

    The towers of each pair swap words first, then the same towers of all pairs, so that all know the same. Where the
    words are on a GPU, NCCL carries them, and the host does not wait.

    Args:
        mesh: the other processes, or None where this one is alone.
        words: :attr:`LocalStatus.words`, (3,) int64; on the CPU where gloo carries the messages.
        finite: loss and gradients are finite here, a scalar.
        norms: of the gradients, by tower held here, scalars.
        loss: a scalar.

    Returns:
        All that was told, int64, for :class:`PendingStatus`; and whether all is finite and the batches are the same,
        a scalar bool: the update may be applied.
    """
    figures = torch.stack([*norms.values(), loss]).double().view(torch.int64)
    figures, finite = figures.to(words.device), finite.to(words.device)
    fingerprint, order, flags = words.unbind()
    flags = flags | FINITE * finite
    told, sound = [words[: HOST_WORDS - 1], flags[None], figures], finite
    if mesh:
        theirs = mesh.link.exchange_words(torch.stack((fingerprint, flags, figures[0])))
        flags = _both(flags, theirs[1])
        sound = (flags & FINITE).bool() & (theirs[0] == fingerprint)
        told.append(theirs)
        if mesh.replicas:
            rows = mesh.replicas.gather_words(torch.stack((order, flags, *figures)))
            sound = sound & (rows[:, 1] & FINITE).bool().all() & (rows[:, 0] == order).all()
            told.append(rows.flatten())
    return torch.cat(told), sound


class PendingStatus:
    """What was told of a step, on its way to this host.

    Args:
        mesh: the other processes, or None where this one is alone.
        towers: those held here, in the order in which their norms were given.
        told: of :func:`exchange_status`.
        where: the step, for messages.
    """

    def __init__(self, mesh: Mesh | None, towers: Sequence[str], told: Tensor, where: str) -> None:
        self._mesh, self._towers, self._where = mesh, towers, where
        self._event: Any = None
        if told.is_cuda:  # into memory of its own: the next step may write where this one wrote
            self._told = torch.empty(told.shape, dtype=told.dtype, pin_memory=True)
            self._told.copy_(told, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(torch.cuda.current_stream(told.device))
        else:
            self._told = told.clone()

    def read(self) -> GlobalStatus:
        """Waits until it has come, and compares.

        Raises:
            PeerError: another process has another batch, or other gradients, or is gone.
        """
        if self._event is not None:
            self._event.synchronize()
            if self._mesh:
                self._mesh.failures.check()  # of an aborted message nothing has come, and what is read here is noise
        told = self._told.tolist()
        fingerprint, order, flags = told[:HOST_WORDS]
        *norms, loss = map(_double_of, told[HOST_WORDS : HOST_WORDS + len(self._towers) + 1])
        by_tower, rest = dict(zip(self._towers, norms, strict=True)), told[HOST_WORDS + len(norms) + 1 :]
        if self._mesh:
            theirs, rows = rest[:PAIR_WORDS], rest[PAIR_WORDS:]
            if theirs[0] != fingerprint:
                raise PeerError(f"{self._where}: the towers have different batches")
            by_tower[TOWERS[1 - TOWERS.index(self._towers[0])]] = _double_of(theirs[2])
            flags = _both(flags, theirs[1])
            if rows:
                everyone = [rows[at : at + REPLICA_WORDS] for at in range(0, len(rows), REPLICA_WORDS)]
                flags, loss = self._compare_replicas(everyone, order, flags)
        finite, stop, plateaus = bool(flags & FINITE), bool(flags & STOP), flags >> PLATEAUS_SHIFT
        written, unsaved = bool(flags & WRITTEN), bool(flags & FAILED)
        return GlobalStatus(finite, stop, plateaus, dict(sorted(by_tower.items())), loss, written, unsaved)

    def _compare_replicas(self, rows: list[list[int]], order: int, flags: int) -> tuple[int, float]:
        """The flags of all replicas, and their mean loss."""
        assert self._mesh
        mine = self._mesh.coord.replica
        for number, row in enumerate(rows):
            if row[0] != order:
                raise PeerError(f"{self._where}: replicas {mine} and {number} have different batches")
            flags = _both(flags, row[1])
        norm = _double_of(rows[mine][2])
        for number, row in enumerate(rows):
            if flags & FINITE and not math.isclose(norm, _double_of(row[2]), rel_tol=NORM_TOLERANCE):
                raise PeerError(f"{self._where}: replicas {mine} and {number} have different gradients")
        return flags, math.fsum(_double_of(row[3]) for row in rows) / len(rows)


def _both(mine: Any, theirs: Any) -> Any:
    """Two processes' flags as one, ints or tensors, see :class:`GlobalStatus`; the larger count of plateaus."""
    more = torch.maximum(mine, theirs) if isinstance(mine, Tensor) else max(mine, theirs)
    plateaus = more >> PLATEAUS_SHIFT << PLATEAUS_SHIFT
    return mine & theirs & (FINITE | WRITTEN) | (mine | theirs) & (STOP | FAILED) | plateaus


@dataclasses.dataclass(frozen=True)
class Fact:
    """What must be equal in all processes.

    Attributes:
        value: what is compared; a tuple of lines where the first that differs is to be shown.
        shown: what a message says instead of it.
    """

    value: Any
    shown: str = ""

    def beside(self, other: "Fact") -> tuple[Any, Any]:
        """What a message says of this one and another that differs."""
        if self.shown:
            return self.shown, other.shown
        if isinstance(self.value, tuple):
            pairs = itertools.zip_longest(self.value, other.value, fillvalue="nothing")
            return next((mine, theirs) for mine, theirs in pairs if mine != theirs)
        return self.value, other.value


def check_consistency(mesh: Mesh | None, facts: Mapping[str, Fact]) -> None:
    """Refuses to start where the processes would not do the same work; warns where a pair is spread over two nodes.

    Hashes are compared first: facts themselves cross only where two differ, so a start of many ranks stays short.

    Raises:
        PeerError: naming the first fact in which two differ.
    """
    if mesh is None:
        return
    mine = [platform.node(), {name: [fact.value, fact.shown] for name, fact in facts.items()}]
    hashes = [
        hashlib.sha256(json.dumps(each).encode()).digest()
        for each in ([fact.value for fact in facts.values()], mine[0])
    ]
    rows = all_gather_bytes(b"".join(hashes), mesh.control)
    size = len(hashes[0])
    together = all(a[size:] == b[size:] for a, b in zip(rows[::2], rows[1::2], strict=True))
    if together and all(row[:size] == rows[0][:size] for row in rows):
        return
    everyone = [_read_facts(rank, told, facts) for rank, told in enumerate(all_gather_json(mine, mesh.control))]
    for name in facts:
        first = everyone[0][1][name]
        for rank, (_, found) in enumerate(everyone):
            if found[name].value != first.value:
                here, there = (one_line(str(shown)) for shown in first.beside(found[name]))
                raise PeerError(f"the processes have different values of {name}: rank 0 {here}, rank {rank} {there}")
    hosts = [one_line(host) for host, _ in everyone]
    for a, b in zip(hosts[::2], hosts[1::2], strict=True):
        if a != b and mesh.coord.rank == 0:
            warn(
                f"a pair of towers is spread over {a} and {b}, and every crossing leaves the node: "
                "start an even number of processes on each"
            )


def _read_facts(rank: int, told: Any, facts: Mapping[str, Fact]) -> tuple[str, dict[str, Fact]]:
    """The machine's name and the facts that a process told; it may be of another version, or no tower at all.

    Raises:
        PeerError: they are not the facts that are to be compared.
    """
    match told:
        case [str(host), dict(found)] if found.keys() == facts.keys():
            pairs = list(found.values())
            if all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str) for pair in pairs):
                return host, {name: Fact(_frozen(value), shown) for name, (value, shown) in found.items()}
    raise PeerError(f"rank {rank} does not tell what is to be compared at the start: is it of the same version?")


def _frozen(value: Any) -> Any:
    """Lines as they were before JSON made a list of them."""
    return tuple(value) if isinstance(value, list) else value


def all_could(could: bool, mesh: Mesh | None) -> bool:
    """Whether all processes could do what this one could, or could not; all must call it."""
    if mesh is None:
        return could
    could = bool(mesh.link.control([int(could), 0, 0])[0]) and could
    return all(row[0] for row in mesh.replicas.gather([int(could)])) if mesh.replicas else could


def sum_over_replicas(replicas: Replicas, counts: Sequence[int], figure: float) -> tuple[Any, ...]:
    """Counts and one figure of this tower, summed over its replicas; the last count is not summed, its greatest counts.

    Added in the order of the replicas, so that all get the same.
    """
    *words, greatest = zip(*replicas.gather([*counts[:-1], _bits_of(figure), counts[-1]]), strict=True)
    sums = [sum(column) for column in words[:-1]]
    return (*sums, max(greatest), math.fsum(map(_double_of, words[-1])))


def _bits_of(number: float) -> int:
    """The bits of a double as int64, so that it fits a control word."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _double_of(bits: int) -> float:
    """The inverse of :func:`_bits_of`."""
    return struct.unpack("<d", struct.pack("<q", bits))[0]
