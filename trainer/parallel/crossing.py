"""All that crosses between two towers in two processes, and the ledger of it.

Each crossing is a conjugate pair: what one direction does in the forward, the other undoes in the backward. At conv3,
fc6 and fc7 both towers swap halves, and in the backward swap the gradients of the halves they borrowed. At fc8 tower b
sends its half to tower a (fc8 and the loss live there, as in the original), and gets its gradient back. Nothing else
passes between towers in a training step but ``control``: one small message on a CPU group.

While a half is under way, its tower computes what does not need it: in the forward the own half's part of the layer's
sums, in the backward the gradients of the own half and of the weights.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import LostError, PeerError
from trainer.model.alexnet import TOWERS, Summing
from trainer.parallel.halves import Halves, Product, product_dtype, product_of, split

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
    """Where processes report failures (:class:`trainer.parallel.mesh.Board`)."""

    def lost(self, text: str) -> PeerError:
        """What to raise where another process is gone; ``text``: how that looks from here."""


@dataclasses.dataclass
class Crossing:
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


class Link:
    """The wire between this tower and its peer.

    :meth:`swap`, :meth:`send` and :meth:`receive` only start a crossing; :meth:`wait` ends it. With NCCL neither holds
    up the host: messages travel on a stream of their own, and waiting orders the streams.

    Args:
        tower: name of this process's tower, ``a`` or ``b``.
        peer: global rank of the process that holds the other one.
        group: process group of the pair for tensors (NCCL or gloo).
        control: gloo group of the pair for control messages.

    Attributes:
        wire_dtype: dtype in which crossings travel; None for their own. Pixels and control are never converted.
        timed: opened around all that a crossing holds its tower up with, with its name; the benchmark's clock.
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
        self.timed: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        self.ledger = Ledger()
        self.board: Reports | None = None
        self.last_crossing = "none yet"
        self._sending: Crossing | None = None
        self._on_cpu = dist.get_backend(group) == "gloo"
        self._outwards = "a->b" if tower == "a" else "b->a"
        self._inwards = "b->a" if tower == "a" else "a->b"

    def swap(self, layer: str, phase: str, mine: Tensor, shape: Sequence[int]) -> Crossing:
        """Starts to send ``mine`` and to receive the peer's tensor of ``shape``, both at once."""
        with self.timed(f"{layer} {phase}"):
            crossing = Crossing(layer, phase, sent=self._to_wire(mine), received=self._buffer(mine, shape), like=mine)
            return self._start(crossing)

    def send(self, layer: str, phase: str, mine: Tensor) -> Crossing:
        """Starts to send ``mine``; need not be waited for, the next crossing does."""
        with self.timed(f"{layer} {phase}"):
            crossing = self._start(Crossing(layer, phase, sent=self._to_wire(mine)))
        self._sending = crossing
        return crossing

    def receive(self, layer: str, phase: str, shape: Sequence[int], like: Tensor) -> Crossing:
        """Starts to receive a tensor of ``shape`` with the dtype and device of ``like``."""
        with self.timed(f"{layer} {phase}"):
            return self._start(Crossing(layer, phase, received=self._buffer(like, shape), like=like))

    def wait(self, crossing: Crossing) -> Tensor:
        """Waits for a crossing to end; returns what came, an empty tensor where nothing was to come.

        Raises:
            PeerError: the peer is gone.
        """
        with self.timed(crossing.name):
            self._wait(crossing.name, crossing.works)
            crossing.works, crossing.sent = [], None
            if crossing.received is None or crossing.like is None:
                return torch.empty(0)
            return _from_wire(crossing.received).to(crossing.like.device, crossing.like.dtype)

    def swap_input(self, half: Tensor) -> Tensor:
        """Shares pictures (``feed = "split"``): (N / 2, C, S, S) uint8 -> (N, C, S, S), tower a's half first."""
        theirs = torch.empty_like(half, memory_format=torch.contiguous_format)
        mine = half.contiguous()
        if self._on_cpu:
            mine, theirs = mine.cpu(), theirs.cpu()
        crossing = self._start(Crossing("pixels", "forward", sent=mine, received=theirs), kind="input")
        self._wait(crossing.name, crossing.works)
        theirs = theirs.to(half.device)
        return torch.cat((half, theirs) if self.tower == "a" else (theirs, half))

    def control(self, words: Sequence[int]) -> list[int]:
        """Swaps ``CONTROL_WORDS`` int64 words with the peer on the CPU; returns the peer's."""
        mine = torch.tensor(words, dtype=torch.int64)
        assert mine.shape == (CONTROL_WORDS,)
        theirs = torch.empty_like(mine)
        self._finish_sending()
        group = self.control_group
        self._wait("control", [dist.isend(mine, self.peer, group), dist.irecv(theirs, self.peer, group)])
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

    def _start(self, crossing: Crossing, kind: str = "crossing") -> Crossing:
        """Starts the messages of one crossing and enters them in the ledger."""
        self._finish_sending()
        self.last_crossing = crossing.name
        operations = []
        if crossing.sent is not None:
            operations.append(dist.P2POp(dist.isend, crossing.sent, self.peer, self.group))
            self.ledger.add(kind, crossing.layer, crossing.phase, self._outwards, crossing.sent.nbytes)
        if crossing.received is not None:
            operations.append(dist.P2POp(dist.irecv, crossing.received, self.peer, self.group))
            self.ledger.add(kind, crossing.layer, crossing.phase, self._inwards, crossing.received.nbytes)
        try:
            crossing.works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise self._lost(error) from None
        return crossing

    def _finish_sending(self) -> None:
        """Waits for what was sent and not waited for; it has long arrived, or the peer would not be where it is."""
        if self._sending is not None:
            sending, self._sending = self._sending, None
            self._wait(sending.name, sending.works)

    def _wait(self, what: str, works: Sequence[Any]) -> None:
        """Waits for messages; a peer that is gone becomes a PeerError that says where."""
        self.last_crossing = what
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


