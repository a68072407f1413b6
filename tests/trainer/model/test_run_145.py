"""Run #145 in NumPy, float64, written from its layer files alone, against the net of ``configs/original.toml``.

The reference below knows nothing of torch nor of the recipe: sizes, constants and the order of operations stand in it
as numbers. Then every operator of the net: its gradient against finite differences, in float64.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn
from torch.func import functional_call

from tests.helpers.loader_data_set import photo_crop
from trainer.config import LrnConfig, ModelConfig, load_config
from trainer.model.alexnet import AlexNet
from trainer.model.layers import Dropout, DropoutDraws, WholeNetLayers, post_ops

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("one_thread")]

ORIGINAL = load_config(Path(__file__).resolve().parents[3] / "configs" / "original.toml")
Weights = dict[str, np.ndarray]


# --- run #145 ---------------------------------------------------------------------------------------------------------


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, zeros: tuple[int, int]) -> np.ndarray:
    """(N, C, H, W) with weight (M, C, k, k) -> (N, M, H', W'); zeros above and left, and below and right."""
    padded = np.pad(x, ((0, 0), (0, 0), zeros, zeros))
    side = weight.shape[-1]
    windows = sliding_window_view(padded, (side, side), axis=(2, 3))[:, :, ::stride, ::stride]  # (N, C, H', W', k, k)
    n, _, height, width = windows.shape[:4]
    rows = windows.transpose(0, 2, 3, 1, 4, 5).reshape(n * height * width, -1)
    maps = rows @ weight.reshape(len(weight), -1).T + bias
    return maps.reshape(n, height, width, -1).transpose(0, 3, 1, 2)


def across_maps(x: np.ndarray) -> np.ndarray:
    """The program's cross-map response normalization: x (2 + 1e-4 / 5 * sum over 5 maps of x^2)^-0.75."""
    squares = np.pad(x**2, ((0, 0), (2, 2), (0, 0), (0, 0)))
    total = sum(squares[:, shift : shift + x.shape[1]] for shift in range(5))
    return x * (2.0 + 1e-4 / 5 * total) ** -0.75


def across_pixels(x: np.ndarray) -> np.ndarray:
    """The program's response normalization inside a map: x (1 + 1e-3 / 25 * sum over 5x5 px of x^2)^-0.75."""
    squares = np.pad(x**2, ((0, 0), (0, 0), (2, 2), (2, 2)))
    return x * (1.0 + 1e-3 / 25 * sliding_window_view(squares, (5, 5), axis=(2, 3)).sum((4, 5))) ** -0.75


def pool(x: np.ndarray) -> np.ndarray:
    """3x3 px, every 2 px; all sides here are odd, so no window hangs over."""
    assert x.shape[2] % 2 == 1
    return sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2].max((4, 5))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0)


def run_145(images: np.ndarray, a: Weights, b: Weights) -> np.ndarray:
    """Testing: (N, 3, 224, 224) -> logits (N, 1000); the widths are those of the weights."""
    halves = []
    for w in (a, b):
        x = convolve(images, w["conv1.weight"], w["conv1.bias"], 4, (0, 3))
        x = relu(pool(across_maps(x)))
        x = relu(convolve(x, w["conv2.weight"], w["conv2.bias"], 1, (2, 2)))
        halves.append(pool(across_pixels(across_maps(x))))
    seen = np.concatenate(halves, axis=1)
    assert seen.shape[2:] == (13, 13)
    halves = []
    for w in (a, b):
        x = relu(convolve(seen, w["conv3.weight"], w["conv3.bias"], 1, (1, 1)))
        x = relu(convolve(x, w["conv4.weight"], w["conv4.bias"], 1, (1, 1)))
        x = relu(pool(convolve(x, w["conv5.weight"], w["conv5.bias"], 1, (1, 1))))
        assert x.shape[2:] == (6, 6)
        halves.append(x.reshape(len(x), -1))
    for layer in ("fc6", "fc7"):
        seen = np.concatenate(halves, axis=1)
        halves = [0.5 * relu(seen @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]) for w in (a, b)]
    return np.concatenate(halves, axis=1) @ a["fc8.weight"].T + a["fc8.bias"]


def real_photos() -> np.ndarray:
    """Two photos as run #145 sees them: (2, 3, 224, 224) float64, a mean subtracted."""
    pixels = np.stack([photo_crop(number, 224, 224, 3) for number in (1, 3)]).astype(np.float64)
    return pixels.transpose(0, 3, 1, 2) - np.array([123.0, 117.0, 104.0]).reshape(1, 3, 1, 1)


