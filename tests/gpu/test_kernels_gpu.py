"""The Triton kernels on a real GPU: equal to the formulas, used by the net, and its update waits for nobody."""

import pytest
import torch

from tests.trainer.model.test_kernels_triton import check_norm, check_not_finite, check_update
from trainer.model import kernels
from trainer.model.response_norm import response_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("check", [check_norm, check_not_finite, check_update])
def test_kernels_equal_the_formulas(check) -> None:
    functions = kernels.load_triton()
    assert functions is not None and kernels.describe("cuda:0") == "Triton"
    check(functions, "cuda")


def test_equal_to_the_kernels_of_the_processor() -> None:
    x = (torch.randn(4, 96, 27, 27) * 30).to(memory_format=torch.channels_last)
    found = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        y = response_norm(leaf, size=5, alpha=1e-4, beta=0.75, k=2.0, maps=48, rectify=True)
        y.backward(x.to(device))
        found.append((y.detach().cpu(), leaf.grad.cpu()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
