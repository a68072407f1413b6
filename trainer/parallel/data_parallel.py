"""Gradients of one tower, summed over its replicas: flat buckets that travel while the backward still runs.

What ``DistributedDataParallel`` does, without two things that are in the way here: it wraps the module, which changes
the names of parameters, and a lost peer ends as its own exception, which does not say which rank was lost and why (see
:class:`trainer.parallel.mesh.FailureStore`). Bytes are booked in the ledger.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.parallel.mesh import Replicas

BUCKET_BYTES = 25 << 20  # DistributedDataParallel's: small enough to leave early, large enough to fill a link


@dataclasses.dataclass
class Bucket:
    """Gradients that travel together.

    Attributes:
        flat: (elements,) their memory, one behind the other.
        missing: gradients that the backward has still to give.
        wire: the tensor under way: ``flat``, or its copy on the CPU.
        work: handle of the sum under way.
    """

    flat: Tensor
    missing: int = 0
    wire: Tensor | None = None
    work: Any = None


class GradientSum:
    """Sums gradients over replicas; parameters must be the same, in the same order, in all of them.

    After :meth:`prepare_for_backward`, a gradient moves into its bucket as soon as the backward has finished it, and a
    full bucket leaves once all before it have: the same order everywhere. After :meth:`finish` every gradient is the
    sum.

    Args:
        parameters: of this process's tower, in the order of the forward.
        replicas: the wire.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], replicas: Replicas) -> None:
        self._replicas = replicas
        self._buckets: list[Bucket] = []
        self._armed, self._sent = False, 0
        self._places: dict[nn.Parameter, tuple[Bucket, Tensor]] = {}
        for members in fill_buckets(list(reversed(parameters))):
            bucket = Bucket(
                torch.zeros(sum(p.numel() for p in members), dtype=members[0].dtype, device=members[0].device)
            )
            self._buckets.append(bucket)
            begin = 0
            for parameter in members:  # in the parameter's own layout: what the optimizer then adds up fits together
                view = bucket.flat[begin : begin + parameter.numel()].as_strided(
                    parameter.shape, parameter.stride(), storage_offset=begin
                )
                self._places[parameter] = (bucket, view)
                begin += parameter.numel()
                parameter.register_post_accumulate_grad_hook(self._ready)

    def prepare_for_backward(self) -> None:
        """The next backward is the last of this step: what it finishes may leave."""
        self._armed, self._sent = True, 0
        for bucket in self._buckets:
            bucket.missing = sum(owner is bucket for owner, _ in self._places.values())

    @torch.no_grad()
    def _ready(self, parameter: Tensor) -> None:
        """A gradient is complete in this process."""
        if not self._armed:
            return
        bucket, view = self._places[parameter]  # type: ignore[index]
        assert parameter.grad is not None
        view.copy_(parameter.grad)
        parameter.grad = view
        bucket.missing -= 1
        while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
            leaving = self._buckets[self._sent]
            leaving.wire, leaving.work = self._replicas.start_sum(leaving.flat)
            self._sent += 1

    def finish(self) -> None:
        """Waits until every sum is there."""
        assert self._sent == len(self._buckets), "the backward left a parameter without gradient"
        for bucket in self._buckets:
            self._replicas.wait(bucket.work)
            if bucket.wire is not bucket.flat:
                bucket.flat.copy_(bucket.wire)  # type: ignore[arg-type]
        self._armed = False


def fill_buckets(parameters: Sequence[nn.Parameter], limit_bytes: int = BUCKET_BYTES) -> list[list[nn.Parameter]]:
    """Deals parameters out, in their order, to buckets of at most ``limit_bytes`` (a larger one travels alone)."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if parameter.nbytes > room or not buckets:
            buckets.append([])
            room = limit_bytes
        buckets[-1].append(parameter)
        room -= parameter.nbytes
    return buckets
