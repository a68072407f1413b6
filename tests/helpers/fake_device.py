"""Tensors of a GPU that is none, and what it does with them; see :mod:`tests.helpers.fake_gpu`."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.helpers.recorded_graphs import Recording

DEVICE = torch.device("cuda", 0)
# operations whose outcome the host must know, whoever asks
WAITS = (
    *("_local_scalar_dense", "nonzero", "nonzero_static", "equal", "is_nonzero", "masked_select", "bincount"),
    *("unique_dim", "_unique2", "repeat_interleave"),
)
MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"


class FakeTensor(Tensor):
    """A tensor of ``cuda:0``; ``inner`` is that of the CPU which has its values."""

    inner: Tensor
    device = property(lambda _: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda _: True)  # type: ignore[assignment]
    is_cpu = property(lambda _: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "FakeTensor":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, layout=inner.layout
        )
        made.inner = inner
        return made

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FakeTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert GPU is not None, "a tensor of a GPU that is gone"
        return GPU.launch(func, args, kwargs or {})


@dataclasses.dataclass
class Copy:
    """A copy on its way: its target gets ``value``, and until then its source must not change."""

    target: Tensor
    value: Tensor
    source: Tensor


class FakeGpu:
    """What happens on it.

    Attributes:
        waits: what made the host wait.
        launches: operations and kernels, also those of graphs.
        replays: of graphs.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.launches, self.replays = 0, 0
        self.debug_mode: str | int = "default"
        self.recording: Recording | None = None
        self.streams: list[Any] = []
        self._pinned: dict[int, Any] = {}  # storages, kept: no address is given out twice
        self._copies: list[Copy] = []

    def launch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation with some tensors of the GPU."""
        name = func._schema.name.split("::")[1]
        if name == "copy_":
            return self._copy(*args, **kwargs)
        if name in WAITS:
            self.wait(name)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor):
                self._check_mixed(func, name, leaf)
        indices = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
        if any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices):
            self.wait("nonzero, of a mask that indexes")
        return self._run(func, args, kwargs)

    def _check_mixed(self, func: Any, name: str, tensor: Tensor) -> None:
        if tensor.dim() or not (torch.Tag.pointwise in func.tags or name.startswith("_foreach")):
            raise RuntimeError(f"{MIXED} ({name}, {tuple(tensor.shape)})")

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Computes, and wraps what is new."""
        self.launches += 1
        known: dict[int, FakeTensor] = {}

        def unwrap(leaf: Any) -> Any:
            if isinstance(leaf, FakeTensor):
                known[id(leaf.inner)] = leaf
                return leaf.inner
            return leaf

        args, kwargs = tree_map(unwrap, (args, kwargs))
        if func.namespace == "c10d" and self.recording:
            raise RuntimeError("the fake has no messages in a graph")
        func = _wide_mm if func is torch.ops.aten.mm.dtype else func
        found = self.compute(func, *args, **kwargs)
        return tree_map(lambda leaf: known[id(leaf)] if id(leaf) in known else wrap(leaf), found)

    def compute(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls it with tensors of the CPU, as a part of the graph that is captured."""
        with self.recording or contextlib.nullcontext():
            return func(*args, **kwargs)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        inner = [each.inner if isinstance(each, FakeTensor) else each for each in (target, source)]
        if isinstance(target, FakeTensor) and isinstance(source, FakeTensor):
            self.launches += 1
            self.compute(Tensor.copy_, *inner)
            return target
        host = source if isinstance(target, FakeTensor) else target
        if self.recording or not non_blocking or not self.is_pinned(host):
            self.wait("a copy, the host's memory is " + ("pinned" if self.is_pinned(host) else "not pinned"))
            inner[0].copy_(inner[1])
            return target
        copy = Copy(inner[0], inner[1].clone(), source)
        if isinstance(source, FakeTensor):  # the GPU's own order is kept
            self._copies.append(copy)
            target.fill_(torch.nan if target.is_floating_point() else 77)
        else:
            inner[0].copy_(inner[1])
            self._copies.append(copy)
        return target

    def wait(self, why: str) -> None:
        """The host waits for all that was launched, without having said so."""
        if self.recording:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {why}")
        if self.debug_mode in ("error", 2):
            raise RuntimeError(f"called a synchronizing CUDA operation: {why}")
        self.waits.append(why)
        self.arrive()

    def arrive(self, count: int | None = None) -> None:
        """The first copies have arrived."""
        if self.recording:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing: synchronize")
        count = len(self._copies) if count is None else count
        for copy in self._copies[:count]:
            if not isinstance(copy.source, FakeTensor):
                same = torch.equal(copy.source.nan_to_num(), copy.value.nan_to_num())
                assert same, "the host has written to memory that was being copied"
            else:
                copy.target.copy_(copy.value)
        del self._copies[:count]

    @property
    def copies(self) -> list[Copy]:
        """Those on their way."""
        return self._copies

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy in pinned memory."""
        if isinstance(tensor, FakeTensor):
            raise RuntimeError("cannot pin a CUDA tensor: only dense CPU tensors can be pinned")
        found = tensor.clone()
        self._pinned[found.untyped_storage()._cdata] = found.untyped_storage()
        return found

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether its memory is."""
        return not isinstance(tensor, FakeTensor) and tensor.untyped_storage()._cdata in self._pinned

    def to_device(self, tensor: Tensor, *, non_blocking: bool) -> Tensor:
        """A copy of a tensor of the CPU."""
        found = FakeTensor(torch.empty_like(tensor))
        with torch.no_grad():
            return self._copy(found, tensor.detach(), non_blocking)

    def to_host(self, tensor: FakeTensor, *, non_blocking: bool) -> Tensor:
        """The inverse."""
        assert not (tensor.requires_grad and torch.is_grad_enabled()), "the fake has no gradient of this"
        found = torch.empty_like(tensor.inner)  # not pinned
        return self._copy(found, tensor.detach(), non_blocking)

    def kernel(self, executor: Any, launch: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """A launch of one of Triton's kernels."""
        if not any(isinstance(arg, FakeTensor) for arg in args):
            launch(executor, *args, **kwargs)
            return
        for number, arg in enumerate(args):
            if isinstance(arg, Tensor) and not isinstance(arg, FakeTensor):
                raise ValueError(f"Pointer argument (at {number}) cannot be accessed from Triton (cpu tensor?)")
        self.launches += 1
        inner = [arg.inner if isinstance(arg, FakeTensor) else arg for arg in args]
        if self.recording:
            self.recording.add(functools.partial(launch, executor, *inner, **kwargs))
        else:
            launch(executor, *inner, **kwargs)


GPU: FakeGpu | None = None


def gpu() -> FakeGpu:
    """That of the :func:`fake_gpu` around."""
    assert GPU is not None
    return GPU


def wrap(value: Any) -> Any:
    """A tensor of the CPU as one of the GPU, the same memory; anything else as it is."""
    return FakeTensor(value) if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else value


def _wide_mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """cuBLAS's product whose sums leave it in a wider dtype."""
    return a.to(dtype) @ b.to(dtype)


class Functions(TorchFunctionMode):
    """What names a device, or asks which one it is: below Python all are the CPU's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name in ("to", "cpu", "cuda") and isinstance(args[0], Tensor):
            return _move(func, name, args, kwargs)
        if name in ("tolist", "numpy", "__array__") and isinstance(args[0], FakeTensor):
            if name != "tolist":
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            gpu().wait(name)
            return args[0].inner.tolist()
        if name == "pin_memory":
            return gpu().pin(args[0])
        if name == "is_pinned":
            return gpu().is_pinned(args[0])
        if name == "new_tensor" and isinstance(args[0], FakeTensor) and "device" not in kwargs:
            kwargs["device"] = DEVICE
        pinned, device = kwargs.pop("pin_memory", False), kwargs.get("device")
        if device is None:
            found = func(*args, **kwargs)
            return gpu().pin(found) if pinned else found
        on_gpu = torch.device(device).type == "cuda"
        args = tree_map(lambda leaf: leaf.inner if isinstance(leaf, FakeTensor) else leaf, args)
        kwargs["device"] = "cpu"
        if on_gpu and name in ("tensor", "as_tensor", "new_tensor", "asarray"):
            gpu().wait(f"{name}, of the host's numbers")
        if on_gpu and kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        found = gpu().compute(func, *args, **kwargs) if on_gpu else func(*args, **kwargs)
        return wrap(found) if on_gpu else gpu().pin(found) if pinned else found


def _move(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """``to``, ``cpu`` and ``cuda``."""
    tensor, rest, device = args[0], list(args[1:]), kwargs.pop("device", name if name != "to" else None)
    if name == "to" and rest and isinstance(rest[0], Tensor):
        device, rest[0] = rest[0].device, rest[0].dtype
    elif name == "to" and rest and not isinstance(rest[0], torch.dtype):
        device = rest.pop(0)
    dtype = rest.pop(0) if name == "to" and rest else kwargs.pop("dtype", None)
    non_blocking = rest.pop(0) if rest else kwargs.pop("non_blocking", False)
    kwargs |= {"copy": rest.pop(0)} if rest else {}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}

    def change(each: Tensor) -> Tensor:
        return Tensor.to(each, dtype or each.dtype, **kwargs)

    here = isinstance(tensor, FakeTensor)
    with torch._C.DisableTorchFunction():
        if device is None or (torch.device(device).type == "cuda") == here:
            return change(tensor)
        if here:
            return change(gpu().to_host(tensor, non_blocking=non_blocking))
        changed = change(tensor)
        return gpu().to_device(gpu().pin(changed) if gpu().is_pinned(tensor) else changed, non_blocking=non_blocking)
