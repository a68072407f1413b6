"""The mesh of processes, (replica x tower), and the groups in which they talk.

Rank = 2 x replica + tower, so the two towers of a pair are neighbors, and stay on one node where every node starts an
even number of processes. A process talks to the other tower of its pair (:class:`.link.Link`: the four
crossings), to the same tower in all other replicas (:class:`Replicas`: gradients), and to nobody else.
"""

import contextlib
import dataclasses
import datetime
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import TOWERS, check_world
from trainer.errors import LostError, PeerError
from trainer.parallel.link import Ledger, Link, wait_for
from trainer.parallel.proof import prove_secret, store_prefix
from trainer.parallel.world import NEEDED, PLACES
from twotower.meeting import SECRET, STORE
from twotower.private import NotPrivateError, check_folder
from twotower.words import listed, one_line

ENDED = " ended: "
MOST_FAILURE = 2000  # characters of a failure's text
REPORT_WAIT_S = 3.0  # how long one who lost somebody listens whether another knows better who it was


@dataclasses.dataclass(frozen=True)
class MeshCoord:
    """Where a process stands.

    Attributes:
        rank: 0 .. world - 1.
        world: processes in all, an even number.
    """

    rank: int
    world: int

    @property
    def tower(self) -> str:
        """``a`` or ``b``."""
        return TOWERS[self.rank % 2]

    @property
    def replica(self) -> int:
        """Number of the pair, from 0."""
        return self.rank // 2

    @property
    def replicas(self) -> int:
        """Number of pairs."""
        return self.world // 2

    @property
    def pair(self) -> list[int]:
        """Ranks of the pair."""
        return [2 * self.replica, 2 * self.replica + 1]

    @property
    def same_tower(self) -> list[int]:
        """Ranks of this tower in all replicas."""
        return list(range(self.rank % 2, self.world, 2))


class FailureStore:
    """Where the first process that fails says why, so that those who then lose it can tell the cause.

    Args:
        store: the store that all processes found each other in; it may be gone by then.
    """

    def __init__(self, store: Any) -> None:
        self._store = dist.PrefixStore("twotower", store)

    def report(self, text: str) -> str:
        """Reports a failure; returns the first that anybody reported."""
        text = one_line(text)[:MOST_FAILURE]
        try:
            return _as_text(self._store.compare_set("failure", "", text))
        except RuntimeError:
            return text

    def lost(self, text: str, *, vague: bool = False) -> PeerError:
        """What to raise where another process is gone.

        Args:
            text: how that looks from here; it is reported, unless somebody was first.
            vague: it does not say which process; better wait whether somebody knows.
        """
        first = self._wait() if vague else None
        if first is None:
            first = self.report(text)
        return (PeerError if ENDED in first else LostError)(first)

    def ended(self, rank: int, error: Exception) -> None:
        """Reports that this process ends because of an error of its own."""
        self.report(f"rank {rank}{ENDED}{type(error).__name__}: {error}")

    def _wait(self) -> str | None:
        """The first failure reported; None after ``REPORT_WAIT_S`` without one."""
        deadline = time.monotonic() + REPORT_WAIT_S
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                if self._store.check(["failure"]):
                    return _as_text(self._store.get("failure"))
                time.sleep(0.05)
        return None


def _as_text(found: bytes) -> str:
    """A failure as a message may show it, whoever has written it into the store."""
    return one_line(found[: 4 * MOST_FAILURE].decode(errors="backslashreplace"))[:MOST_FAILURE]


class Replicas:
    """The same tower in all replicas, seen from one of them.

    Args:
        coord: where this process stands.
        group: their process group for gradients (NCCL or gloo).
        control: their gloo group for control messages.
        failures: where failures are reported.
        ledger: of this process.

    Attributes:
        summed: what is summed, for the ledger.
    """

    summed = "gradients"

    def __init__(
        self,
        coord: MeshCoord,
        group: dist.ProcessGroup,
        control: dist.ProcessGroup,
        failures: FailureStore,
        ledger: Ledger,
    ) -> None:
        self.coord, self._group, self._control, self._failures, self._ledger = coord, group, control, failures, ledger
        self.groups = (group, control)
        self.timeout: datetime.timedelta | None = None  # as of a Link
        self._on_cpu = dist.get_backend(group) == "gloo"
        self._way, self._who, self._ranks = f"{coord.tower}->{coord.tower}", f"tower {coord.tower}", coord.same_tower

    def start_sum(self, flat: Tensor) -> tuple[Tensor, Any]:
        """Begins to sum a flat tensor over the replicas; returns the tensor under way and a handle for :meth:`wait`."""
        wire = flat.cpu() if self._on_cpu else flat
        self._ledger.add("replica", self.summed, "backward", self._way, wire.nbytes)
        try:
            return wire, dist.all_reduce(wire, group=self._group, async_op=True)
        except RuntimeError as error:
            raise self._lost("gradients", error) from None

    def wait(self, work: Any) -> None:
        """Waits for a sum."""
        try:
            wait_for(work, self.timeout if self._on_cpu else None)
        except RuntimeError as error:
            raise self._lost("gradients", error) from None

    def gather(self, words: Sequence[int]) -> list[list[int]]:
        """The int64 words of every replica, in their order."""
        mine = torch.tensor(words, dtype=torch.int64)
        everyone = [torch.zeros_like(mine) for _ in range(self.coord.replicas)]
        try:
            wait_for(dist.all_gather(everyone, mine, group=self._control, async_op=True), self.timeout)
        except RuntimeError as error:
            raise self._lost("control", error) from None
        self._ledger.add("control", "replicas agree", "step", self._way, mine.nbytes)
        return [row.tolist() for row in everyone]

    def _lost(self, what: str, error: Exception) -> PeerError:
        """What to say when a replica does not answer: who it was where that is known, here or by another process."""
        others = [rank for rank in self._ranks if rank != self.coord.rank]
        reason = str(error).splitlines()[0][:160]
        ranks = f"rank {others[0]}" if len(others) == 1 else f"one of ranks {listed(others)}"
        # The process that is lost here may only have ended because it lost another: that one said so before it ended.
        return self._failures.lost(f"{self._who} ({ranks}) is lost at {what}: {reason}", vague=True)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """All that a process needs to know of the others.

    Attributes:
        coord: where it stands.
        link: to the other tower of its pair.
        replicas: the same tower elsewhere; None with one pair.
        control: gloo group of all processes, for what is compared at the start.
        failures: where failures are reported.
        peer_timeout: after which a silent process counts as lost, once all are about to do their first step.
    """

    coord: MeshCoord
    link: Link
    replicas: Replicas | None
    control: dist.ProcessGroup
    failures: FailureStore
    peer_timeout: datetime.timedelta

    def begin_steps(self) -> None:
        """From now on a silent process is lost after ``peer_timeout``; called where all have just compared notes."""
        groups = [
            self.control,
            self.link.group,
            self.link.control_group,
            *(self.replicas.groups if self.replicas else ()),
        ]
        for group in {id(group): group for group in groups}.values():
            dist.set_timeout(self.peer_timeout, group)  # NCCL heeds it
        self.link.timeout = self.peer_timeout
        if self.replicas:
            self.replicas.timeout = self.peer_timeout


