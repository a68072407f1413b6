"""The wire between the two towers of a pair, and the ledger of all that this process sends and receives."""

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import TOWERS
from trainer.errors import PeerError

COMM_DTYPES = {"same": None, "fp16": torch.float16, "bf16": torch.bfloat16}  # of TrainConfig.comm_dtype
CONTROL_WORDS = 3  # int64 each way per step: 48 bytes in all


@dataclasses.dataclass(frozen=True)
class LedgerRow:
    """What crossed in one direction at one place in one training step.

    Attributes:
        kind: ``crossing`` (the paper's four), ``input`` (pixels), ``replica`` (gradients between replicas) or
            ``control``.
        name: the layer whose input crosses, or what the message is.
        phase: ``forward``, ``backward`` or ``step``.
        direction: ``a->b`` or ``b->a``; ``a->a`` and ``b->b`` between replicas.
        calls: messages.
        num_bytes: payload, bytes.
    """

    kind: str
    name: str
    phase: str
    direction: str
    calls: int
    num_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As written to result.json."""
        row = dataclasses.asdict(self)
        row["bytes"] = row.pop("num_bytes")
        return row


class Ledger:
    """Counts what this rank sends and receives, so that either end's ledger is the whole pair's.

    Attributes:
        steps: that were started.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, str, str], tuple[int, int]] = {}
        self.steps = 0

    def clear(self) -> None:
        """Starts a new step."""
        self._rows.clear()
        self.steps += 1

    def add(self, kind: str, name: str, phase: str, direction: str, num_bytes: int) -> None:
        """Counts one message."""
        key = (kind, name, phase, direction)
        calls, total = self._rows.get(key, (0, 0))
        self._rows[key] = (calls + 1, total + num_bytes)

    def rows(self) -> list[LedgerRow]:
        """The step so far, in the order in which things first crossed."""
        return [LedgerRow(*key, calls, total) for key, (calls, total) in self._rows.items()]


class Failures(Protocol):
    """Where processes report failures (:class:`trainer.parallel.mesh.FailureStore`)."""

    def lost(self, text: str) -> PeerError:
        """What to raise where another process is gone; ``text``: how that looks from here."""

    def check(self) -> None:
        """Raises what is known already."""


@dataclasses.dataclass
class Transfer:
    """Messages of one crossing under way, until :meth:`Link.wait`.

    Attributes:
        layer: whose input or gradient crosses.
        phase: ``forward`` or ``backward``.
        works: handles of the messages; none once they have been waited for.
        sent: the outgoing tensor as it travels; must stay as it is until then.
        received: where the incoming one lands.
        like: device and dtype that the incoming one is wanted in.
    """

    layer: str
    phase: str
    works: list[Any] = dataclasses.field(default_factory=list)
    sent: Tensor | None = None
    received: Tensor | None = None
    like: Tensor | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.layer} {self.phase}"


def wait_for(work: Any, timeout: datetime.timedelta | None) -> None:
    """Waits for a transfer, over gloo at most so long.

    Raises:
        RuntimeError: it failed, or took longer.
    """
    if timeout is None:
        work.wait()
    else:
        work.wait(timeout)


