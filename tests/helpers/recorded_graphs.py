"""CUDA graphs without a GPU: what a step launches is recorded below autograd, undone, and repeated as a graph would.

As on a GPU: numbers of the host are those of the capture, tensors are found where they were, capturing computes
nothing, and what would make the host wait ends the capture. Kernels that torch does not know of (C++) must be switched
off.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.model.kernels.interface import Member

UNSAID = {"native_batch_norm": ("running_mean", "running_var")}  # written, and torch's schema does not say so
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")


class NoWaits(TorchDispatchMode):
    """Inside, an operation that would make the host wait for a GPU is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        return func(*args, **(kwargs or {}))


class Recording(NoWaits):
    """Operations in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[Tensor], set[int]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {_memory(tensor): tensor for tensor in _tensors((args, kwargs))}
        unsaid = UNSAID.get(func._schema.name.split("::")[1], ())
        for argument, value in _named(func, args, kwargs):
            if argument.name in unsaid or (argument.alias_info is not None and argument.alias_info.is_write):
                for tensor in _tensors(value):
                    self._keep(tensor)
        found = super().__torch_dispatch__(func, types, args, kwargs)
        results = _tensors(found)
        self._made |= {_memory(tensor) for tensor in results} - given.keys()
        self.calls.append((func, args, kwargs, results, set(given)))
        return found

    def _keep(self, tensor: Tensor) -> None:
        memory, storage = _memory(tensor), tensor.untyped_storage()
        if memory not in self._made and memory not in self._before:
            self._before[memory] = (storage, storage.clone())

    def add(self, launch: Callable[[], Any]) -> None:
        """Something that torch does not know of, to be done when all this is repeated."""
        self.calls.append((launch, (), {}, [], set()))

    def undo(self) -> None:
        """Everything that was there before is as it was."""
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """Repeats them: results come to where they were."""
        for func, args, kwargs, results, given in self.calls:
            for place, tensor in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                if _memory(place) not in given:
                    place.copy_(tensor)

    @torch.no_grad()
    def spoil(self) -> None:
        """Nothing that they have made is to be read before they are repeated."""
        for *_, results, given in self.calls:
            for place in results:
                if _memory(place) not in given and place.is_floating_point():
                    place.fill_(torch.nan)


class RecordedGraphs:
    """A :class:`trainer.training.step_graph.GraphBackend` of any device.

    Args:
        error: what the end of each capture raises.
    """

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self.captures, self.replays, self.beside_count = 0, 0, 0

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        self.beside_count += 1
        return contextlib.nullcontext()

    def capture(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captures += 1
        recording = Recording()
        try:
            with recording:
                found = work()
        finally:
            recording.undo()
        if self._error:
            raise self._error

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay, found


class TableUpdate:
    """A :class:`trainer.model.kernels.interface.UpdateAll` of torch operations, whose rates lie in a table."""

    def __init__(self) -> None:
        self.sent: list[Member] = []
        self._table = torch.empty(0)

    def send(self, members: Sequence[Member]) -> None:
        self.sent = list(members)
        rows = torch.tensor([member.factors for member in members])
        self._table = self._table.copy_(rows) if self._table.shape == rows.shape else rows

    def __call__(self, members: Sequence[Member], guard: Tensor | None) -> None:
        for member, (momentum, decay, rate) in zip(members, self._table, strict=True):
            v = momentum * member.v - decay * member.w - rate * member.g
            is_open = torch.tensor(True) if guard is None else guard != 0
            member.w.copy_(torch.where(is_open, member.w + v, member.w))
            member.v.copy_(torch.where(is_open, v, member.v))


def _named(func: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """The arguments of a call, each with what the operation's schema says of it."""
    schema = func._schema.arguments
    return [*zip(schema, args, strict=False), *((each, kwargs[each.name]) for each in schema if each.name in kwargs)]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