def connect(timeout_s: float, backend: str, *, peer_timeout_s: float | None = None) -> Mesh:
    """Joins the processes that the environment describes (RANK, WORLD_SIZE; TWOTOWER_STORE, or MASTER_ADDR and _PORT).

    Args:
        timeout_s: seconds after which a silent peer counts as lost, until all are about to do their first step.
        backend: ``nccl`` or ``gloo``.
        peer_timeout_s: the same from then on; None: as long.

    Raises:
        PeerError: the world is not pairs of processes, or one does not come.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    later = timeout if peer_timeout_s is None else datetime.timedelta(seconds=peer_timeout_s)
    try:
        store, rank, world = _open_store(timeout)
        check_world(world)
        # torchrun's store outlives its --max-restarts: what the start before wrote there is not for this one.
        store = dist.PrefixStore(store_prefix(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        return make_mesh(MeshCoord(rank, world), store, backend=backend, timeout=timeout, peer_timeout=later)
    except (RuntimeError, ValueError, NotPrivateError, OSError) as error:
        where = ", ".join(f"{name}={os.environ[name]}" for name in (*NEEDED, *PLACES) if name in os.environ)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        same = f"; {SECRET} must be the same in all of them" if os.environ.get(SECRET) else ""
        raise PeerError(f"the processes cannot find each other ({where}): {reason}{same}") from None


def disconnect(mesh: Mesh) -> None:
    """Leaves the mesh, once all processes have come here."""
    dist.barrier(group=mesh.control)
    dist.destroy_process_group()


def _open_store(timeout: datetime.timedelta) -> tuple[Any, int, int]:
    """The store that all processes find each other in, this one's rank, and how many there are.

    Raises:
        NotPrivateError: the file that is named is not in a folder of this user alone.
    """
    path = os.environ.get(STORE)
    if not path:
        return next(iter(dist.rendezvous("env://", timeout=timeout)))
    check_folder(Path(path).parent)
    store = dist.FileStore(path)
    store.set_timeout(timeout)
    return store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def make_mesh(
    coord: MeshCoord,
    store: Any,
    *,
    backend: str,
    timeout: datetime.timedelta,
    peer_timeout: datetime.timedelta | None = None,
) -> Mesh:
    """The mesh over the default process group, which must be there; called by all ranks.

    Args:
        coord: where this process stands.
        store: the store of the default group.
        backend: of the tensors: ``nccl``, ``gloo``, or ``fake`` to count what would be sent.
        timeout: of the groups that are made.
        peer_timeout: theirs from the first step on; None: the same.
    """
    later = timeout if peer_timeout is None else peer_timeout
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    failures = FailureStore(store)
    needs_control = backend == "nccl"  # gloo's own group serves both

    def join(ranks: list[int], kind: str) -> dist.ProcessGroup:  # only its members call it
        group = dist.new_group(ranks, timeout=timeout, backend=kind, use_local_synchronization=True)
        return _proven(cast(dist.ProcessGroup, group), kind)

    control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout)) if needs_control else world
    _proven(control, "gloo" if needs_control else backend)
    if coord.replicas == 1:
        link = Link(coord.tower, 1 - coord.rank, world, control, failures)
        return Mesh(coord, link, None, control, failures, later)
    pair = join(coord.pair, backend)
    pair_control = join(coord.pair, "gloo") if needs_control else pair
    same = join(coord.same_tower, backend)
    same_control = join(coord.same_tower, "gloo") if needs_control else same
    link = Link(coord.tower, sum(coord.pair) - coord.rank, pair, pair_control, failures)
    replicas = Replicas(coord, same, same_control, failures, link.ledger)
    return Mesh(coord, link, replicas, control, failures, later)


def _proven(group: dist.ProcessGroup, backend: str) -> dist.ProcessGroup:
    """The group, once all of it have shown that they know the secret. NCCL's connections carry a secret of their own,
    which the processes have from the store.
    """
    if backend == "gloo":
        prove_secret(group)
    return group