def make_net(model: ModelConfig) -> AlexNet:
    """A net for testing, each bias moved off its constant so that no two maps have the same one."""
    net = AlexNet(model, seed=145).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.05, generator=generator))
    return net


def reference_of(net: AlexNet) -> np.ndarray:
    """The reference's logits, (2, classes) float64."""
    towers = net.split_towers({name: parameter.detach().double() for name, parameter in net.named_parameters()})
    a, b = ({name: part.numpy() for name, part in towers[tower].items()} for tower in ("a", "b"))
    return run_145(real_photos(), a, b)


@pytest.fixture(scope="module")
def net() -> AlexNet:
    """The recipe's net."""
    return make_net(ORIGINAL.model)


@pytest.fixture(scope="module")
def expected(net: AlexNet) -> np.ndarray:
    """The reference's logits, (2, 1000) float64."""
    return reference_of(net)


def logits_of(net: AlexNet, dtype: torch.dtype = torch.float64) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(net).to(dtype)(torch.from_numpy(real_photos()).to(dtype)).double().numpy()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the spread of the logits: their common part would flatter."""
    return float(np.abs(found - expected).max() / expected.std())


def test_equals_run_145_in_a_narrow_net() -> None:
    """A sixteenth of the maps and units, louder: quick, so that it is the first to notice a wrong operator."""
    narrow = {"channels": (6, 8, 12, 12, 8), "hidden": (16, 16), "classes": 10, "init_std": (0.02, *(0.1,) * 7)}
    net = make_net(dataclasses.replace(ORIGINAL.model, **narrow))
    wanted = reference_of(net)
    assert error(logits_of(net), wanted) < 1e-11
    assert (wanted[0] - wanted[1]).std() > 0.01, "the photos must matter"


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_equals_run_145(net: AlexNet, expected: np.ndarray, dtype: torch.dtype, most: float) -> None:
    """Logits, and what tells two photos apart in them as well.

    fp32: eight layers, sums of up to 9,216 products, a random walk: 8 sqrt(9216) 2^-24 = 5e-5.
    """
    found = logits_of(net, dtype)
    assert error(found, expected) < most
    signal = expected[0] - expected[1]
    assert signal.std() > 0.01, "the photos must matter"
    assert error(found[0] - found[1], signal) < most


OTHERS = {
    "ReLU before the normalization in layer 1": {
        "post_ops": (("relu", "lrn", "maxpool"), *ORIGINAL.model.post_ops[1:])
    },
    "no normalization within channels": {
        "post_ops": (ORIGINAL.model.post_ops[0], ("relu", "lrn", "maxpool"), *ORIGINAL.model.post_ops[2:])
    },
    "zeros on all four sides of the image": {"paddings": ((2, 2), *ORIGINAL.model.paddings[1:])},
    "the paper's alpha": {"lrn": dataclasses.replace(ORIGINAL.model.lrn, alpha=1e-4)},
    "outputs not halved in testing": {"dropout_kind": "inverted"},
    "within-channel alpha not divided by 25": {
        "lrn": dataclasses.replace(ORIGINAL.model.lrn, within_channel_alpha=1e-3)
    },
}


@pytest.mark.parametrize("change", list(OTHERS), ids=str)
def test_would_notice_another_net(net: AlexNet, expected: np.ndarray, change: str) -> None:
    """The same weights in a net that differs in one of the program's peculiarities are off by far more than 1e-4."""
    other = AlexNet(dataclasses.replace(ORIGINAL.model, **OTHERS[change])).eval()
    other.load_state_dict(net.state_dict())
    assert error(logits_of(other), expected) > 1e-3


# --- every operator's gradient ----------------------------------------------------------------------------------------

TINY = ModelConfig(
    image_px=31,
    in_channels=3,
    classes=3,
    channels=(6, 6, 4, 4, 4),
    kernel_sizes=(5, 3, 3, 3, 3),
    strides=(2, 1, 1, 1, 1),
    paddings=((0, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
    post_ops=ORIGINAL.model.post_ops,
    hidden=(5, 5),
    init_std=(0.3,) * 8,
    lrn=LrnConfig(alpha=0.05, within_channel_alpha=0.02),  # strong enough to be seen in the gradient
)


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).requires_grad_()


def distinct(*shape: int) -> Tensor:
    """Numbers at least 0.05 apart and off zero: no ties for pooling, no kink for ReLU within a finite difference."""
    count = int(np.prod(shape))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2)).double()
    return ((order - count / 2 + 0.5) * 0.05).view(shape).requires_grad_()


