"""The GPU kernels without a GPU: run by Triton's interpreter, and compiled for two generations of GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.model.kernels import interface
from trainer.model.response_norm import _KernelResponseNorm, response_norm

pytestmark = pytest.mark.numeric

pytest.importorskip("triton", reason="comes with torch's CUDA wheels")


def check_norm(functions: interface.Kernels, device: str) -> None:
    """Values and gradients of all sizes and dtypes against the torch operations in float64; two towers."""
    for dtype, step in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
        for size in interface.SIZES:
            for rectify in (False, True):
                x = (torch.randn(3, 18, 5, 7, device=device) * 3).to(dtype).to(memory_format=torch.channels_last)
                x, g = x.requires_grad_(), torch.randn_like(x)
                norm = interface.Norm(x.numel() // 9, 9, size, 0.2, 2.0, rectify)
                y = _KernelResponseNorm.apply(x, norm, functions)
                y.backward(g)
                exact = x.detach().double().contiguous().requires_grad_()
                wanted = response_norm(
                    exact.relu() if rectify else exact, size=size, alpha=0.2, beta=0.75, k=2.0, maps=9
                )
                wanted.backward(g.double())
                torch.testing.assert_close(y.double(), wanted, rtol=step, atol=step)
                torch.testing.assert_close(x.grad.double(), exact.grad, rtol=step, atol=4 * step)


def check_not_finite(functions: interface.Kernels, device: str) -> None:
    """NaN comes out where it goes in and beside it, and nowhere else."""
    x = torch.randn(1, 12, 2, 2, device=device).to(memory_format=torch.channels_last)
    x[0, 5, 1, 1] = float("nan")
    for rectify in (False, True):
        y = functions.norm_forward(x, interface.Norm(4, 12, 5, 0.2, 2.0, rectify))
        assert [index[1] for index in y.isnan().nonzero().tolist()] == [3, 4, 5, 6, 7]


def check_update(functions: interface.Kernels, device: str) -> None:
    """Against the formula; guards of 0 and 1."""
    for guard in (None, 1.0, 0.0):
        w, v, g = torch.randn(3, 2500, device=device)
        flag = None if guard is None else torch.tensor(guard, device=device)
        velocity = v if guard == 0.0 else 0.9 * v - 0.005 * w - 0.1 * g
        weights = w if guard == 0.0 else w + velocity
        ours = w.clone(), v.clone()
        functions.update(*ours, g, (0.9, 0.005, 0.1), flag)
        torch.testing.assert_close(ours[0], weights)
        torch.testing.assert_close(ours[1], velocity)


def test_interpreted_kernels_equal_the_formulas(tmp_path: Path) -> None:
    """The functions above on CPU tensors, in a process of its own: Triton decides at import who runs its kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    program = (
        "from tests.trainer.model.test_kernels_triton import *\n"
        "from trainer.model.kernels.triton import TritonKernels\n"
        "for check in (check_norm, check_not_finite, check_update): check(TritonKernels(), 'cpu')\n"
        "print('checked')"
    )
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "checked\n", done.stderr


@pytest.mark.parametrize(("capability", "dtype"), [(80, "*fp32"), (90, "*bf16")])
def test_kernels_compile_for_gpus(capability: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to machine code of A100 and H100, with the compiler of the wheel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trainer.model.kernels import triton as kernels_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    norm = {"count": "i32", "maps": "i32", "alpha": "fp32", "k": "fp32"}
    window = {"HALF": 2, "RECTIFY": True, "BLOCK": 1024}
    weights = dict.fromkeys(("w", "v", "g", "guard"), "*fp32") | {"count": "i32"}
    for kernel, arguments, constants in (
        (kernels_triton.forward_kernel, dict.fromkeys(("x", "y"), dtype) | norm, window),
        (kernels_triton.backward_kernel, dict.fromkeys(("x", "g", "dx"), dtype) | norm, window),
        (
            kernels_triton.update_kernel,
            weights | dict.fromkeys(("momentum", "decay", "rate"), "fp32"),
            {"GUARDED": True, "BLOCK": 1024},
        ),
    ):
        source = ASTSource(kernel, arguments | dict.fromkeys(constants, "constexpr"), constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert f".target sm_{capability}" in made.asm["ptx"] and len(made.asm["cubin"]) > 1000
