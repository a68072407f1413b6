"""What the processes of a run must agree on: where they start, every step before its update, every checkpoint."""

import dataclasses
import itertools
import math
import platform
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import TOWERS
from trainer.errors import PeerError
from trainer.parallel.mesh import Mesh, Replicas
from trainer.parallel.proof import all_gather_json
from twotower.terminal import warn
from twotower.words import one_line

FINITE, STOP, WRITTEN, FAILED = 1, 2, 4, 8  # flag bits of the control message; above them, tower a's count of plateaus
PLATEAUS_SHIFT = 8
REPLICA_WORDS = 4  # int64 a replica and step
NORM_TOLERANCE = 1e-5  # machines of several kinds may add up the same gradients in another order


@dataclasses.dataclass(frozen=True)
class LocalStatus:
    """What one process knows of a step before its update.

    Attributes:
        fingerprint: of this process's rows of the batch, which both towers of a pair have.
        order_fingerprint: of what decides the whole batch, for all replicas.
        finite: loss and gradients are finite here.
        stop: a signal has come.
        plateaus: plateaus of the held-out error so far; 0 where it is not known.
        norms: Euclidean norm of all gradients, by tower held here.
        loss: of the images of this replica; nan on tower b, which does not know it.
        written: this process's part of the checkpoint under way is on the disk.
        unsaved: it could not be written.
    """

    fingerprint: int
    order_fingerprint: int
    finite: bool
    stop: bool
    plateaus: int
    norms: Mapping[str, float]
    loss: float
    written: bool = False
    unsaved: bool = False

    @property
    def flags(self) -> int:
        """Flags and plateaus as one word."""
        saving = WRITTEN * self.written | FAILED * self.unsaved
        return FINITE * self.finite | STOP * self.stop | saving | self.plateaus << PLATEAUS_SHIFT


@dataclasses.dataclass(frozen=True)
class GlobalStatus:
    """What all processes know after the control messages of a step: as :class:`LocalStatus`, for all of them together.

    Every process is finite and has written; at least one must stop, or could not save.
    """

    finite: bool
    stop: bool
    plateaus: int
    norms: dict[str, float]
    loss: float
    written: bool
    unsaved: bool


def all_reduce_status(mesh: Mesh | None, notes: LocalStatus, where: str) -> GlobalStatus:
    """Compares notes before an update: same batch, same gradients in all replicas, finite numbers, stop or go on.

    The towers of each pair swap words first, then the same towers of all pairs, so that all know the same.

    Args:
        mesh: the other processes, or None where this one is alone.
        notes: this process's.
        where: the step, for messages.

    Raises:
        PeerError: a process is gone, has another batch, or other gradients.
    """
    flags, norms, loss = notes.flags, dict(notes.norms), notes.loss
    if mesh:
        link, norm = mesh.link, norms[mesh.link.tower]
        theirs = link.control([notes.fingerprint, flags, _bits_of(norm)])
        if theirs[0] != notes.fingerprint:
            raise PeerError(f"{where}: the towers have different batches")
        norms[TOWERS[1 - TOWERS.index(link.tower)]] = _double_of(theirs[2])
        flags = _both(flags, theirs[1])
        if mesh.replicas:
            flags, loss = _agree_replicas(mesh.replicas, notes, (flags, norm), where)
    finite, stop, plateaus = bool(flags & FINITE), bool(flags & STOP), flags >> PLATEAUS_SHIFT
    written, unsaved = bool(flags & WRITTEN), bool(flags & FAILED)
    return GlobalStatus(finite, stop, plateaus, dict(sorted(norms.items())), loss, written, unsaved)


def _agree_replicas(replicas: Replicas, notes: LocalStatus, mine: tuple[int, float], where: str) -> tuple[int, float]:
    """The same between the replicas of a tower; ``mine``: flags and gradient norm. Returns flags and mean loss."""
    flags, norm = mine
    rows = replicas.gather([notes.order_fingerprint, flags, _bits_of(norm), _bits_of(notes.loss)])
    for number, row in enumerate(rows):
        if row[0] != notes.order_fingerprint:
            raise PeerError(f"{where}: replicas {replicas.coord.replica} and {number} have different batches")
        flags = _both(flags, row[1])
    for number, row in enumerate(rows):
        if flags & FINITE and not math.isclose(norm, _double_of(row[2]), rel_tol=NORM_TOLERANCE):
            raise PeerError(f"{where}: replicas {replicas.coord.replica} and {number} have different gradients")
    return flags, math.fsum(_double_of(row[3]) for row in rows) / len(rows)


def _both(mine: int, theirs: int) -> int:
    """Two processes' flags as one, see :class:`GlobalStatus`; the larger count of plateaus."""
    plateaus = max(mine, theirs) >> PLATEAUS_SHIFT
    return mine & theirs & (FINITE | WRITTEN) | (mine | theirs) & (STOP | FAILED) | plateaus << PLATEAUS_SHIFT


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

    Raises:
        PeerError: naming the first fact in which two differ.
    """
    if mesh is None:
        return
    mine = [platform.node(), {name: [fact.value, fact.shown] for name, fact in facts.items()}]
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
