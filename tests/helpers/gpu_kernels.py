"""The GPU's kernels against formulas in float64, on any device: run by Triton's interpreter on a CPU, and by a GPU."""

import itertools
import math
import unittest.mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.torch_kernels import places_of
from trainer.config import TOWERS, ModelConfig, OptimizerConfig
from trainer.model import kernels
from trainer.model.gpu_layers import fresh_copy, join, to_blocks
from trainer.model.kernels.interface import Blocks, GpuKernels, Member, Norm, Parts, Pool, TowerMaps
from trainer.model.layers import Dropout, DropoutDraws, post_ops
from trainer.model.response_norm import _KernelResponseNorm, response_norm
from trainer.parallel.weird_trick import HalfDropout
from trainer.training.optimizer import PaperSGD

CONSTANTS = {"alpha": 0.2, "beta": 0.75, "k": 2.0}
DTYPES = ((torch.float32, 2e-6), (torch.bfloat16, 2**-7))  # and the size of a rounding step, with room


def maps(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Noise, channels_last."""
    return (torch.randn(shape, device=device) * 3).to(dtype).to(memory_format=torch.channels_last)


def cut(x: Tensor, parts: int) -> Parts:
    """Towers apart, channels_last."""
    return tuple(part.contiguous(memory_format=torch.channels_last) for part in x.chunk(parts, dim=1))


def tower_maps(x: Tensor, parts: int, *, has_bias: bool) -> TowerMaps:
    """x in parts, with biases that are whole numbers, some below zero and some zero."""
    bias = (torch.randn(x.shape[1], device=x.device) * 2).round() if has_bias else None
    return TowerMaps(cut(x, parts), bias)


def exact_maps(maps: TowerMaps) -> tuple[Tensor, Tensor, Tensor]:
    """The maps and their biases in float64, as leaves, and their sum."""
    x = torch.cat(maps.parts, 1).detach().double().contiguous().requires_grad_()
    bias = torch.zeros(x.shape[1], device=x.device) if maps.bias is None else maps.bias.detach()
    leaf = bias.double().requires_grad_()
    return x, leaf, x + leaf[:, None, None]


def check_changes(
    changes: tuple[Parts, Tensor | None], maps: TowerMaps, leaves: tuple[Tensor, ...], step: float
) -> None:
    """Gradients to the maps, in their parts, and to the bias."""
    parts, of_bias = changes
    assert [part.shape for part in parts] == [part.shape for part in maps.parts]
    torch.testing.assert_close(torch.cat(parts, 1).double(), leaves[0].grad, rtol=step, atol=8 * step)
    assert (of_bias is None) == (maps.bias is None)
    if of_bias is not None:  # summed before anything is rounded to bfloat16
        assert of_bias.dtype == torch.float32
        scale = leaves[0].grad.abs().sum((0, 2, 3)).max().item()
        torch.testing.assert_close(of_bias.double(), leaves[1].grad, rtol=1e-5, atol=1e-5 * scale)


def norm_by_formula(x: Tensor, size: int, channels: int, rectify: bool) -> tuple[Tensor, Tensor]:
    """x in float64 as a leaf, and its normalization by torch operations."""
    exact = x.detach().double().contiguous().requires_grad_()
    rectified = exact.relu() if rectify else exact
    return exact, response_norm(rectified, size=size, maps=channels, **CONSTANTS)


def check_norm(functions: GpuKernels, device: str) -> None:
    """Values and gradients of all sizes and dtypes; groups of 1, 2, 4 and 8 channels, rows wider than a warp."""
    cases = [  # all maps, a tower's, window
        *((18, 9, 3), (16, 8, 5), (24, 12, 7), (4, 2, 5), (66, 33, 5)),
        *(((18, 9, 7), (96, 48, 5), (256, 128, 5), (600, 300, 3)) if device != "cpu" else ()),
    ]
    for number, (all_maps, channels, size) in enumerate(cases):
        for (dtype, step), rectify in itertools.product(DTYPES, (False, True)):
            if device == "cpu" and number > 1 and rectify != (dtype == torch.bfloat16):
                continue  # Triton's interpreter takes its time
            x = maps((1, all_maps, 3, 5) if device == "cpu" else (3, all_maps, 5, 7), dtype, device).requires_grad_()
            g = torch.randn_like(x)
            norm = Norm(x.numel() // channels, channels, size, CONSTANTS["alpha"], CONSTANTS["k"], rectify)
            y = _KernelResponseNorm.apply(x, norm, functions)
            y.backward(g)
            exact, wanted = norm_by_formula(x, size, channels, rectify)
            wanted.backward(g.double())
            torch.testing.assert_close(y.double(), wanted, rtol=step, atol=step)
            torch.testing.assert_close(x.grad.double(), exact.grad, rtol=step, atol=4 * step)


def check_not_finite(functions: GpuKernels, device: str) -> None:
    """NaN comes out where it goes in and beside it, and nowhere else; pooling passes it on, and its gradient to it."""
    for place, rectify in ((5, False), (0, True), (11, True)):
        x = torch.randn(1, 12, 2, 2, device=device).to(memory_format=torch.channels_last)
        x[0, place, 1, 1] = float("nan")
        y = functions.norm_forward(x, Norm(4, 12, 5, 0.2, 2.0, rectify))
        reached = [channel for channel in range(place - 2, place + 3) if 0 <= channel < 12]
        assert [index[1] for index in y.isnan().nonzero().tolist()] == reached
    for bad in (float("nan"), float("inf")):
        x = maps((2, 4, 5, 5), torch.float32, device)
        x[0, 3, 2, 2] = bad
        x[1] = float("-inf")
        (y,), (place,) = functions.pool_forward(TowerMaps((x,)), Pool(3, 2, ceil=False), 1)
        wanted, indices = functional.max_pool2d(x, 3, 2, return_indices=True)
        torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(places_of(indices, 5, Pool(3, 2, ceil=False)), place.long())


def check_pool(functions: GpuKernels, device: str) -> None:
    """Maxima and gradients against torch in float64: odd sizes, ceil mode, no overlap, many ties, with a ReLU.

    Towers apart or together, before and after; with biases and without.
    """
    three = [Pool(3, 2, ceil, rectify) for ceil in (False, True) for rectify in (False, True)]
    others = [Pool(2, 2, ceil=True), Pool(4, 3, ceil=True), Pool(3, 1, ceil=False), Pool(1, 1, ceil=False)]
    shapes = ((2, 16, 13, 11), (1, 6, 7, 8), (3, 10, 6, 6))
    ways = ((1, 1, False), (1, 2, True), (2, 1, True), (2, 2, True))
    cases = list(itertools.product(DTYPES, shapes, [*three, *others], ways))
    if device == "cpu":  # Triton's interpreter takes its time
        cases = [
            *zip(DTYPES[1:] * 3, shapes[1:2] * 3, three[:3], ways[1:], strict=True),
            *zip(DTYPES[:1] * 3, ((1, 10, 6, 6),) * 3, [three[3], *others[:2]], ways[:3], strict=True),
            (DTYPES[1], (1, 16, 5, 4), three[1], ways[2]),
        ]
    for (dtype, step), shape, pool, (before, after, has_bias) in cases:
        maps_in = tower_maps(maps(shape, dtype, device).round(), before, has_bias=has_bias)  # values tie
        ys, places = functions.pool_forward(maps_in, pool, after)
        *leaves, exact = exact_maps(maps_in)
        wanted = functional.max_pool2d(
            exact.relu() if pool.rectify else exact, pool.px, pool.stride, ceil_mode=pool.ceil
        )
        assert len(ys) == after and torch.equal(torch.cat(ys, 1).double(), wanted)
        g = maps(tuple(wanted.shape), dtype, device)
        wanted.backward(g.double())
        found = functions.pool_backward(cut(g, after), places, maps_in.layout, pool)
        check_changes(found, maps_in, tuple(leaves), step)


def check_relu(functions: GpuKernels, device: str) -> None:
    """Values and gradients; what is 0 with its bias passes none. On a GPU programs have several tiles, too."""
    sizes = ((2, 6, 5, 3), (1, 12, 4, 3)) if device == "cpu" else ((3, 48, 13, 11), (2, 384, 13, 13), (40, 6, 61, 61))
    for shape, (dtype, step), (before, after) in itertools.product(sizes, DTYPES, ((1, 2), (2, 2), (2, 1))):
        maps_in = tower_maps(maps(shape, dtype, device).round(), before, has_bias=before != after or shape[0] > 1)
        ys = functions.relu_forward(maps_in, after)
        *leaves, exact = exact_maps(maps_in)
        assert len(ys) == after and torch.equal(torch.cat(ys, 1).double(), exact.relu())
        g = maps(shape, dtype, device)
        exact.relu().backward(g.double())
        check_changes(functions.relu_backward(ys, cut(g, after), maps_in.layout), maps_in, tuple(leaves), step)


def check_pooled_norm(functions: GpuKernels, device: str) -> None:
    """The gradient through pooling and normalization in one pass: two towers, odd sides, with a ReLU and without."""
    cases = (
        (DTYPES[0], (2, 16, 7, 5), 8, Pool(3, 2, ceil=False), False, (1, 2)),
        (DTYPES[1], (1, 16, 6, 5), 8, Pool(3, 2, ceil=True), True, (2, 1)),
        (DTYPES[0], (1, 10, 5, 4), 5, Pool(2, 2, ceil=False, rectify=True), True, (2, 2)),
        *(() if device == "cpu" else ((DTYPES[1], (16, 96, 55, 55), 48, Pool(3, 2, ceil=False), True, (1, 2)),)),
    )
    for (dtype, step), shape, channels, pool, rectify, (before, after) in cases:
        maps_in = tower_maps(maps(shape, dtype, device), before, has_bias=rectify)
        norm = Norm(math.prod(shape) // channels, channels, 5, CONSTANTS["alpha"], CONSTANTS["k"], rectify)
        *leaves, exact = exact_maps(maps_in)
        normalized = functions.norm_maps(maps_in, norm)
        wanted = response_norm(exact.relu() if rectify else exact, size=5, maps=channels, **CONSTANTS)
        torch.testing.assert_close(normalized.double(), wanted, rtol=step, atol=step)
        ys, places = functions.pool_forward(TowerMaps((normalized,)), pool, after)
        g = maps((shape[0], shape[1], *ys[0].shape[2:]), dtype, device)
        # the same places are taken, also where bfloat16 has made two values alike
        layout = TowerMaps((normalized,)).layout
        ((slopes,), _) = functions.pool_backward(cut(g.float(), after), places, layout, pool)
        wanted.backward(slopes.double().contiguous())
        found = functions.pooled_norm_backward(maps_in, cut(g, after), places, norm, pool)
        check_changes(found, maps_in, tuple(leaves), step)


def check_update(functions: GpuKernels, device: str) -> None:
    """One tensor against the formula; guards of 0 and 1."""
    for guard in (None, 1.0, 0.0):
        w, v, g = torch.randn(3, 2500, device=device)
        flag = None if guard is None else torch.tensor(guard, device=device)
        velocity = v if guard == 0.0 else 0.9 * v - 0.005 * w - 0.1 * g
        weights = w if guard == 0.0 else w + velocity
        ours = w.clone(), v.clone()
        functions.update(*ours, g, (0.9, 0.005, 0.1), flag)
        torch.testing.assert_close(ours[0], weights)
        torch.testing.assert_close(ours[1], velocity)


def check_update_all(functions: GpuKernels, device: str) -> None:
    """All in one launch, to the bit as one by one: moved gradients, dropped rates, guards, odd counts, no copy."""
    update = functions.make_update(torch.device(device))
    counts = (1, 7, 1024, 2051)
    tensors = [tuple(torch.randn(count, device=device) for _ in range(3)) for count in counts]
    lows = [torch.zeros(count, dtype=torch.bfloat16, device=device) if count != 7 else None for count in counts]
    for step, guard in enumerate((None, 1.0, 0.0, None)):
        factors = [(0.9, 0.005 * number, 0.1 / (step // 2 + 1)) for number in range(len(counts))]
        flag = None if guard is None else torch.tensor(guard, device=device)
        gradients = [
            torch.randn(math.prod(w.shape) + step, device=device)[step:] for w, *_ in tensors
        ]  # unaligned, too
        wanted = [(w.clone(), v.clone()) for w, v, _ in tensors]
        for (w, v), g, row in zip(wanted, gradients, factors, strict=True):
            functions.update(w, v, g.clone(), row, flag)
        rows = zip(tensors, gradients, lows, factors, strict=True)
        members = [Member(w, v, g, low, row) for (w, v, _), g, low, row in rows]
        update.send(members)
        update(members, flag)
        for (w, v, _), (exact_w, exact_v), low in zip(tensors, wanted, lows, strict=True):
            assert torch.equal(w, exact_w) and torch.equal(v, exact_v)
            if low is not None and guard != 0.0:  # the interpreter cuts off where a GPU rounds
                torch.testing.assert_close(low, w.bfloat16(), rtol=2**-7 if device == "cpu" else 0, atol=0)


def check_blocks(functions: GpuKernels, device: str) -> None:
    """Cut into blocks and back, to the bit as torch does it: odd sides and channels, zeros, lines that are left out."""
    cases = [  # shape, blocks
        ((2, 3, 13, 16), Blocks(4, 0, 4, 5)),
        ((1, 3, 19, 16), Blocks(4, 2, 5, 6)),
        ((2, 1, 7, 9), Blocks(3, 1, 2, 3)),
        ((1, 4, 9, 6), Blocks(2, 0, 4, 4)),
        ((5, 3, 11, 11), Blocks(4, 0, 3, 3)),  # a weight
        ((1, 2, 5, 3), Blocks(5, 3, 3, 1)),
        *([((3, 3, 224, 224), Blocks(4, 0, 57, 57)), ((1, 3, 40, 2000), Blocks(4, 1, 11, 501))] * (device != "cpu")),
    ]
    for (shape, blocks), (dtype, _) in itertools.product(cases, DTYPES):
        images, g, found = maps(shape, dtype, device), None, []
        for on in (lambda _: None, lambda _: functions):
            x = images.clone(memory_format=torch.preserve_format).requires_grad_()
            with unittest.mock.patch.object(kernels, "on_gpu", on):
                y = to_blocks(x, blocks)
            assert y.is_contiguous(memory_format=torch.channels_last)
            g = torch.randn_like(y) if g is None else g
            y.backward(g)
            found.append((y.detach(), x.grad))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True)), (shape, blocks)


def check_dropout(functions: GpuKernels, device: str) -> None:
    """ReLU and dropout in one pass: to the bit the torch operations, and their gradient, whatever the mask's shape."""
    cases = [  # rows, units, dropout, towers, first row, dtype; the last: half of the units of a tower, for a worker
        (3, 32, {"dropout": 0.5}, TOWERS, 5, torch.bfloat16),
        (1, 40, {"dropout": 0.3, "dropout_kind": "inverted"}, TOWERS, 0, torch.float32),
        (5, 14, {"dropout": 0.99999}, TOWERS, 2, torch.float32),
        (4, 10, {"dropout": 0.5, "dropout_kind": "inverted"}, ("b",), 1, torch.bfloat16),
        (6, 7, {"dropout": 0.1}, ("a",), 2**20, torch.bfloat16),
        (3, 12, {"dropout": 0.5}, (), 4, torch.bfloat16),
        *([(129, 4096, {"dropout": 0.5}, TOWERS, 128, dtype) for dtype, _ in DTYPES] if device != "cpu" else ()),
    ]
    for rows, units, fields, towers, first, dtype in cases:
        config = ModelConfig(**fields)
        modules = (
            [Dropout(config, "fc6", towers, "relu")] if towers else [HalfDropout(config, "fc6", w) for w in TOWERS]
        )
        starts = {key: DropoutDraws(3, 9).start(*key) for key in itertools.product(towers or ("a",), ("fc6",))}
        numbers = torch.tensor([0, *starts.values()], device=device)[1:].unbind()
        for module, kept in itertools.product(modules, (None, dict(zip(starts, numbers, strict=True)))):
            draws = DropoutDraws(3, 9, first=first, starts=kept)
            images, g, found = maps((rows, units, 1, 1), dtype, device)[..., 0, 0], None, []
            for on in (lambda _: None, lambda _: functions):
                x = images.clone().requires_grad_()
                with unittest.mock.patch.object(kernels, "on_gpu", on):
                    y = module(x * 1, draws)
                g = torch.randn_like(y) if g is None else g
                y.backward(g)
                found.append((y.detach(), x.grad))
            for plain, ours in zip(*found, strict=True):
                step = 2**-7 if dtype == torch.bfloat16 else 2e-7  # divided, or multiplied by the reciprocal
                torch.testing.assert_close(ours, plain, rtol=step if module.inverted else 0, atol=0)
                assert torch.equal(ours != 0, plain != 0)
            of_processor = module(images.cpu() * 1, DropoutDraws(3, 9, first=first))
            assert torch.equal(found[1][0].cpu() != 0, of_processor != 0)


def check_layers(functions: GpuKernels, device: str) -> None:
    """What follows the convolutions, and the optimizer: they take the kernels, and equal what they do without them."""
    images, low, bias = maps((1, 16, 5, 4), torch.float32, device), {}, torch.randn(16, device=device)
    for names in (("relu", "lrn", "maxpool"), ("maxpool", "relu"), ("tanh", "maxpool"), ("relu",)):
        config = ModelConfig(channels=(8,) * 5, post_ops=(names, (), (), (), ("relu",)), image_px=200)
        found = []
        for on in (lambda _: None, lambda _: functions):
            with unittest.mock.patch.object(kernels, "on_gpu", on), unittest.mock.patch.object(kernels, "of", on):
                x = images.clone(memory_format=torch.preserve_format).requires_grad_()
                leaf = bias.clone().requires_grad_()
                y = join(post_ops(config, 0, 2).to(device)(TowerMaps((x * 1.0,), leaf)))
                y.backward(torch.ones_like(y))
                found.append((y.detach(), x.grad, leaf.grad))
        for plain, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    net = nn.Sequential(nn.Conv2d(4, 3, 3), nn.Linear(5, 6)).to(device, memory_format=torch.channels_last)
    with unittest.mock.patch.object(kernels, "on_gpu", lambda _: functions):
        optimizer = PaperSGD(net.named_parameters(), OptimizerConfig())
        for step in range(2):
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter)
                low[parameter] = fresh_copy(parameter)
            optimizer.step()
            for parameter, copy in low.items():  # written by the update: not made anew
                assert fresh_copy(parameter) is copy, step
                step_size = 2**-7 if device == "cpu" else 0  # the interpreter cuts off where a GPU rounds
                torch.testing.assert_close(copy.float(), parameter.bfloat16().float(), rtol=step_size, atol=0)


CHECKS = (
    check_blocks,
    check_dropout,
    check_layers,
    check_norm,
    check_not_finite,
    check_pool,
    check_pooled_norm,
    check_relu,
    check_update,
    check_update_all,
)
