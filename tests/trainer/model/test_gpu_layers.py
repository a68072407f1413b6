"""How a GPU computes the layers, on the CPU in float64: the same sums as the plain layers, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.torch_kernels import TorchKernels
from trainer.config import ModelConfig
from trainer.model import kernels
from trainer.model.alexnet import AlexNet
from trainer.model.gpu_layers import (
    LowLinear,
    block_conv2d,
    fresh_copy,
    has_blocks,
    join,
    lowered,
    part_conv2d,
    tower_parts,
)
from trainer.model.kernels.interface import TowerMaps
from trainer.model.layers import Conv2d, Linear, post_ops

pytestmark = pytest.mark.numeric


def check_same(module: Conv2d, x: Tensor) -> None:
    """Outputs and all gradients of ``rearranged`` and of the plain layer, within 1e-12 of the largest."""
    results = []
    for compute in (lambda x: join(module.rearranged(x)), module.forward):
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
    assert block_conv2d(x, weight, 4, (0, 3)).shape == (1, 96, 55, 55)
    assert seen == [((1, 48, 57, 57), (96, 48, 3, 3))]
    seen.clear()
    maps = tower_parts(torch.zeros(1, 96, 27, 27), 2)
    grouped = part_conv2d(maps, torch.zeros(256, 48, 5, 5), (1, 1), (2, 2))
    assert [part.shape for part in grouped] == [(1, 128, 27, 27)] * 2
    assert seen == [((1, 48, 27, 27), (128, 48, 5, 5))] * 2
    assert tower_parts(TowerMaps(grouped), 2) is grouped  # nothing is copied between two of them
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in maps)


PAPER = ModelConfig.__dataclass_fields__["post_ops"].default
ORIGINAL = (("lrn", "maxpool", "relu"), ("relu", "lrn", "lrn_within_channel", "maxpool"), *PAPER[2:4], PAPER[4][::-1])
NORMALIZED = (("batch_norm", "maxpool", "relu"), ("relu", "maxpool", "lrn"), ("batch_norm", "relu"), (), ("tanh",))
NETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "original": {"post_ops": ORIGINAL},
    "batch norm, nothing, tanh": {"post_ops": NORMALIZED},
    "one tower": {"towers": 1},
    "towers that meet at fc6": {"crossings": ("fc6", "fc7", "fc8"), "pool_ceil": True},
    "no overlap": {"pool_px": 2, "channels": (5, 7, 9, 6, 3)},
}


def loss_and_gradients(net: AlexNet, config: ModelConfig) -> list[Tensor]:
    """Of three images; gradients lie in memory as their weights do, as the update wants them."""
    torch.manual_seed(2)
    images = torch.randn(3, 3, config.image_px, config.image_px, dtype=torch.float64) * 9
    net.zero_grad(set_to_none=True)
    loss = net.loss(images, torch.tensor([1, 7, 3]))
    loss.backward()
    assert all(parameter.grad.stride() == parameter.stride() for parameter in net.parameters())
    return [loss.detach(), *(parameter.grad for parameter in net.parameters())]


@pytest.mark.parametrize("on", [True, False], ids=["kernels", "no kernels"])
@pytest.mark.parametrize("changes", NETS.values(), ids=NETS)
def test_the_whole_net_in_float64(changes: dict[str, Any], on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient, narrow: all layers and what is between them as a GPU computes them, or none."""
    shape = {"channels": (8, 16, 16, 16, 8), "hidden": (16, 16), "classes": 10, "image_px": 67, "dropout": 0.0}
    config = ModelConfig(**shape | changes)
    net = AlexNet(config).double().to(memory_format=torch.channels_last)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    plain, functions = loss_and_gradients(net, config), TorchKernels()
    monkeypatch.setattr(Conv2d, "forward", Conv2d.rearranged)
    monkeypatch.setattr(kernels, "on_gpu", lambda _: functions if on else None)
    for ours, wanted in zip(loss_and_gradients(net, config), plain, strict=True):
        assert (ours - wanted).abs().max() <= 1e-12 * wanted.abs().max() + 1e-15  # of a bias before batch norm: 0
    with torch.no_grad():
        images = torch.randn(1, 3, config.image_px, config.image_px, dtype=torch.float64)
        ours = net.eval()(images)
        monkeypatch.undo()
        torch.testing.assert_close(ours, net(images), rtol=1e-11, atol=1e-11)
    if on and not changes:
        forward = ["norm_maps", "pool_forward", "norm_maps", "pool_forward", *["relu_forward"] * 2, "pool_forward"]
        backward = ["pool_backward", *["relu_backward"] * 2, *["pooled_norm_backward"] * 2]
        assert functions.called == [*forward, *backward, *forward]


@pytest.mark.parametrize("index", range(5))
def test_a_tower_by_itself_takes_and_gives_tensors(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process with one tower hands on: a layer that sees both adds its bias itself."""
    config, functions = ModelConfig(channels=(8,) * 5), TorchKernels()
    module, x = post_ops(config, index, 1), torch.randn(2, 8, 9, 9, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last)
    plain = module(x.clone(memory_format=torch.preserve_format))
    monkeypatch.setattr(kernels, "on_gpu", lambda _: functions)
    ours, with_bias = module(x), module(TowerMaps((x,), torch.ones(8, dtype=torch.float64)))
    assert isinstance(ours, Tensor) and isinstance(with_bias, Tensor) and functions.called
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(with_bias, module(x + 1), rtol=1e-12, atol=1e-12)


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
