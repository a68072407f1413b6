"""What is launched on a GPU, written down instead: on tensors without memory, for sizes of any kind."""

import contextlib
import dataclasses
import math
import unittest.mock
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.model.kernels import triton as launching

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: the function.
        arguments: by the names of its parameters.
        programs: in all.
    """

    kernel: Any
    arguments: dict[str, Any]
    programs: int

    @property
    def constants(self) -> dict[str, Any]:
        """Those that the kernel is compiled for."""
        return {p.name: self.arguments[p.name] for p in self.kernel.params if p.is_constexpr}

    @property
    def types(self) -> dict[str, str]:
        """The others, as Triton names them."""
        others = {name: value for name, value in self.arguments.items() if name not in self.constants}
        return {
            name: TYPES[value.dtype] if isinstance(value, Tensor) else "i32" if isinstance(value, int) else "fp32"
            for name, value in others.items()
        }

    @property
    def moved_bytes(self) -> int:
        """Each tensor once, for our kernels read or write each whole, and none both."""
        tensors = {id(value): value for value in self.arguments.values() if isinstance(value, Tensor)}
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


class _Recorder:
    """Stands for a kernel."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Sequence[int]) -> Any:
        def note(*arguments: Any, **options: Any) -> None:
            named = dict(zip(self._kernel.arg_names, arguments, strict=True))
            self._launches.append(Launch(self._kernel, named, math.prod(grid)))

        return note


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, :class:`trainer.model.kernels.triton.TritonKernels` launches nothing; the list gets what it would."""
    launches: list[Launch] = []
    names = [name for name in vars(launching) if name.endswith("_kernel")]
    with contextlib.ExitStack() as stack:
        for name in names:
            recorder = _Recorder(getattr(launching, name), launches)
            stack.enter_context(unittest.mock.patch.object(launching, name, recorder))
        yield launches
