"""The net against an independent one written with plain torch modules, and against the paper's counts."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import load_config
from trainer.model.alexnet import DropoutDraws, TwoTowerNet
from trainer.planning.describe import count_crossings, count_layers, to_dict

pytestmark = pytest.mark.numeric

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def test_counts_of_the_paper() -> None:
    """Parameters, multiply-accumulates, neurons and crossing bytes of the published net, layer by layer."""
    model = load_config(CONFIGS / "paper.toml").model
    rows = {row.layer: (row.parameters_a, row.parameters_b, row.multiply_accumulates) for row in count_layers(model)}
    assert rows == {
        "conv1": (17_472, 17_472, 105_415_200),
        "conv2": (153_728, 153_728, 223_948_800),
        "conv3": (442_560, 442_560, 149_520_384),
        "conv4": (331_968, 331_968, 112_140_288),
        "conv5": (221_312, 221_312, 74_760_192),
        "fc6": (18_876_416, 18_876_416, 37_748_736),
        "fc7": (8_390_656, 8_390_656, 16_777_216),
        "fc8": (4_097_000, 0, 4_096_000),
    }
    facts = to_dict(model)
    assert (facts["parameters_a"], facts["parameters_b"]) == (32_531_112, 28_434_112)
    assert (facts["parameters"], facts["multiply_accumulates"]) == (60_965_224, 724_406_816)
    assert facts["neurons"] == 659_272
    crossings = {c.layer: (c.elements, c.bytes_a_to_b, c.bytes_b_to_a) for c in count_crossings(model)}
    assert crossings == {
        "conv3": (21_632, 86_528, 86_528),
        "fc6": (4_608, 18_432, 18_432),
        "fc7": (2_048, 8_192, 8_192),
        "fc8": (2_048, 0, 8_192),
    }
    assert facts["crossing_bytes_a_to_b"] + facts["crossing_bytes_b_to_a"] == 234_496


@pytest.mark.parametrize("name", ["digits", "paper"])
def test_parameters_of_the_module_equal_the_counts(name: str) -> None:
    """describe counts from the recipe; the module has exactly that many, tower by tower."""
    model = load_config(CONFIGS / f"{name}.toml").model
    for tower in ("a", "b"):
        net = TwoTowerNet(model, held=(tower,))
        assert sum(p.numel() for p in net.parameters()) == to_dict(model)[f"parameters_{tower}"]


def grouped_net(net: TwoTowerNet, images: Tensor) -> Tensor:
    """The paper's net as one net with grouped convolutions, written without trainer.model.alexnet.alexnet's code."""
    tensors = dict(net.named_parameters())
    c = net.config

    def both(layer: str, what: str) -> Tensor:
        return torch.cat((tensors[f"towers.a.{layer}.{what}"], tensors[f"towers.b.{layer}.{what}"]))

    def lrn(x: Tensor) -> Tensor:
        halves = x.chunk(2, dim=1)
        norm = nn.LocalResponseNorm(c.norm.size, alpha=c.norm.alpha * c.norm.size, beta=c.norm.beta, k=c.norm.k)
        return torch.cat([norm(half) for half in halves], dim=1)

    def conv(x: Tensor, layer: str, index: int, groups: int) -> Tensor:
        before, after = c.pads[index]
        x = functional.pad(x, (before, after, before, after))
        return functional.conv2d(x, both(layer, "weight"), both(layer, "bias"), stride=c.strides[index], groups=groups)

    def pool(x: Tensor) -> Tensor:
        return functional.max_pool2d(x, 3, 2)

    x = pool(lrn(conv(images, "conv1", 0, 1).relu()))
    x = pool(lrn(conv(x, "conv2", 1, 2).relu()))
    x = conv(x, "conv3", 2, 1).relu()
    x = conv(x, "conv4", 3, 2).relu()
    x = pool(conv(x, "conv5", 4, 2).relu())
    x = torch.cat([half.flatten(1) for half in x.chunk(2, dim=1)], dim=1)
    kept = 1.0 if c.dropout_kind == "inverted" else 1 - c.dropout
    x = functional.linear(x, both("fc6", "weight"), both("fc6", "bias")).relu() * kept
    x = functional.linear(x, both("fc7", "weight"), both("fc7", "bias")).relu() * kept
    return functional.linear(x, tensors["towers.a.fc8.weight"], tensors["towers.a.fc8.bias"])


@pytest.mark.parametrize("name", ["digits", "paper"])
def test_equals_a_grouped_net(name: str) -> None:
    """Logits on random pictures, float64; the grouped net is the usual way to write the two towers down."""
    config = load_config(CONFIGS / f"{name}.toml")
    net = TwoTowerNet(config.model, seed=3).double()
    side = config.model.image_px
    images = torch.randn(2, config.model.channels, side, side, dtype=torch.float64) * 50
    with torch.no_grad():
        expected = grouped_net(net, images)
        torch.testing.assert_close(net(images), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_weights_do_not_depend_on_who_holds_them() -> None:
    """A tower alone starts from the weights it has beside the other one."""
    model = load_config(CONFIGS / "digits.toml").model
    both = dict(TwoTowerNet(model, seed=4).named_parameters())
    for tower in ("a", "b"):
        for name, parameter in TwoTowerNet(model, held=(tower,), seed=4).named_parameters():
            assert torch.equal(parameter, both[name]), name
    other = dict(TwoTowerNet(model, seed=5).named_parameters())
    assert not torch.equal(other["towers.a.conv1.weight"], both["towers.a.conv1.weight"])
    assert not torch.equal(both["towers.a.conv1.weight"], both["towers.b.conv1.weight"])


def test_dropout_masks_are_pure_and_differ() -> None:
    """The same step draws the same mask; another step, tower or layer another one; about half is kept."""
    like = torch.empty(64, 2048)
    mask = DropoutDraws(1, 7).mask("a", "fc6", like, 0.5)
    assert torch.equal(mask, DropoutDraws(1, 7).mask("a", "fc6", like, 0.5))
    for other in (
        DropoutDraws(1, 8).mask("a", "fc6", like, 0.5),
        DropoutDraws(2, 7).mask("a", "fc6", like, 0.5),
        DropoutDraws(1, 7, first=1, total=len(like) + 1).mask("a", "fc6", like, 0.5),
        DropoutDraws(1, 7).mask("b", "fc6", like, 0.5),
        DropoutDraws(1, 7).mask("a", "fc7", like, 0.5),
    ):
        assert 0.45 < (mask == other).float().mean() < 0.55
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert 0.49 < mask.mean() < 0.51


def test_a_piece_of_a_batch_has_its_rows_of_the_mask() -> None:
    """However a batch of 12 is shared, the pieces' masks are the whole's."""
    whole = DropoutDraws(1, 7).mask("b", "fc7", torch.empty(12, 50), 0.5)
    for size in (2, 3, 12):
        like = torch.empty(size, 50)
        pieces = [DropoutDraws(1, 7, first, 12).mask("b", "fc7", like, 0.5) for first in range(0, 12, size)]
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("kind", ["original", "inverted"])
def test_expected_output_of_dropout_is_the_tested_one(kind: str) -> None:
    """Averaged over many masks, fc7's input in training equals the one in testing, for both kinds."""
    config = load_config(CONFIGS / "digits.toml", [f"model.dropout_kind={kind}"])
    layer = TwoTowerNet(config.model, seed=0).towers["a"].fc6
    x = torch.randn(4, layer.weight.shape[1])
    with torch.no_grad():
        mean = torch.stack([layer(x, DropoutDraws(0, step)) for step in range(3000)]).mean(0)
        torch.testing.assert_close(mean, layer(x, None), rtol=0.1, atol=0.02)


def test_towers_do_not_talk_before_conv3() -> None:
    """Changing tower b's conv2 leaves what tower a sees untouched; through conv3 it reaches everything."""
    model = load_config(CONFIGS / "digits.toml").model
    net = TwoTowerNet(model, seed=1)
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        before, logits = net.towers["a"].see(images), net(images)
        net.towers["b"].conv2.weight.mul_(1.5)
        assert torch.equal(net.towers["a"].see(images), before)
        assert not torch.allclose(net(images), logits)


def test_one_tower_and_no_crossings() -> None:
    """The half net and the ablation without crossings have inputs of their own half only."""
    half = load_config(CONFIGS / "digits.toml", ["model.towers=1"]).model
    net = TwoTowerNet(half)
    assert net.held == ("a",)
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    alone = load_config(CONFIGS / "digits.toml", ['model.crossings=["fc8"]']).model
    assert TwoTowerNet(alone).towers["b"].conv3.weight.shape[1] == alone.maps[1]