class Link:
    """The wire between this tower and its peer.

    :meth:`exchange`, :meth:`isend` and :meth:`irecv` only start a transfer; :meth:`wait` ends it. With NCCL neither
    holds up the host: messages travel on a stream of their own, and waiting orders the streams.

    Args:
        tower: name of this process's tower, ``a`` or ``b``.
        peer: global rank of the process that holds the other one.
        group: process group of the pair for tensors (NCCL or gloo).
        control: gloo group of the pair for control messages.
        failures: where a lost peer is reported.

    Attributes:
        timed: opened around all that a crossing holds its tower up with, with its name; the benchmark's clock.
        timeout: of every message over gloo, which keeps the one that its group was made with whatever
            ``dist.set_timeout`` says; None: that one.
        started: transfers since the start; both towers start the same ones.
    """

    def __init__(
        self, tower: str, peer: int, group: dist.ProcessGroup, control: dist.ProcessGroup, failures: Failures
    ) -> None:
        self.tower, self.peer, self.group, self.control_group = tower, peer, group, control
        self._failures = failures
        self.ledger = Ledger()
        self.timed: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self.timeout: datetime.timedelta | None = None
        self.last_transfer = "none yet"
        self.started = 0
        self._sending: Transfer | None = None
        self._on_cpu = dist.get_backend(group) == "gloo"
        self._outwards = "a->b" if tower == "a" else "b->a"
        self._inwards = "b->a" if tower == "a" else "a->b"

    def exchange(self, layer: str, phase: str, mine: Tensor, dtype: torch.dtype | None = None) -> Transfer:
        """Starts to send ``mine`` and to receive the peer's tensor of the same shape, both at once.

        Args:
            layer: whose input or gradient crosses.
            phase: ``forward`` or ``backward``.
            mine: (N, ...), of any layout.
            dtype: in which it travels; None for its own.
        """
        with self.timed(f"{layer} {phase}"):
            received = self._buffer(mine, mine.shape, dtype)
            return self._start(Transfer(layer, phase, sent=self._packed(mine, dtype), received=received, like=mine))

    def isend(self, layer: str, phase: str, mine: Tensor, dtype: torch.dtype | None = None) -> Transfer:
        """Starts to send ``mine``; need not be waited for, the next transfer does."""
        with self.timed(f"{layer} {phase}"):
            transfer = self._start(Transfer(layer, phase, sent=self._packed(mine, dtype)))
        self._sending = transfer
        return transfer

    def irecv(
        self, layer: str, phase: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
    ) -> Transfer:
        """Starts to receive a tensor of ``shape`` with the dtype and device of ``like``."""
        with self.timed(f"{layer} {phase}"):
            return self._start(Transfer(layer, phase, received=self._buffer(like, shape, dtype), like=like))

    def wait(self, transfer: Transfer) -> Tensor:
        """Waits for a transfer to end; returns what came, an empty tensor where nothing was to come.

        Raises:
            PeerError: the peer is gone.
        """
        with self.timed(transfer.name):
            self._wait(transfer.name, transfer.works)
            transfer.works, transfer.sent = [], None
            if transfer.received is None or transfer.like is None:
                return torch.empty(0)
            received = transfer.received
            received = received.permute(0, 3, 1, 2) if received.dim() == 4 else received  # see :meth:`_packed`
            return received.to(transfer.like.device, transfer.like.dtype)

    @property
    def between_gpus(self) -> bool:
        """Whether messages go from GPU to GPU (NCCL), not through the host."""
        return not self._on_cpu

    def exchange_pixels(self, half: Tensor) -> Tensor:
        """Shares images (see ``data.decode``): (N / 2, ...) uint8 -> (N, ...), tower a's half first."""
        theirs = torch.empty_like(half, memory_format=torch.contiguous_format)
        mine = half.contiguous()
        if self._on_cpu:
            mine, theirs = mine.cpu(), theirs.cpu()
        transfer = self._start(Transfer("pixels", "forward", sent=mine, received=theirs), kind="input")
        self._wait(transfer.name, transfer.works)
        theirs = theirs.to(half.device)
        return torch.cat((half, theirs) if self.tower == "a" else (theirs, half))

    def control(self, words: Sequence[int]) -> list[int]:
        """Exchanges ``CONTROL_WORDS`` int64 words with the peer on the CPU; returns the peer's."""
        return self.exchange_words(torch.tensor(words, dtype=torch.int64)).tolist()

    def exchange_words(self, mine: Tensor) -> Tensor:
        """As :meth:`control`, of a tensor; NCCL takes one that is on a GPU, and then the host does not wait."""
        assert mine.shape == (CONTROL_WORDS,) and mine.dtype == torch.int64
        theirs = torch.empty_like(mine)
        self._finish_sending()
        on_gloo, works = mine.device.type == "cpu", list[Any]()
        self.last_transfer = "control"
        self.started += not on_gloo
        try:
            if on_gloo:
                group = self.control_group
                works = [dist.isend(mine, self.peer, group), dist.irecv(theirs, self.peer, group)]
            else:
                ends = ((dist.isend, mine), (dist.irecv, theirs))
                works = dist.batch_isend_irecv([dist.P2POp(end, words, self.peer, self.group) for end, words in ends])
        except RuntimeError as error:
            raise self._lost(error) from None
        self._wait("control", works, on_gloo=on_gloo)
        for direction in (self._outwards, self._inwards):
            self.ledger.add("control", "flags and fingerprint", "step", direction, mine.nbytes)
        return theirs

    def _packed(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The tensor as it travels: channels last, contiguous, in ``dtype``, on the CPU for gloo."""
        if tensor.dim() == 4:
            tensor = tensor.permute(0, 2, 3, 1)  # channels_last: no copy
        tensor = tensor.to(dtype or tensor.dtype).contiguous()
        return tensor.cpu() if self._on_cpu else tensor

    def _buffer(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None) -> Tensor:
        """Where an incoming tensor lands."""
        device = "cpu" if self._on_cpu else like.device
        if len(shape) == 4:
            shape = (shape[0], shape[2], shape[3], shape[1])
        return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=device)

    def _start(self, transfer: Transfer, kind: str = "crossing") -> Transfer:
        """Starts the messages of one crossing and enters them in the ledger."""
        self._finish_sending()
        self._failures.check()
        self.last_transfer = transfer.name
        self.started += 1
        operations = []
        if transfer.sent is not None:
            operations.append(dist.P2POp(dist.isend, transfer.sent, self.peer, self.group))
            self.ledger.add(kind, transfer.layer, transfer.phase, self._outwards, transfer.sent.nbytes)
        if transfer.received is not None:
            operations.append(dist.P2POp(dist.irecv, transfer.received, self.peer, self.group))
            self.ledger.add(kind, transfer.layer, transfer.phase, self._inwards, transfer.received.nbytes)
        try:
            transfer.works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise self._lost(error) from None
        return transfer

    def _finish_sending(self) -> None:
        """Waits for what was sent and not waited for; it has long arrived, or the peer would not be where it is."""
        if self._sending is not None:
            sending, self._sending = self._sending, None
            self._wait(sending.name, sending.works)

    def _wait(self, what: str, works: Sequence[Any], *, on_gloo: bool = False) -> None:
        """Waits for messages; a peer that is gone becomes a PeerError that says where."""
        self.last_transfer = what
        self._failures.check()
        try:
            for work in works:
                wait_for(work, self.timeout if on_gloo or self._on_cpu else None)
        except RuntimeError as error:
            raise self._lost(error) from None

    def _lost(self, error: Exception) -> PeerError:
        """What to say when the peer does not answer."""
        other = TOWERS[1 - TOWERS.index(self.tower)]
        reason = str(error).splitlines()[0][:160]
        return self._failures.lost(f"tower {other} (rank {self.peer}) is lost at {self.last_transfer}: {reason}")
