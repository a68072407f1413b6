"""All that crosses between two towers in two processes, and the ledger of it.

Each crossing is a conjugate pair: what one direction does in the forward, the other undoes in the backward. At conv3,
fc6 and fc7 both towers swap halves, and in the backward swap the gradients of the halves they borrowed. At fc8 tower b
sends its half to tower a (fc8 and the loss live there, as in the original), and gets its gradient back. Nothing else
passes between towers in a training step but ``control``: one small message on a CPU group.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import LostError, PeerError
from trainer.model import TOWERS

WIRES = {"same": None, "fp16": torch.float16, "bf16": torch.bfloat16}  # of TrainConfig.wire
CONTROL_WORDS = 3  # int64 each way a step: 48 bytes in all


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
    """Counts what this rank sends and receives, so that either end's ledger is the whole pair's."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, str, str], tuple[int, int]] = {}

    def clear(self) -> None:
        """Starts a new step."""
        self._rows.clear()

    def add(self, kind: str, name: str, phase: str, direction: str, num_bytes: int) -> None:
        """Counts one message."""
        key = (kind, name, phase, direction)
        calls, total = self._rows.get(key, (0, 0))
        self._rows[key] = (calls + 1, total + num_bytes)

    def rows(self) -> list[LedgerRow]:
        """The step so far, in the order in which things first crossed."""
        return [LedgerRow(*key, calls, total) for key, (calls, total) in self._rows.items()]


class Reports(Protocol):
    """Where processes report failures (:class:`trainer.mesh.Board`)."""

    def lost(self, text: str) -> PeerError:
        """What to raise where another process is gone; ``text``: how that looks from here."""


