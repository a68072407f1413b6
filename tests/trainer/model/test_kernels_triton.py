"""The GPU kernels without a GPU: run by Triton's interpreter, and compiled for two generations of GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.numeric

# of a thread with 8 channels: what an H100 issues while the kernel's bytes move is 300 and 840
MOST_INSTRUCTIONS = {("bf16", "norm forward conv1"): 230, ("bf16", "pool forward conv5"): 520}

pytest.importorskip("triton", reason="comes with torch's CUDA wheels")


def test_interpreted_kernels_equal_the_formulas(tmp_path: Path) -> None:
    """Every check on CPU tensors, in a process of its own: Triton decides at import who runs its kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    program = (
        "from tests.helpers.gpu_kernels import CHECKS\n"
        "from tests.helpers.gpu_net_input import check_flat_images, check_net_input\n"
        "from trainer.model.kernels import triton\n"
        "from trainer.model.kernels.triton import TritonKernels\n"
        "triton.PROGRAMS = 1\n"  # several tiles a program, of maps as small as these
        "for check in CHECKS: check(TritonKernels(), 'cpu')\n"
        "check_net_input('cpu'); check_flat_images('cpu')\n"
        "print('checked')"
    )
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "checked\n", done.stderr


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp32"), (90, "bf16")])
def test_kernels_compile_for_gpus(capability: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to machine code of A100 and H100: nothing spilled, next to no shared memory, 16 bytes a load and a store.

    A window of five costs 4 shuffles a thread, whatever it holds: sums come from registers. Those of a bias cost a
    program's end some more.
    """
    from tests.helpers.gpu_compile import compile_kernel, paper_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = {kernel.name: kernel for kernel in paper_kernels(dtype, batch=128)}
    of_bias = 16 if dtype == "bf16" else 8
    shuffles = {"norm forward conv1": 4, "norm + pool backward conv1": 8 + of_bias, "pool backward conv5": of_bias}
    shuffles |= {"pool forward conv5": 0, "relu forward conv3": 0, "update": 0}
    for name, count in shuffles.items():
        made = compile_kernel(kernels[name], capability)
        assert f".target sm_{capability}" in made.ptx and made.spilled_bytes in (0, None), name
        assert made.shared_bytes <= 4096 and (made.registers is None or made.registers <= 96), name
        assert made.ptx.count("shfl.sync") == count, name
        # channels never pass through shared memory: what a bias has gathered does, and the update's copies in bfloat16
        barriers = 11 if "backward" in name else 6 if name == "update" else 0
        assert made.ptx.count("bar.sync") <= barriers, name
        assert made.wide_loads and made.wide_stores, name
        if (dtype, name) in MOST_INSTRUCTIONS and made.instructions:
            assert 100 < made.instructions <= MOST_INSTRUCTIONS[dtype, name], name


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp32"), (90, "bf16")])
def test_blocks_and_dropout_compile_for_gpus(
    capability: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte is read once and written once, 16 bytes a store; one hash for four units, nothing between threads."""
    from tests.helpers.gpu_compile import blocks_back_case, compile_kernel, paper_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    size, kernels = 2 if dtype == "bf16" else 4, {kernel.name: kernel for kernel in paper_kernels(dtype, batch=128)}
    kernels["blocks backward conv1"] = blocks_back_case(dtype)
    assert kernels["blocks conv1"].moved_bytes == 128 * size * (224 * 224 * 3 + 57 * 57 * 48)
    assert kernels["dropout backward fc6"].moved_bytes == 3 * 128 * size * 4096
    made = {name: compile_kernel(kernels[name], capability) for name in kernels if name.startswith(("blocks", "drop"))}
    for name, found in made.items():
        assert f".target sm_{capability}" in found.ptx and found.spilled_bytes in (0, None), name
        assert found.shared_bytes == 0 and (found.registers is None or found.registers <= 40), name
        assert found.ptx.count("shfl.sync") == 0, name
    blocks, forward, backward = (made[name] for name in ("blocks conv1", "dropout forward fc6", "dropout backward fc6"))
    assert blocks.wide_stores == blocks.ptx.count("st.global") == 4  # of a thread, all on their way at once
    loads = "ld.global.v2.b32" if dtype == "bf16" else "ld.global.v4.b32"  # 4 values: gcd of 12 and 8, or 4
    assert blocks.ptx.count(loads) == blocks.ptx.count("ld.global") == 4 * (8 // 4 if dtype == "bf16" else 1)
    assert forward.wide_loads == forward.wide_stores == forward.ptx.count("st.global") == 1
    assert backward.wide_loads == 2 and backward.wide_stores == backward.ptx.count("st.global") == 1
    products = forward.ptx.count("mul.lo.s64") + forward.ptx.count("mad.lo.s64")
    assert products <= (5 if dtype == "bf16" else 3)  # two words of four units in 16 bytes of bfloat16


def test_dropout_is_one_kernel_for_all_steps() -> None:
    """Whatever the start, the rows, and where a captured step finds its start: nothing is compiled while capturing."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    from trainer.model.kernels.triton_dropout import relu_dropout_kernel as kernel

    bind = create_function_from_signature(kernel.signature, kernel.params, CUDABackend(GPUTarget("cuda", 90, 32)))
    x, numbers, keys = torch.empty(64, dtype=torch.bfloat16), torch.arange(8), set()
    for place, start, count, first in ((0, 5, 128, 0), (3, 0, 1, 1), (1, 2**62 + 1, 77, 48), (2, 1, 16, 2**20)):
        arguments = x, x, numbers[place], numbers[place], start, start, count, first, 1, 1.0
        keys.add(str(bind(*arguments, 2048, 2, 512, 0, 8, 128)[1]))
    assert len(keys) == 1, keys


@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp32"), (90, "bf16")])
def test_the_input_kernel_compiles_for_gpus(
    capability: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the paper's images: crop and mean image are read once, in whole lines; 4 values a thread are written at once.

    Nothing passes through shared memory, but for the sums of a standardized image.
    """
    from tests.helpers.gpu_compile import compile_kernel, input_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plain, standardized = input_kernels(dtype, batch=128)
    crops, image, rows = 128 * 224 * 224 * 3, 4 * 256 * 256 * 3, 4 * 128 * 9
    assert plain.moved_bytes == crops * (3 if dtype == "bf16" else 5) + image + rows
    made = compile_kernel(plain, capability)
    assert f".target sm_{capability}" in made.ptx and made.spilled_bytes in (0, None) and made.shared_bytes == 0
    assert made.registers is None or made.registers <= 40
    written = "v2.b32" if dtype == "bf16" else "v4.b32"
    assert made.ptx.count(f"st.global.{written}") == 1 and made.ptx.count("st.global") == 1
    assert made.ptx.count("ld.global.b8") == 4  # a pixel of the crop is read by one thread, once
    made = compile_kernel(standardized, capability)
    assert made.spilled_bytes in (0, None) and made.shared_bytes <= 256
    assert made.registers is None or made.registers <= 128  # 512 threads have 65,536
