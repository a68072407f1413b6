"""How a GPU computes the layers, on the CPU in float64: the same sums as the plain layers, forward and backward."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import ModelConfig
from trainer.model.alexnet import AlexNet
from trainer.model.gpu_layers import LowLinear, block_conv2d, fresh_copy, has_blocks, lowered, split_conv2d
from trainer.model.layers import Conv2d, Linear

pytestmark = pytest.mark.numeric


def check_same(module: Conv2d, x: Tensor) -> None:
    """Outputs and all gradients of ``on_gpu`` and of the plain layer, within 1e-12 of the largest."""
    results = []
    for compute in (module.rearranged, module.forward):
        module.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        y = compute(leaf)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape, dtype=y.dtype))
        results.append([y.detach(), leaf.grad, *(parameter.grad for parameter in module.parameters())])
    for ours, plain in zip(*results, strict=True):
        assert ours.shape == plain.shape
        assert (ours - plain).abs().max() <= 1e-12 * plain.abs().max()


@pytest.mark.parametrize(
    ("arguments", "groups", "side"),
    [
        ((3, 16, 11, 4, (0, 3)), 1, (67, 64)),  # conv1 of the paper: its last windows hang over
        ((3, 8, 11, 4, (2, 2)), 1, (49, 51)),
        ((1, 8, 5, 3, (1, 0)), 1, (17, 22)),  # what no window sees is left out
        ((4, 8, 4, 4, (0, 0)), 1, (16, 19)),
        ((3, 8, 3, 4, (0, 1)), 1, (18, 18)),  # windows with gaps between them
        ((16, 24, 5, 1, (2, 2)), 2, (9, 7)),
        ((16, 24, 3, 2, (0, 1)), 2, (9, 8)),
        ((8, 16, 3, 1, (1, 1)), 1, (7, 5)),
    ],
)
def test_convolutions_of_a_gpu_are_the_same_sums(arguments, groups: int, side: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = Conv2d(*arguments, groups=groups).double().to(memory_format=torch.channels_last)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, arguments[0], *side, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert has_blocks(arguments[0], arguments[3], groups) == (groups == 1 and arguments[3] > 1)
    check_same(module, x)


def test_the_first_convolution_becomes_one_of_48_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 x 3 blocks, no stride, 55 x 55 outputs; grouped ones become dense ones of a tower's channels."""
    plain, seen = functional.conv2d, []
    monkeypatch.setattr(functional, "conv2d", lambda x, w, *more: seen.append((x.shape, w.shape)) or plain(x, w, *more))
    x, weight = torch.zeros(1, 3, 224, 224), torch.zeros(96, 3, 11, 11)
    assert block_conv2d(x, weight, None, 4, (0, 3)).shape == (1, 96, 55, 55)
    assert seen == [((1, 48, 57, 57), (96, 48, 3, 3))]
    seen.clear()
    grouped = split_conv2d(torch.zeros(1, 96, 27, 27), torch.zeros(256, 48, 5, 5), None, (1, 1), (2, 2), 2)
    assert grouped.shape == (1, 256, 27, 27) and grouped.is_contiguous(memory_format=torch.channels_last)
    assert seen == [((1, 48, 27, 27), (128, 48, 5, 5))] * 2


def test_the_whole_net_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient of the paper's structure, narrow: all layers as a GPU computes them, or none."""
    config = ModelConfig(channels=(8, 16, 16, 16, 8), hidden=(16, 16), classes=10, image_px=67, dropout=0.0)
    net = AlexNet(config).double().to(memory_format=torch.channels_last)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, labels = torch.randn(2, 3, 67, 67, dtype=torch.float64) * 9, torch.tensor([1, 7])
    found = []
    for changed in (False, True):
        if changed:
            monkeypatch.setattr(Conv2d, "forward", Conv2d.rearranged)
        net.zero_grad(set_to_none=True)
        loss = net.loss(x, labels)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in net.parameters())])
        strides = [parameter.grad.stride() == parameter.stride() for parameter in net.parameters()]
        assert all(strides)  # as the update wants them
    for plain, ours in zip(*found, strict=True):
        assert (ours - plain).abs().max() <= 1e-12 * plain.abs().max()


def test_a_low_linear_layer_is_autocasts_with_a_wider_gradient() -> None:
    """The same products of bfloat16; the gradients of weight and bias are float32, and as near to float64 as can be."""
    torch.manual_seed(0)
    module, x = Linear(24, 16), torch.randn(8, 24)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = module(x), module.on_gpu(x)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain)
    ours.backward(torch.ones_like(ours))
    assert module.weight.grad.dtype == module.bias.grad.dtype == torch.float32
    exact = x.bfloat16().double().sum(0).expand(16, 24)
    torch.testing.assert_close(module.weight.grad.double(), exact, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(module.bias.grad, torch.full((16,), 8.0))
    leaf = x.bfloat16().requires_grad_()
    LowLinear.apply(leaf, *module.parameters(), *(p.detach().bfloat16() for p in module.parameters())).sum().backward()
    torch.testing.assert_close(leaf.grad[0], module.weight.detach().bfloat16().float().sum(0).bfloat16())


def test_a_copy_is_made_anew_when_its_parameter_has_changed_and_only_then() -> None:
    """Whoever changes the parameter: another step, loaded weights; in the same memory, in the parameter's layout."""
    parameter = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
    first = fresh_copy(parameter)
    assert first is fresh_copy(parameter) and first.stride() == parameter.stride()
    with torch.no_grad():
        parameter.mul_(3)
    old, second = first.clone(), fresh_copy(parameter)
    assert torch.equal(second, parameter.bfloat16()) and not torch.equal(second, old)
    assert second is first and second is fresh_copy(parameter)  # a CUDA graph reads it where it was
    assert lowered(parameter, torch.float32) is parameter  # nothing is copied where nothing is narrower