class Link:
    """The wire between this tower and its peer.

    Args:
        tower: name of this process's tower, ``a`` or ``b``.
        peer: global rank of the process that holds the other one.
        group: process group of the pair for tensors (NCCL or gloo).
        control: gloo group of the pair for control messages.

    Attributes:
        wire_dtype: dtype in which crossings travel; None for their own. Pixels and control are never converted.
    """

    def __init__(
        self,
        tower: str,
        peer: int,
        group: dist.ProcessGroup,
        control: dist.ProcessGroup,
    ) -> None:
        self.tower, self.peer, self.group, self.control_group = tower, peer, group, control
        self.wire_dtype: torch.dtype | None = None
        self.ledger = Ledger()
        self.board: Reports | None = None
        self.last_crossing = "none yet"
        self._on_cpu = dist.get_backend(group) == "gloo"
        self._outwards = "a->b" if tower == "a" else "b->a"
        self._inwards = "b->a" if tower == "a" else "a->b"

    def swap(self, layer: str, phase: str, mine: Tensor, shape: Sequence[int]) -> Tensor:
        """Sends ``mine`` and receives the peer's tensor of ``shape``, both at once."""
        incoming = self._buffer(mine, shape)
        self._run(layer, phase, send=self._to_wire(mine), receive=incoming)
        return _from_wire(incoming).to(mine.device, mine.dtype)

    def send(self, layer: str, phase: str, mine: Tensor) -> None:
        """Sends ``mine``."""
        self._run(layer, phase, send=self._to_wire(mine))

    def receive(self, layer: str, phase: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Receives a tensor of ``shape`` with the dtype and device of ``like``."""
        incoming = self._buffer(like, shape)
        self._run(layer, phase, receive=incoming)
        return _from_wire(incoming).to(like.device, like.dtype)

    def swap_input(self, half: Tensor) -> Tensor:
        """Shares pictures (``feed = "split"``): (N / 2, C, S, S) uint8 -> (N, C, S, S), tower a's half first."""
        theirs = torch.empty_like(half, memory_format=torch.contiguous_format)
        mine = half.contiguous()
        if self._on_cpu:
            mine, theirs = mine.cpu(), theirs.cpu()
        self._run("pixels", "forward", send=mine, receive=theirs, kind="input")
        theirs = theirs.to(half.device)
        return torch.cat((half, theirs) if self.tower == "a" else (theirs, half))

    def control(self, words: Sequence[int]) -> list[int]:
        """Swaps ``CONTROL_WORDS`` int64 words with the peer on the CPU; returns the peer's."""
        mine = torch.tensor(words, dtype=torch.int64)
        assert mine.shape == (CONTROL_WORDS,)
        theirs = torch.empty_like(mine)
        self.last_crossing = "control"
        self._wait(
            "control",
            [dist.isend(mine, self.peer, self.control_group), dist.irecv(theirs, self.peer, self.control_group)],
        )
        for direction in (self._outwards, self._inwards):
            self.ledger.add("control", "flags and fingerprint", "step", direction, mine.nbytes)
        return theirs.tolist()

    def _to_wire(self, tensor: Tensor) -> Tensor:
        """The tensor as it travels: maps last, contiguous, in the wire's dtype, on the CPU for gloo."""
        if tensor.dim() == 4:
            tensor = tensor.permute(0, 2, 3, 1)  # channels_last: no copy
        tensor = tensor.to(self.wire_dtype or tensor.dtype).contiguous()
        return tensor.cpu() if self._on_cpu else tensor

    def _buffer(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Where an incoming tensor lands."""
        device = "cpu" if self._on_cpu else like.device
        if len(shape) == 4:
            shape = (shape[0], shape[2], shape[3], shape[1])
        return torch.empty(tuple(shape), dtype=self.wire_dtype or like.dtype, device=device)

    def _run(
        self,
        layer: str,
        phase: str,
        *,
        send: Tensor | None = None,
        receive: Tensor | None = None,
        kind: str = "crossing",
    ) -> None:
        """Moves the messages of one crossing and enters them in the ledger."""
        self.last_crossing = f"{layer} {phase}"
        operations = []
        if send is not None:
            operations.append(dist.P2POp(dist.isend, send, self.peer, self.group))
            self.ledger.add(kind, layer, phase, self._outwards, send.nbytes)
        if receive is not None:
            operations.append(dist.P2POp(dist.irecv, receive, self.peer, self.group))
            self.ledger.add(kind, layer, phase, self._inwards, receive.nbytes)
        try:
            works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise self._lost(error) from None
        self._wait(self.last_crossing, works)

    def _wait(self, what: str, works: Sequence[Any]) -> None:
        """Waits for messages; a peer that is gone becomes a PeerError that says where."""
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self._lost(error) from None

    def _lost(self, error: Exception) -> PeerError:
        """What to say when the peer does not answer."""
        other = TOWERS[1 - TOWERS.index(self.tower)]
        reason = str(error).splitlines()[0][:160]
        text = f"tower {other} (rank {self.peer}) is lost at {self.last_crossing}: {reason}"
        return self.board.lost(text) if self.board else LostError(text)


def _from_wire(tensor: Tensor) -> Tensor:
    """The inverse of :meth:`Link._to_wire`'s permutation."""
    return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor


class _Swap(torch.autograd.Function):
    """Forward: own half -> both. Backward: the borrowed half's gradient goes home, the own half's two add up."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, link: Link, layer: str) -> Tensor:
        ctx.link, ctx.layer, ctx.maps = link, layer, own.shape[1]
        theirs = link.swap(layer, "forward", own, own.shape)
        return torch.cat((own, theirs) if link.tower == "a" else (theirs, own), dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        first, second = gradients[0].split(ctx.maps, dim=1)
        own, theirs = (first, second) if ctx.link.tower == "a" else (second, first)
        return own + ctx.link.swap(ctx.layer, "backward", theirs, own.shape), None, None


class _SendToA(torch.autograd.Function):
    """Tower b's end of fc8's input. Forward: sends, returns a scalar zero. Backward: receives its gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, link: Link, layer: str) -> Tensor:
        ctx.link, ctx.layer, ctx.like = link, layer, own.new_empty(0)
        ctx.shape = own.shape
        link.send(layer, "forward", own)
        return own.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.link.receive(ctx.layer, "backward", ctx.shape, ctx.like), None, None


class _ReceiveOnA(torch.autograd.Function):
    """Tower a's end of fc8's input. Forward: own half -> both. Backward: sends tower b's gradient, keeps its own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, link: Link, layer: str) -> Tensor:
        ctx.link, ctx.layer, ctx.maps = link, layer, own.shape[1]
        return torch.cat((own, link.receive(layer, "forward", own.shape, own)), dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own, theirs = gradients[0].split(ctx.maps, dim=1)
        ctx.link.send(ctx.layer, "backward", theirs)
        return own, None, None


class PairJoin:
    """The :class:`trainer.model.Join` of a process that holds one tower."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def both(self, layer: str, halves: Sequence[Tensor]) -> list[Tensor]:
        """See :class:`trainer.model.Join`."""
        (own,) = halves
        return [_Swap.apply(own, self.link, layer)]

    def onto_a(self, layer: str, halves: Sequence[Tensor]) -> Tensor:
        """See :class:`trainer.model.Join`."""
        (own,) = halves
        end = _ReceiveOnA if self.link.tower == "a" else _SendToA
        return end.apply(own, self.link, layer)