def check(module: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor, *, fast: bool = False) -> None:
    """gradcheck of a module, by its input and every parameter."""
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().double().requires_grad_() for _, p in module.named_parameters()]

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return run(self.inner, x)

    outer = Run().double()

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(outer, {f"inner.{n}": v for n, v in zip(names, values, strict=True)}, (x,))

    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=fast)


def operators(*names: str, **changes: object) -> nn.Module:
    """What follows a layer of six channels."""
    return post_ops(dataclasses.replace(TINY, **{"post_ops": ((), names, (), (), ()), **changes}), 1, 1)


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        pytest.param("maxpool", {}, id="overlapping pool"),
        pytest.param("maxpool", {"pool_px": 2}, id="pool without overlap"),
        pytest.param("relu", {}, id="relu"),
        pytest.param("tanh", {}, id="tanh"),
        pytest.param("lrn", {}, id="lrn"),
        pytest.param("lrn", {"lrn": LrnConfig(alpha=0.05, beta=0.6, size=3)}, id="lrn, other constants"),
        pytest.param("lrn_within_channel", {}, id="lrn within channel"),
        pytest.param("lrn maxpool relu", {}, id="layer 1"),
        pytest.param("relu lrn lrn_within_channel maxpool", {}, id="layer 2"),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_gradient_of_what_follows(names: str, changes: dict[str, object], layout: torch.memory_format) -> None:
    """Pooling, activations and norms, alone and in the program's orders; the norms have kernels for both layouts."""
    following = operators(*names.split(), **changes)

    def function(x: Tensor) -> Tensor:
        return following((x * 1.0).contiguous(memory_format=layout))  # on a copy, as some work in place

    assert torch.autograd.gradcheck(function, (distinct(2, 6, 5, 5),))


@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_batch_norm(training: bool) -> None:
    """By input, scale and shift; in training through the batch's own mean and deviation."""
    following = operators("batch_norm").double().train(training)
    x = numbers(3, 6, 4, 4, seed=5, scale=2.0)
    generator = torch.Generator().manual_seed(4)
    scale, shift = (
        (torch.randn(6, generator=generator, dtype=torch.float64) * 0.3 + 0.5).requires_grad_() for _ in range(2)
    )

    def function(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return functional_call(following, {"batch_norm.weight": scale, "batch_norm.bias": shift}, (x,))

    assert torch.autograd.gradcheck(function, (x, scale, shift))


@pytest.mark.parametrize("layer", ["conv1", "conv2"])
def test_gradient_of_convolutions(layer: str) -> None:
    """conv1 with its stride and zeros on two sides only, and a grouped one with zeros all around."""
    module = WholeNetLayers(TINY).conv(layer, 3, TINY.channels[0], image=layer == "conv1")
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, 0.5, generator=torch.Generator().manual_seed(7))
    channels, side = (3, 9) if layer == "conv1" else (6, 5)
    check(module, lambda module, x: module(x), numbers(2, channels, side, side, seed=8))


@pytest.mark.parametrize("crossings", [TINY.crossings, ("fc8",)], ids=["crossing", "own half"])
def test_gradient_of_fully_connected_layers(crossings: tuple[str, ...]) -> None:
    """Dense where the towers cross, grouped where they do not; by input, weight and bias."""
    module = WholeNetLayers(dataclasses.replace(TINY, crossings=crossings)).linear("fc6", 4, 3)
    generator = torch.Generator().manual_seed(9)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.1, 0.5, generator=generator)
    check(module, lambda module, x: module(x), numbers(4, 8, seed=10))


@pytest.mark.parametrize("kind", ["original", "inverted"])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_dropout(kind: str, training: bool) -> None:
    """Both kinds with a fixed mask, and in testing."""
    module = Dropout(dataclasses.replace(TINY, dropout_kind=kind), "fc6", ("a", "b")).train(training)
    check(module, lambda module, x: module(x, DropoutDraws(3, 4)), numbers(4, 14, seed=10))


WITH_BATCH_NORM = (
    ("batch_norm", "maxpool", "relu"),
    ("batch_norm", "maxpool", "tanh"),
    ("relu",),
    ("tanh",),
    ("maxpool", "relu"),
)


@pytest.mark.parametrize("names", [TINY.post_ops, WITH_BATCH_NORM], ids=["original", "batch norm"])
def test_gradient_of_the_whole_net(names: tuple[tuple[str, ...], ...]) -> None:
    """Both towers with all crossings and dropout: logits by the images and all parameters."""
    net = AlexNet(dataclasses.replace(TINY, post_ops=names), seed=11)
    draws = DropoutDraws(5, 6)
    check(net, lambda module, x: module(x, draws), numbers(2, 3, 31, 31, seed=12), fast=True)
