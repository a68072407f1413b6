"""A GPU that is none: the code behind ``is_cuda`` executed on a CPU, with real numbers and a GPU's rules.

Inside :func:`fake_gpu` a tensor of ``cuda:0`` wraps one of the CPU, which computes. As on a GPU:

- tensors of two devices in one operation are an error, but for numbers (of no dimension) in pointwise ones;
- what makes the host wait is counted, and an error under ``torch.cuda.set_sync_debug_mode("error")`` or in a capture;
- a copy that the host does not wait for has arrived only once an event behind it was waited for; before, its target
  holds rubbish, and its source must stay as it is;
- a graph is what was launched in its capture, at the same addresses with the same numbers; capturing computes nothing;
- Triton's kernels take no tensors of the CPU. They are run by Triton's interpreter, so only where
  ``TRITON_INTERPRET=1`` was set before they were imported.

There is one GPU and one order of execution: races between streams are not seen. Below Python a tensor says that it is
the CPU's, so autograd and autocast are the CPU's, too. DALI decodes on the CPU and hands over the crops.
"""

import contextlib
import dataclasses
import functools
import runpy
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
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
POINTWISE = ("copy_", "where", "lerp")


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
class _Copy:
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
        self.streams = [FakeStream()]
        self._pinned: dict[int, Any] = {}  # storages, kept: no address is given out twice
        self._copies: list[_Copy] = []

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
        if name in ("index", "index_put_", "_index_put_impl_"):
            if any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]):
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

        func = _wide_mm if func is torch.ops.aten.mm.dtype else func
        found = self.compute(func, *tree_map(unwrap, args), **tree_map(unwrap, kwargs))
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
        copy = _Copy(inner[0], inner[1].clone(), source)
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
    def copies(self) -> list[_Copy]:
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


class _Functions(TorchFunctionMode):
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


def _backward(*args: Any, run: Any = torch.autograd.graph._engine_run_backward, **kwargs: Any) -> Any:
    """Autograd's, which torch calls where no function is looked at any more."""
    with _Functions():
        return run(*args, **kwargs)


@dataclasses.dataclass
class _Crops:
    """What DALI has made, on the GPU."""

    batch: Any

    def as_tensor(self) -> "_Crops":
        return self


def _hand_over(pipeline: Any, fed: Any, output: Any) -> tuple[Any, Any]:
    """A batch of DALI's, on the device that was asked for."""
    return fed, output if pipeline._decoding.device_id is None else _Crops(output)


def _from_dlpack(given: Any, take: Any = torch.from_dlpack) -> Tensor:
    return FakeTensor(take(given.batch.as_tensor())) if isinstance(given, _Crops) else take(given)


class FakeStream:
    """``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device, self.device_index, self.cuda_stream = DEVICE, 0, 0

    def synchronize(self) -> None:
        gpu().arrive()

    def wait_stream(self, stream: "FakeStream") -> None:
        assert isinstance(stream, FakeStream)

    def wait_event(self, event: "FakeEvent") -> None:
        assert event.at_s

    def record_event(self, event: "FakeEvent | None" = None) -> "FakeEvent":
        event = event or FakeEvent()
        event.record(self)
        return event

    def query(self) -> bool:
        return True


class FakeEvent:
    """``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any) -> None:
        self._is_timed, self.at_s = enable_timing, 0.0
        self._copies: list[_Copy] = []

    def record(self, stream: FakeStream | None = None) -> None:
        self.at_s, self._copies = time.perf_counter(), list(gpu().copies)

    def synchronize(self) -> None:
        last = self._copies[-1:] and [place for place, copy in enumerate(gpu().copies) if copy is self._copies[-1]]
        gpu().arrive(last[0] + 1 if last else 0)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self._is_timed and end._is_timed and self.at_s and end.at_s
        return (end.at_s - self.at_s) * 1e3


