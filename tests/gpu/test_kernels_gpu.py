"""The Triton kernels on a real GPU: equal to the formulas, used by the net, and its update waits for nobody."""

import unittest.mock

import pytest
import torch
from torch import nn

from tests.helpers.gpu_kernels import CHECKS
from trainer.config import ModelConfig, OptimizerConfig
from trainer.model import kernels
from trainer.model.alexnet import AlexNet
from trainer.model.gpu_layers import low_copy
from trainer.model.layers import DropoutDraws
from trainer.model.response_norm import response_norm
from trainer.training.optimizer import PaperSGD

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_kernels_equal_the_formulas(check) -> None:
    functions = kernels.load_triton()
    assert functions is not None and kernels.describe("cuda:0") == "Triton"
    check(functions, "cuda")


def test_equal_to_the_kernels_of_the_processor() -> None:
    x = (torch.randn(4, 96, 27, 27) * 30).to(memory_format=torch.channels_last)
    found = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device, copy=True).requires_grad_()
        y = response_norm(leaf, size=5, alpha=1e-4, beta=0.75, k=2.0, maps=48, rectify=True)
        y.backward(x.to(device))
        found.append((y.detach().cpu(), leaf.grad.cpu()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def small_net(dtype: torch.dtype) -> AlexNet:
    """The paper's structure, narrow, on the GPU; every layer has weights that matter."""
    config = ModelConfig(channels=(16, 16, 24, 24, 16), hidden=(32, 32), classes=10, image_px=67, dropout=0.0)
    net = AlexNet(config)
    torch.manual_seed(0)
    for parameter in net.parameters():  # in float32: noise of another dtype would be other noise
        nn.init.normal_(parameter, std=0.1)
    return net.to("cuda", dtype, memory_format=torch.channels_last)


def gradients(net: AlexNet, *, low: bool) -> list[torch.Tensor]:
    """Loss and gradients of one batch."""
    torch.manual_seed(1)
    x = (torch.randn(6, 3, 67, 67) * 9).to("cuda", next(net.parameters()).dtype)
    x, labels = x.contiguous(memory_format=torch.channels_last), torch.arange(6, device="cuda")
    net.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=low):
        loss = net.loss(x, labels)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in net.parameters())]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """Relative, of the norms."""
    return [float((ours.double() - wanted).norm() / wanted.norm()) for ours, wanted in zip(found, exact, strict=True)]


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_the_net_equals_float64(low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense convolutions, blocks of pixels, fused pooling and all; gradients lie in memory as their weights do.

    Rounded to bf16, a maximum of near ones is another, and a unit near 0 on the other side: that alone is a fifth of
    conv1's gradient here. So the error must be that of torch's own operations in bf16, or little more.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # 10 bits would do the same to fp32
    exact = gradients(small_net(torch.float64), low=False)
    net = small_net(torch.float32)
    found = errors(gradients(net, low=low), exact)
    assert all(parameter.grad.stride() == parameter.stride() for parameter in net.parameters())
    monkeypatch.setattr(kernels, "load_triton", lambda: None)
    plain = errors(gradients(small_net(torch.float32), low=low), exact)
    for ours, by_torch in zip(found, plain, strict=True):
        assert ours <= (2 * by_torch + 0.05 if low else 1e-3)


def test_a_step_counts_its_masks_and_cuts_its_images_in_one_launch_each() -> None:
    """ReLU and dropout of a layer: one launch forward, one backward; images, conv1's weight and its gradient likewise.

    The outcome is that of torch's operations.
    """
    config = ModelConfig(channels=(16, 16, 24, 24, 16), hidden=(32, 32), classes=10, image_px=67, dropout=0.5)
    net = AlexNet(config).to("cuda", memory_format=torch.channels_last)
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = (torch.randn(6, 3, 67, 67, device="cuda") * 9).contiguous(memory_format=torch.channels_last)
    labels, found = torch.arange(6, device="cuda"), []
    for on in (kernels.on_gpu, lambda _: None):
        with unittest.mock.patch.object(kernels, "on_gpu", on):
            for _ in range(2):
                net.zero_grad(set_to_none=True)
                torch.cuda.synchronize()
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    loss = net.loss(x, labels, DropoutDraws(1, 7, first=6))
                    loss.backward()
                    torch.cuda.synchronize()
        launches = {event.key: event.count for event in profile.key_averages()}
        found.append((loss.detach(), net.fc7.weight.grad, launches))
    (ours, gradient, launches), (plain, wanted, _) = found
    for found_here, expected in ((ours, plain), (gradient, wanted)):  # convolutions may be tf32
        assert (found_here - expected).abs().max() <= 0.01 * expected.abs().max()
    counts = {"relu_dropout_kernel": 2, "relu_dropout_backward_kernel": 2, "to_blocks_kernel": 2}
    assert {name: launches.get(name) for name in counts} == counts and launches["from_blocks_kernel"] == 1


def test_a_step_casts_no_weights_and_updates_in_one_launch() -> None:
    """From the second step on: the update has written what the forward multiplies."""
    net = small_net(torch.float32)
    optimizer = PaperSGD(net.named_parameters(), OptimizerConfig())
    for _ in range(2):
        gradients(net, low=True)
        optimizer.step()
    copies = {parameter: parameter.low_copy.tensor for parameter in net.parameters() if low_copy(parameter)}
    alone = {name for name, parameter in net.named_parameters() if parameter not in copies}
    assert alone == {f"conv{number}.bias" for number in range(1, 6)}  # kernels add them as they are
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gradients(net, low=True)
        optimizer.step()
        torch.cuda.synchronize()
    launches = {event.key: event.count for event in profile.key_averages()}
    assert launches["update_all_kernel"] == 1 and "update_kernel" not in launches
    assert launches["relu_forward_kernel"] == launches["relu_backward_kernel"] == 2
    assert launches["norm_forward_kernel"] == launches["norm_backward_kernel"] == 2
    assert launches["pool_forward_kernel"] == 3 and launches["pool_backward_kernel"] == 1
    for parameter, copy in copies.items():
        assert parameter.low_copy.tensor is copy and torch.equal(copy, parameter.bfloat16())
