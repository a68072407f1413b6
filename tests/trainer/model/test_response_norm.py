"""Response normalization against torch's and against finite differences."""

import pytest
import torch
from torch import nn

from trainer.model import response_norm as normalization
from trainer.model.response_norm import lrn_within_channel, response_norm

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_gradients_are_exact(beta: float) -> None:
    """float64 finite differences, with a strong alpha so that every term of the backward matters."""
    x = torch.randn(2, 7, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: response_norm(v, size=5, alpha=0.3, beta=beta, k=2.0), (x,))
    rows = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: response_norm(v, size=5, alpha=0.3, beta=beta, k=2.0), (rows,))
    assert torch.autograd.gradcheck(lambda v: lrn_within_channel(v, size=3, alpha=0.3, beta=beta), (x,))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("maps", [3, 48])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_torch_whose_alpha_is_divided_by_size(
    maps: int, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    """Values and gradients of nn.LocalResponseNorm(5, 5 alpha).

    At most 15 roundings lie between x and a value, 36 between x and a gradient, a difference of numbers below 8.
    """
    x = (torch.randn(2, maps, 9, 9, dtype=dtype) * 30).to(memory_format=memory_format).requires_grad_()
    rounding = torch.finfo(dtype).eps / 2
    ours = response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0)
    theirs = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)(x)
    torch.testing.assert_close(ours, theirs, rtol=2 * 15 * rounding, atol=0)
    weights = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), x)[0],
        torch.autograd.grad((theirs * weights).sum(), x)[0],
        rtol=2 * 36 * rounding,
        atol=8 * 2 * 36 * rounding,
    )


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_blocks_equal_the_formulas(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocked kernels (channels_last) against the plain formulas; two towers in a tensor; a smaller last block."""
    monkeypatch.setattr(normalization, "BLOCK_ELEMENTS", 9 * 32)
    x = (torch.randn(5, 18, 4, 5) * 3).to(dtype)
    weights = torch.randn(x.shape).to(dtype)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=layout).requires_grad_()
        y = response_norm(leaf, size=size, alpha=0.2, beta=0.75, k=2.0, maps=9)
        (y * weights).sum().backward()
        found.append((y.detach(), leaf.grad))
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    for plain, blocked in zip(*found, strict=True):
        assert blocked.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(blocked.contiguous(), plain, **tolerance)


def test_spatial_norm_by_hand() -> None:
    """One bright pixel, 3x3 window: its neighbors are zero, so only it is scaled."""
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 2.0
    x[0, 0, 2, 3] = 1.0
    y = lrn_within_channel(x, size=3, alpha=0.1, beta=0.75)
    assert y[0, 0, 2, 2].item() == pytest.approx(2.0 * (1 + 0.1 * 5.0) ** -0.75)
    assert y[0, 0, 2, 3].item() == pytest.approx(1.0 * (1 + 0.1 * 5.0) ** -0.75)


def test_bfloat16_is_as_good_as_its_inputs() -> None:
    """bfloat16 in and out, sums in float32: the relative error is that of rounding the output once."""
    x = torch.randn(2, 16, 6, 6) * 50
    narrow = x.bfloat16()
    exact = response_norm(narrow.float(), size=5, alpha=1e-4, beta=0.75, k=2.0)
    found = response_norm(narrow, size=5, alpha=1e-4, beta=0.75, k=2.0)
    assert found.dtype == torch.bfloat16
    assert ((found.float() - exact).norm() / exact.norm()).item() < 2**-8


def test_only_the_input_is_saved() -> None:
    """What the backward keeps alive is the input itself, nothing of its size besides."""
    saved: list[torch.Tensor] = []
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        response_norm(x, size=5, alpha=1e-4, beta=0.75, k=2.0)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
