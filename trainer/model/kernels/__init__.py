"""Compiled kernels where they can be had: ``cpp.py`` on a CPU, ``triton.py`` on a GPU.

A compiler is no requirement: without one, or with ``TWOTOWER_KERNELS=off``, the same is done by torch operations, and
one line says so. The first tensor that asks has them built; :func:`of` and :func:`describe` do that.
"""

import functools
import os

import torch
from torch import Tensor

from trainer.errors import RunError
from trainer.model.kernels.cpp import CppKernels, KernelError, open_library
from trainer.model.kernels.interface import DTYPES, GpuKernels, Kernels
from twotower.verbosity import remark

MOST_ELEMENTS = 1 << 34  # of a tensor: its groups and rows are counted in 32 bits on a GPU
SWITCH = "TWOTOWER_KERNELS"  # "off": torch operations only


def check_switch() -> None:
    """Refuses a value of ``TWOTOWER_KERNELS`` that says nothing.

    Raises:
        RunError: it is neither ``off`` nor ``on`` (as if it were not set).
    """
    value = os.environ.get(SWITCH, "")
    if value not in ("", "on", "off"):
        raise RunError(f"{SWITCH}={value}: expected off, for torch operations only, or on, or unset it")


def of(x: Tensor) -> Kernels | None:
    """The kernels that work on tensors like x, if there are any; built at the first call."""
    if x.device.type == "cpu":
        return load() if x.dtype in DTYPES else None
    return on_gpu(x)


def on_gpu(x: Tensor) -> GpuKernels | None:
    """As :func:`of`, where x is on a GPU: what only those can."""
    fits = x.is_cuda and x.dtype in (torch.float32, torch.bfloat16) and x.numel() < MOST_ELEMENTS
    return load_triton() if fits else None


def describe(device: str) -> str:
    """Which kernels work on a device, built at the first call: ``C++``, ``Triton`` or ``torch``."""
    if device.startswith("cuda"):
        return "Triton" if load_triton() else "torch"
    return "C++" if load() else "torch"


@functools.cache
def load() -> CppKernels | None:
    """The kernels of this processor, or None after a line on stderr (of the first process) that says why not."""
    if os.environ.get(SWITCH) == "off":
        return None
    try:
        return CppKernels(open_library())
    except KernelError as error:
        _say(str(error))
        return None


@functools.cache
def load_triton() -> GpuKernels | None:
    """The kernels of a GPU, or None, likewise."""
    if os.environ.get(SWITCH) == "off":
        return None
    try:
        from trainer.model.kernels.triton import TritonKernels

        found = TritonKernels()
        w, v, g = torch.ones(3, 1, device="cuda").unbind()
        found.update(w, v, g, (1.0, 0.0, 0.0), None)
    except Exception as error:  # Triton needs a C compiler and a GPU that it knows, and says so in many ways
        _say(f"{type(error).__name__}: {error}".splitlines()[0])
        return None
    return found


def environment(device: str) -> dict[str, str]:
    """For processes started from here: what could not be had for this device, they need not try again, nor say."""
    return {SWITCH: "off"} if describe(device) == "torch" else {}


def _say(why: str) -> None:
    """One line: what is missing costs time and changes nothing else."""
    if os.environ.get("RANK", "0") == "0":
        remark(f"note: torch operations instead of compiled kernels, slower: {why}")
