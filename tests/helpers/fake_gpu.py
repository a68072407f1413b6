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
import os
import runpy
import sys
import time
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers import fake_device
from tests.helpers.fake_device import DEVICE, Copy, FakeGpu, FakeTensor, Functions, gpu
from tests.helpers.recorded_graphs import Recording

__all__ = ["FakeGpu", "FakeTensor", "fake_gpu"]


def _backward(*args: Any, run: Any = torch.autograd.graph._engine_run_backward, **kwargs: Any) -> Any:
    """Autograd's, which torch calls where no function is looked at any more."""
    with Functions():
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
        self._copies: list[Copy] = []

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
    none = dict.fromkeys(
        ("init", "_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats", "_sleep"), nothing
    )
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
        "set_stream": lambda stream: here.streams.__setitem__(-1, stream),
        "graph_pool_handle": lambda: (0, 1),
        "default_stream": lambda *_: here.streams[0],
        "CUDAGraph": FakeGraph,
        "graph": fake_capture,
        "is_current_stream_capturing": lambda: here.recording is not None,
        "set_sync_debug_mode": lambda mode: setattr(here, "debug_mode", mode),
        "get_sync_debug_mode": lambda: here.debug_mode,
    }  # fmt: skip


def _group_patches() -> dict[str, Any]:
    """Of ``torch.distributed``: NCCL's groups are gloo's, which gets the tensors of the CPU that are inside."""
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
    import torch._dynamo  # torch's optimizers import it late, and it looks at all functions of torch.cuda

    from pipeline.loader import graph, running
    from trainer.model import kernels

    assert fake_device.GPU is None
    was, nn_setting = torch.is_autocast_enabled, torch.__future__.get_overwrite_module_params_on_conversion()
    dtype_of = torch.get_autocast_dtype
    on_cpu = lambda device: "cpu" if device == "cuda" else device  # noqa: E731
    on_host = lambda decoding: dataclasses.replace(decoding, device="cpu")  # noqa: E731
    with contextlib.ExitStack() as stack:
        here = fake_device.GPU = FakeGpu()
        stack.callback(setattr, fake_device, "GPU", None)
        here.streams.append(FakeStream())
        enter = stack.enter_context
        for name, value in _patches(here).items():
            enter(mock.patch.object(torch.cuda, name, value))
        for name, value in _group_patches().items():
            enter(mock.patch.object(dist, name, value))
        enter(mock.patch.object(torch.cuda.memory, "_record_memory_history", lambda **_: None))
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            enter(mock.patch.object(torch._C, name, lambda *_: None, create=True))
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
        if os.environ.get("TRITON_INTERPRET") == "1":
            from triton.runtime.interpreter import GridExecutor

            launch = GridExecutor.__call__
            enter(mock.patch.object(
                GridExecutor, "__call__", lambda self, *args, **kwargs: gpu().kernel(self, launch, args, kwargs)
            ))  # fmt: skip
        enter(Functions())
        yield here


if __name__ == "__main__":  # python -m tests.helpers.fake_gpu MODULE WORDS...: a program where there is such a GPU
    from tests.helpers import fake_gpu as module

    sys.argv = sys.argv[1:]
    with module.fake_gpu():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