class FakeGraph:
    """``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.recording: Recording | None = None

    def replay(self) -> None:
        assert self.recording is not None and gpu().recording is None
        gpu().replays += 1
        gpu().launches += 1
        self.recording.replay()


@contextlib.contextmanager
def fake_capture(graph: FakeGraph, stream: Any = None, capture_error_mode: str = "global", **_: Any) -> Iterator[None]:
    """``torch.cuda.graph``."""
    here, recording = gpu(), Recording()
    here.arrive()
    here.recording = recording
    try:
        yield
    finally:
        here.recording = None
        recording.undo()
    graph.recording = recording
    recording.spoil()


@contextlib.contextmanager
def _on(stream: Any) -> Iterator[None]:
    """``torch.cuda.stream``."""
    if stream is not None:
        gpu().streams.append(stream)
    yield
    if stream is not None:
        gpu().streams.pop()


class _Autocast(torch.autocast):
    """Autocast of the CPU: its list of operations is another one, and has ours."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _patches(here: FakeGpu) -> dict[str, Any]:
    """Of ``torch.cuda``."""
    properties = types.SimpleNamespace(
        name="fake", total_memory=1 << 36, multi_processor_count=1, uuid="fake", major=9, minor=0,
        pci_domain_id=0, pci_bus_id=0, pci_device_id=0, L2_cache_size=1 << 20,
    )  # fmt: skip
    nothing = lambda *_, **__: None  # noqa: E731
    near = lambda *_, **__: contextlib.nullcontext()  # noqa: E731
    zero = dict.fromkeys(
        ("current_device", "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"),
        lambda *_: 0,
    )
    none = dict.fromkeys(("init", "_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats", "_sleep"), nothing)
    return zero | none | {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda *_: "fake",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (1 << 35, 1 << 36),
        "synchronize": lambda *_: here.arrive(),
        "device": near,
        "device_of": near,
        "Stream": FakeStream,
        "Event": FakeEvent,
        "stream": _on,
        "current_stream": lambda *_: here.streams[-1],
        "default_stream": lambda *_: here.streams[0],
        "CUDAGraph": FakeGraph,
        "graph": fake_capture,
        "is_current_stream_capturing": lambda: here.recording is not None,
        "set_sync_debug_mode": lambda mode: setattr(here, "debug_mode", mode),
        "get_sync_debug_mode": lambda: here.debug_mode,
    }  # fmt: skip


def _group_patches() -> dict[str, Any]:
    """Of ``torch.distributed``: NCCL's groups are gloo's, which takes the tensors of the CPU inside those of the GPU."""
    ours: list[Any] = []
    begin, make, backend_of = dist.init_process_group, dist.new_group, dist.get_backend

    def init_process_group(backend: str, **how: Any) -> None:
        begin("gloo", **how)
        ours.extend([dist.group.WORLD] if backend == "nccl" else [])

    def new_group(*args: Any, backend: str, **how: Any) -> Any:
        found = make(*args, backend="gloo", **how)
        ours.extend([found] if backend == "nccl" else [])
        return found

    def get_backend(group: Any = None) -> str:
        return "nccl" if any(group is each for each in ours) else backend_of(group)

    return {"init_process_group": init_process_group, "new_group": new_group, "get_backend": get_backend}


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Inside there is ``cuda:0``; in the thread that enters, and its ``torch.cuda`` in all."""
    global GPU
    import torch._dynamo  # torch's optimizers import it late, and it looks at all functions of torch.cuda

    from pipeline.loader import graph, running
    from trainer.model import kernels

    assert GPU is None
    was, nn_setting = torch.is_autocast_enabled, torch.__future__.get_overwrite_module_params_on_conversion()
    dtype_of = torch.get_autocast_dtype
    on_cpu = lambda device: "cpu" if device == "cuda" else device  # noqa: E731
    on_host = lambda decoding: dataclasses.replace(decoding, device="cpu")  # noqa: E731
    with contextlib.ExitStack() as stack:
        GPU = stack.enter_context(contextlib.nullcontext(FakeGpu()))
        enter = stack.enter_context
        for name, value in _patches(GPU).items():
            enter(mock.patch.object(torch.cuda, name, value))
        for name, value in _group_patches().items():
            enter(mock.patch.object(dist, name, value))
        enter(mock.patch.object(torch.cuda.memory, "_record_memory_history", lambda **_: None))
        enter(mock.patch.object(torch, "autocast", _Autocast))
        enter(mock.patch.object(torch, "is_autocast_enabled", lambda device="cuda": was(on_cpu(device))))
        enter(mock.patch.object(torch, "get_autocast_dtype", lambda device: dtype_of(on_cpu(device))))
        enter(mock.patch.object(torch, "from_dlpack", _from_dlpack))
        enter(mock.patch.object(torch.autograd, "_engine_run_backward", _backward))
        for name in ("decode", "_decode_crops", "define_pipeline"):
            work = getattr(graph, name)
            enter(mock.patch.object(graph, name, lambda d, *rest, work=work: work(on_host(d), *rest)))
        enter(mock.patch.object(running.RunningPipeline, "_stream", lambda _: None))
        run = running.RunningPipeline.run
        enter(mock.patch.object(running.RunningPipeline, "run", lambda self: _hand_over(self, *run(self))))
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, nn_setting)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        kernels.load_triton.cache_clear()
        stack.callback(kernels.load_triton.cache_clear)
        with contextlib.suppress(ImportError):
            from triton.runtime.interpreter import GridExecutor

            launch = GridExecutor.__call__
            enter(mock.patch.object(
                GridExecutor, "__call__", lambda self, *args, **kwargs: gpu().kernel(self, launch, args, kwargs)
            ))  # fmt: skip
        enter(_Functions())
        try:
            yield GPU
        finally:
            GPU = None


if __name__ == "__main__":  # python -m tests.helpers.fake_gpu MODULE WORDS...: a program where there is such a GPU
    from tests.helpers import fake_gpu as module

    sys.argv = sys.argv[1:]
    with module.fake_gpu():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
