"""The mesh of processes, (replica x tower), and the groups in which they talk.

Rank = 2 x replica + tower, so the two towers of a pair are neighbors, and stay on one node where every node starts an
even number of processes. A process talks to the other tower of its pair (:class:`.link.Link`: the four
crossings), to the same tower in all other replicas (:class:`Replicas`: gradients), and to nobody else.
"""

import dataclasses
import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import stopping
from trainer.config import TOWERS, check_world
from trainer.errors import PeerError
from trainer.parallel.backend import abort_groups, agree, fault_of, reason_of, set_timeout, standing_of
from trainer.parallel.failures import FailureStore
from trainer.parallel.link import Ledger, Link, wait_for
from trainer.parallel.proof import prove_secret, store_prefix
from trainer.parallel.watch import ABORT_S, CLOSE_S, Facts, PeerWatch, run_for
from trainer.parallel.world import NEEDED, PLACES
from twotower.meeting import SECRET, STORE
from twotower.private import NotPrivateError, check_folder
from twotower.words import listed

SECOND_LINE = datetime.timedelta(seconds=30)  # torch's own watchdog comes after ours, :mod:`trainer.parallel.watch`


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
        self.started = 0  # messages that no host waits for, since the start: see :mod:`trainer.parallel.watch`
        self.timeout: datetime.timedelta | None = None  # as of a Link
        self._on_cpu = dist.get_backend(group) == "gloo"
        self._way, self._who, self._ranks = f"{coord.tower}->{coord.tower}", f"tower {coord.tower}", coord.same_tower

    def start_sum(self, flat: Tensor) -> tuple[Tensor, Any]:
        """Begins to sum a flat tensor over the replicas; returns the tensor under way and a handle for :meth:`wait`."""
        self._failures.check()
        wire = flat.cpu() if self._on_cpu else flat
        self.started += 1
        self._ledger.add("replica", self.summed, "backward", self._way, wire.nbytes)
        try:
            return wire, dist.all_reduce(wire, group=self._group, async_op=True)
        except RuntimeError as error:
            raise self._lost("gradients", error) from None

    def wait(self, work: Any) -> None:
        """Waits for a sum."""
        self._failures.check()
        try:
            wait_for(work, self.timeout if self._on_cpu else None)
        except RuntimeError as error:
            raise self._lost("gradients", error) from None

    def gather(self, words: Sequence[int]) -> list[list[int]]:
        """The int64 words of every replica, in their order."""
        return self.gather_words(torch.tensor(words, dtype=torch.int64)).tolist()

    def gather_words(self, mine: Tensor) -> Tensor:
        """As :meth:`gather`: (words,) -> (replicas, words); NCCL takes a tensor that is on a GPU, and no host waits."""
        everyone = [torch.zeros_like(mine) for _ in range(self.coord.replicas)]
        on_gloo = mine.device.type == "cpu"
        group = self._control if on_gloo else self._group
        self._failures.check()
        self.started += not on_gloo
        try:
            wait_for(dist.all_gather(everyone, mine, group=group, async_op=True), self.timeout if on_gloo else None)
        except RuntimeError as error:
            raise self._lost("control", error) from None
        self._ledger.add("control", "replicas agree", "step", self._way, mine.nbytes)
        return torch.stack(everyone)

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
        backend: of the tensors, ``nccl`` or ``gloo``.
        watch: of the other processes, where the GPU waits for them and not the host; None over gloo.
    """

    coord: MeshCoord
    link: Link
    replicas: Replicas | None
    control: dist.ProcessGroup
    failures: FailureStore
    peer_timeout: datetime.timedelta
    backend: str = "gloo"
    watch: PeerWatch | None = None

    @property
    def tensor_groups(self) -> list[Any]:
        """Those that tensors travel in."""
        return [self.link.group, *(self.replicas.groups[:1] if self.replicas else ())]

    def begin_steps(self) -> None:
        """From now on a silent process is lost after ``peer_timeout``; called where all have just compared notes."""
        groups = [
            self.control,
            self.link.group,
            self.link.control_group,
            *(self.replicas.groups if self.replicas else ()),
        ]
        for group in {id(group): group for group in groups}.values():
            later = SECOND_LINE if dist.get_backend(group) == "nccl" else datetime.timedelta()
            set_timeout(self.peer_timeout + later, group)
        if self.watch:
            self.watch.timeout = self.peer_timeout
        self.link.timeout = self.peer_timeout
        if self.replicas:
            self.replicas.timeout = self.peer_timeout

    def wait_for_all(self) -> None:
        """Until every process has come here."""
        dist.barrier(group=self.control)

    def __enter__(self) -> "Mesh":
        """Closes the mesh at the end; what comes out as an exception has failed."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        """See :meth:`close`."""
        self.close(failed=kind is not None)

    def close(self, *, failed: bool) -> None:
        """Ends the groups; the last thing that a process does with the others. It waits for nobody long.

        Args:
            failed: this process ends because something went wrong, here or elsewhere: nobody can be waited for.
        """
        if self.watch:
            self.watch.stop(failed=failed)
        if not failed:
            run_for(CLOSE_S, dist.destroy_process_group)
        elif self.backend == "nccl":  # over gloo nothing is under way that would not end with this process
            run_for(ABORT_S, lambda: abort_groups(self.tensor_groups))
            stopping.leave_abruptly()  # communicators that are gone are not waited for a second time


def connect(
    timeout_s: float, backend: str = "auto", *, device: str = "cpu", peer_timeout_s: float | None = None
) -> Mesh:
    """Joins the processes that the environment describes (RANK, WORLD_SIZE; TWOTOWER_STORE, or MASTER_ADDR and _PORT).

    Args:
        timeout_s: seconds after which a silent peer counts as lost, until all are about to do their first step.
        backend: ``nccl``, ``gloo``, or ``auto``: NCCL where it can be; see :mod:`.backend`.
        device: of this process, ``cpu`` or ``cuda:N``; a GPU must be torch's current one.
        peer_timeout_s: the same from then on; None: as long.

    Raises:
        PeerError: the world is not pairs of processes, one does not come, or NCCL cannot join them.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    later = timeout if peer_timeout_s is None else datetime.timedelta(seconds=peer_timeout_s)
    try:
        store, rank, world = _open_store(timeout)
        check_world(world)
        # torchrun's store outlives its --max-restarts: what the start before wrote there is not for this one.
        store = dist.PrefixStore(store_prefix(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), store)
        backend = agree(store, rank, world, standing_of(backend, device))
        if backend == "nccl":  # its watchdog tells what is wrong, and :mod:`.watch` ends this process
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        return make_mesh(MeshCoord(rank, world), store, backend=backend, timeout=timeout, peer_timeout=later)
    except (RuntimeError, ValueError, NotPrivateError, OSError) as error:
        where = ", ".join(f"{name}={os.environ[name]}" for name in (*NEEDED, *PLACES) if name in os.environ)
        if backend == "nccl":
            stopping.leave_abruptly()  # half of a communicator may be there
        reason = reason_of(error)
        same = f"; {SECRET} must be the same in all of them" if os.environ.get(SECRET) else ""
        raise PeerError(f"the processes cannot find each other ({where}): {reason}{same}") from None


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
    watched: bool | None = None,
) -> Mesh:
    """The mesh over the default process group, which must be there; called by all ranks.

    Args:
        coord: where this process stands.
        store: the store of the default group.
        backend: of the tensors: ``nccl``, ``gloo``, or ``fake`` to count what would be sent.
        timeout: of the groups that are made.
        peer_timeout: theirs from the first step on; None: the same.
        watched: watch the peers; None: with NCCL.
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
    watched = backend == "nccl" if watched is None else watched
    beats = None
    if watched:
        beats = _proven(cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout)), "gloo")
    if coord.replicas == 1:
        link = Link(coord.tower, 1 - coord.rank, world, control, failures)
        return _begin(Mesh(coord, link, None, control, failures, later, backend), beats, timeout)
    pair = join(coord.pair, backend)
    pair_control = join(coord.pair, "gloo") if needs_control else pair
    same = join(coord.same_tower, backend)
    same_control = join(coord.same_tower, "gloo") if needs_control else same
    link = Link(coord.tower, sum(coord.pair) - coord.rank, pair, pair_control, failures)
    replicas = Replicas(coord, same, same_control, failures, link.ledger)
    return _begin(Mesh(coord, link, replicas, control, failures, later, backend), beats, timeout)


def _begin(mesh: Mesh, beats: dist.ProcessGroup | None, timeout: datetime.timedelta) -> Mesh:
    """The mesh with its watch, and NCCL's communicators made: each group's first message is one of all its members."""
    if beats is not None:
        watch = _watch(mesh, beats, timeout)
        mesh = dataclasses.replace(mesh, watch=watch)
        watch.start()
    if mesh.backend == "nccl":
        for group in mesh.tensor_groups:
            dist.all_reduce(torch.ones(1, device="cuda"), group=group)
            torch.cuda.synchronize()
    return mesh


def _watch(mesh: Mesh, beats: dist.ProcessGroup, timeout: datetime.timedelta) -> PeerWatch:
    """The watch of those that this process exchanges tensors with."""
    coord, link, replicas = mesh.coord, mesh.link, mesh.replicas
    peers = {rank: (f"tower {coord.tower} (rank {rank})", 1) for rank in coord.same_tower if rank != coord.rank}
    peers[link.peer] = (f"tower {TOWERS[1 - TOWERS.index(link.tower)]} (rank {link.peer})", 0)
    nccl = mesh.tensor_groups if mesh.backend == "nccl" else ()
    facts = Facts(
        # steps, too: in one that is a CUDA graph nobody starts messages
        started=lambda: (link.started + link.ledger.steps, (replicas.started if replicas else 0) + link.ledger.steps),
        where=lambda: link.last_transfer,
        fault=lambda: fault_of(nccl),
        abort=lambda: abort_groups(nccl),
    )
    return PeerWatch(beats, peers, mesh.failures, facts, timeout=timeout)


def _proven(group: dist.ProcessGroup, backend: str) -> dist.ProcessGroup:
    """The group, once all of it have shown that they know the secret. NCCL's connections carry a secret of their own,
    which the processes have from the store.
    """
    if backend == "gloo":
        prove_secret(group)
    return group
