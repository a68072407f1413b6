"""The update of all parameters in one launch, in Triton, which also writes the bfloat16 that the next step multiplies.

Bytes a parameter: reads weight, velocity and gradient (12), writes weight and velocity (8) and, where asked for, the
bfloat16 copy (2). The paper's 61 million: 1.34 GB.

Three small tables lie on the device: where each tensor's memory is, which part of which tensor a program has, and each
tensor's factors. The first is sent anew when a tensor has moved, the last when a rate has changed; both without a wait,
and into the same memory, so that a launch in a CUDA graph reads what was sent last.
"""

# mypy: disable-error-code="no-untyped-def"
import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model.kernels.interface import Member

BLOCK = 1024  # elements a program: two loads of 16 bytes a thread and tensor on their way at once
ROW = tl.constexpr(6)  # numbers a tensor in the first table: four addresses, elements, row of its factors


@triton.jit
def _update_part(w, v, g, low, at, inside, in_low, momentum, decay, rate):
    """v = momentum v - decay w - rate g; w = w + v; low = w, of the elements ``at`` that are ``inside``."""
    weight = tl.load(w + at, mask=inside, other=0.0)
    slope = tl.load(g + at, mask=inside, other=0.0)
    velocity = momentum * tl.load(v + at, mask=inside, other=0.0) - decay * weight - rate * slope
    weight = weight + velocity
    tl.store(v + at, velocity, mask=inside)
    tl.store(w + at, weight, mask=inside)
    tl.store(low + at, weight.to(tl.bfloat16), mask=in_low)


@triton.jit
def update_all_kernel(
    tensors, parts, factors, guard, GUARDED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The rule on one part of one tensor, unless the guard is 0.

    ``ALIGNED``: all memory begins at a multiple of 16 bytes. A part that is full needs no masks, and only then are its
    loads 16 bytes wide.
    """
    program = tl.program_id(0)
    row = tensors + ROW * tl.load(parts + 2 * program)
    begin = tl.load(parts + 2 * program + 1).to(tl.int64) * BLOCK
    count, kind, low = tl.load(row + 4), tl.load(row + 5), tl.load(row + 3)
    if GUARDED:
        count = tl.where(tl.load(guard) != 0, count, 0)
    to_w = tl.load(row).to(tl.pointer_type(tl.float32))
    to_v = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    to_g = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    to_low = low.to(tl.pointer_type(tl.bfloat16))
    if ALIGNED:
        to_w, to_v = tl.multiple_of(to_w, 16), tl.multiple_of(to_v, 16)
        to_g, to_low = tl.multiple_of(to_g, 16), tl.multiple_of(to_low, 16)
    momentum, decay = tl.load(factors + 3 * kind), tl.load(factors + 3 * kind + 1)
    rate = tl.load(factors + 3 * kind + 2)
    at = begin + tl.arange(0, BLOCK)
    if begin + BLOCK <= count:
        every = tl.full((BLOCK,), 1, tl.int1)
        _update_part(to_w, to_v, to_g, to_low, at, every, every & (low != 0), momentum, decay, rate)
    else:
        inside = at < count
        _update_part(to_w, to_v, to_g, to_low, at, inside, at < tl.where(low != 0, count, 0), momentum, decay, rate)


@dataclasses.dataclass
class UpdateAll:
    """:class:`.interface.UpdateAll` on CUDA tensors; keeps the tables between steps.

    A launch that is captured in a CUDA graph must find its tables there: as many members were sent before. Nothing may
    be sent while it is captured, and the gradients that the graph has made must be sent before it runs.
    """

    device: torch.device
    _addresses: tuple[tuple[int, ...], ...] = ()
    _factors: tuple[tuple[float, ...], ...] = ()
    _tensors_table: Tensor | None = None
    _parts_table: Tensor | None = None
    _factors_table: Tensor | None = None

    def send(self, members: Sequence[Member]) -> None:
        """See :class:`.interface.UpdateAll`; costs the host a comparison where nothing has changed."""
        addresses = tuple((*_addresses(member), number) for number, member in enumerate(members))
        factors = tuple(member.factors for member in members)
        if addresses != self._addresses:
            self._send_addresses(addresses)
        if factors != self._factors:
            self._factors_table = self._send(factors, torch.float32, self._factors_table)
            self._factors = factors

    def __call__(self, members: Sequence[Member], guard: Tensor | None) -> None:
        """See :class:`.interface.UpdateAll`."""
        assert self._parts_table is not None and len(members) == len(self._addresses), "send comes first"
        aligned = all(address % 16 == 0 for member in members for address in _addresses(member)[:4])
        flag = self._factors_table if guard is None else guard  # a pointer must be given
        with torch.cuda.device_of(self._parts_table):
            update_all_kernel[(len(self._parts_table),)](
                self._tensors_table, self._parts_table, self._factors_table, flag, guard is not None, aligned,
                BLOCK, enable_fp_fusion=True,
            )  # fmt: skip

    def _send_addresses(self, addresses: tuple[tuple[int, ...], ...]) -> None:
        """The first table; and the second, where the tensors are others."""
        if [row[4] for row in addresses] != [row[4] for row in self._addresses]:
            parts = [
                (number, part) for number, row in enumerate(addresses) for part in range(triton.cdiv(row[4], BLOCK))
            ]
            self._parts_table = self._send(parts, torch.int32, None)
        self._tensors_table = self._send(addresses, torch.int64, self._tensors_table)
        self._addresses = addresses

    def _send(self, rows: Sequence[Sequence[float]], dtype: torch.dtype, old: Tensor | None) -> Tensor:
        """A table on the device, in the old one's memory where it fits: behind the launches that still read that."""
        host = torch.tensor(rows, dtype=dtype)
        host = host.pin_memory() if self.device.type == "cuda" else host
        table = old if old is not None and old.shape == host.shape else torch.empty_like(host, device=self.device)
        return table.copy_(host, non_blocking=True)


def _addresses(member: Member) -> tuple[int, int, int, int, int]:
    """A member's row of the first table, but for its factors."""
    low = member.low.data_ptr() if member.low is not None else 0
    return member.w.data_ptr(), member.v.data_ptr(), member.g.data_ptr(), low, member.w.numel()