@dataclasses.dataclass(frozen=True)
class _Meeting:
    """Where halves meet: the wire, the layer and how it multiplies one half."""

    link: Link
    layer: str
    product: Product

    def order(self, whole: Tensor) -> Halves:
        """The halves of inputs or of weights: this tower's own, then the other's."""
        first, second = split(whole)
        return (first, second) if self.link.tower == "a" else (second, first)

    def sums(self, ctx: Any, crossing: Crossing, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The layer's sums, from own half, weight and bias; the own half's part while the other's is under way."""
        own, weight, bias = inputs
        own_weight, their_weight = self.order(weight)
        own = own.to(weight.dtype)
        sums = self.product.sums(own, own_weight, bias)
        theirs = self.link.wait(crossing).to(weight.dtype)
        self.product.add(sums, theirs, their_weight)
        ctx.save_for_backward(own, theirs, weight)
        ctx.meeting, ctx.dtype = self, inputs[0].dtype
        return sums

    def borrowed(self, ctx: Any, gradient: Tensor) -> Tensor:
        """Gradient of the other tower's half: all that the other one waits for."""
        _, theirs, weight = ctx.saved_tensors
        return self.product.input_gradient(gradient, theirs, self.order(weight)[1]).to(ctx.dtype)

    def kept(self, ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the own half, of the weight (whole, written once) and of the bias: what nobody waits for."""
        own, theirs, weight = ctx.saved_tensors
        half = self.product.input_gradient(gradient, own, self.order(weight)[0]).to(ctx.dtype)
        whole = torch.empty_like(weight)
        own_part, their_part = self.order(whole)
        bias = self.product.weight_gradient(gradient, own, own_part)
        self.product.weight_gradient(gradient, theirs, their_part)
        return half, whole, bias


class _Both(torch.autograd.Function):
    """Forward: own half -> sums over both. Backward: the borrowed half's gradient goes home, its own's two add up."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, weight: Tensor, bias: Tensor, meeting: _Meeting) -> Tensor:
        crossing = meeting.link.swap(meeting.layer, "forward", own, own.shape)
        return meeting.sums(ctx, crossing, (own, weight, bias))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), meeting = gradients, ctx.meeting
        borrowed = meeting.borrowed(ctx, gradient)
        crossing = meeting.link.swap(meeting.layer, "backward", borrowed, borrowed.shape)
        own, weight, bias = meeting.kept(ctx, gradient)
        return own.add_(meeting.link.wait(crossing)), weight, bias, None


class _ReceiveOnA(torch.autograd.Function):
    """Tower a's end of fc8's input. Forward: own half -> sums over both. Backward: sends tower b's gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, weight: Tensor, bias: Tensor, meeting: _Meeting) -> Tensor:
        crossing = meeting.link.receive(meeting.layer, "forward", own.shape, own)
        return meeting.sums(ctx, crossing, (own, weight, bias))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), meeting = gradients, ctx.meeting
        meeting.link.send(meeting.layer, "backward", meeting.borrowed(ctx, gradient))
        return *meeting.kept(ctx, gradient), None


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
        return ctx.link.wait(ctx.link.receive(ctx.layer, "backward", ctx.shape, ctx.like)), None, None


class PairJoin:
    """The :class:`trainer.model.alexnet.Join` of a process that holds one tower."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def both(self, layer: str, halves: Sequence[Tensor], modules: Sequence[Summing]) -> list[Tensor]:
        """See :class:`trainer.model.alexnet.Join`."""
        (own,), (module,) = halves, modules
        return [self._cross(_Both, layer, own, module)]

    def onto_a(self, layer: str, halves: Sequence[Tensor], modules: Sequence[Summing]) -> Tensor:
        """See :class:`trainer.model.alexnet.Join`."""
        (own,) = halves
        return self._cross(_ReceiveOnA, layer, own, *modules) if modules else _SendToA.apply(own, self.link, layer)

    def _cross(self, end: type[torch.autograd.Function], layer: str, own: Tensor, module: Summing) -> Tensor:
        """One tower's end of a crossing, with the weights in the dtype that the layer multiplies in."""
        weight, bias = (parameter.to(product_dtype(own)) for parameter in (module.weight, module.bias))
        return end.apply(own, weight, bias, _Meeting(self.link, layer, product_of(module)))
