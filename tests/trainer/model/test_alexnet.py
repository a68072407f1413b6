"""The net against an independent one written with plain torch modules, and against the paper's counts."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.side_by_side import SideBySide, lone_tower
from trainer.config import LAYERS, TOWERS, load_config
from trainer.model.alexnet import AlexNet
from trainer.model.layers import Dropout, DropoutDraws, WholeNetLayers, post_ops, stable_seed
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
        assert sum(p.numel() for p in lone_tower(model, tower).parameters()) == to_dict(model)[f"parameters_{tower}"]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("digits", []),
        ("digits", ['model.crossings=["fc8"]']),
        ("digits", ['model.crossings=["fc6", "fc8"]', "model.hidden=[24, 40]", "model.activation=tanh"]),
        (
            "digits",
            ["model.pool_px=2", "model.pool_ceil=true", "model.paddings=[[2, 1], [2, 2], [0, 2], [1, 1], [1, 1]]"],
        ),
        ("original", ["model.classes=10"]),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_towers_side_by_side(name: str, overrides: list[str], training: bool) -> None:
    """float64, loss and every gradient against dense layers, a tower each; in training with dropout."""
    config = load_config(CONFIGS / f"{name}.toml", overrides)
    if name == "original" and not training:
        return  # once is enough: it takes seconds
    net = AlexNet(config.model, seed=3).double().to(memory_format=torch.channels_last).train(training)
    reference = SideBySide(net).train(training)
    side = config.model.image_px
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, config.model.in_channels, side, side, generator=generator, dtype=torch.float64) * 50
    labels, draws = torch.tensor([1, 3]), DropoutDraws(0, 0) if training else None
    ours, expected = net.loss(images, labels, draws), reference.loss(images, labels, draws)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
    ours.backward()
    expected.backward()
    gradients = net.split_towers({name: p.grad for name, p in net.named_parameters()})
    for key, gradient in reference.by_tower(gradients=True).items():
        tower, _, tensor = key.partition(".")
        assert gradient.norm() > 0, key
        assert (gradients[tower][tensor] - gradient).norm() <= 1e-10 * gradient.norm(), key


def test_weights_do_not_depend_on_who_holds_them() -> None:
    """A tower alone starts from the weights it has beside the other one."""
    model = load_config(CONFIGS / "digits.toml").model
    net = AlexNet(model, seed=4)
    both = net.split_towers(dict(net.named_parameters()))
    for tower in TOWERS:
        lone = dict(lone_tower(model, tower, 4).named_parameters())
        assert lone.keys() == both[tower].keys()
        for name, parameter in lone.items():
            assert torch.equal(parameter, both[tower][name]), name
    other = AlexNet(model, seed=5)
    assert not torch.equal(other.conv1.weight, net.conv1.weight)
    assert not torch.equal(both["a"]["conv1.weight"], both["b"]["conv1.weight"])


@pytest.mark.parametrize("layer", LAYERS)
def test_initial_weights_are_gaussian(layer: str) -> None:
    """Each tower's by itself: mean, deviation and the share within one deviation are the recipe's; biases exactly.

    n numbers, 200 or more, have them but for 1 / sqrt(n), 1 / sqrt(2 n) and 0.47 / sqrt(n); four times that is allowed.
    """
    std = "model.init_std=[0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08]"
    bias = "model.init_bias=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]"
    model = load_config(CONFIGS / "digits.toml", [std, bias]).model
    net = AlexNet(model, seed=1)
    for named in net.split_towers(net.state_dict()).values():
        if f"{layer}.weight" not in named:
            continue
        index = LAYERS.index(layer)
        assert named[f"{layer}.bias"].eq(model.init_bias[index]).all()
        x = named[f"{layer}.weight"].double() / model.init_std[index]
        bound = 4 / x.numel() ** 0.5
        assert abs(x.mean().item()) < bound
        assert x.std().item() == pytest.approx(1, abs=bound / 2**0.5)
        assert (x.abs() < 1).double().mean().item() == pytest.approx(0.683, abs=bound * 0.47)  # of uniform ones: 0.577


def test_no_two_initial_weights_are_alike() -> None:
    """Neither two towers', nor two layers', nor two seeds'."""
    model = load_config(CONFIGS / "digits.toml").model
    starts = [
        (tensor.flatten()[:100] / model.init_std[LAYERS.index(name.split(".")[0])]).tolist()
        for net in (AlexNet(model, seed=0), AlexNet(model, seed=1))
        for named in net.split_towers(net.state_dict()).values()
        for name, tensor in named.items()
        if name.endswith("weight")
    ]
    assert len(starts) == 2 * (8 + 7)
    for first, second in itertools.combinations(starts, 2):
        assert first != pytest.approx(second, rel=1e-3)


def test_dropout_masks_are_pure_and_differ() -> None:
    """The same step draws the same mask; another step, tower or layer another one; about half is kept."""
    like = torch.empty(64, 2048)
    mask = DropoutDraws(1, 7).mask("a", "fc6", like, 0.5)
    assert torch.equal(mask, DropoutDraws(1, 7).mask("a", "fc6", like, 0.5))
    for other in (
        DropoutDraws(1, 8).mask("a", "fc6", like, 0.5),
        DropoutDraws(2, 7).mask("a", "fc6", like, 0.5),
        DropoutDraws(1, 7, first=1).mask("a", "fc6", like, 0.5),
        DropoutDraws(1, 7).mask("b", "fc6", like, 0.5),
        DropoutDraws(1, 7).mask("a", "fc7", like, 0.5),
    ):
        assert 0.45 < (mask == other).float().mean() < 0.55
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert 0.49 < mask.mean() < 0.51


def test_a_piece_of_a_batch_has_its_rows_of_the_mask() -> None:
    """However a batch of 12 is shared, the pieces' masks are the whole's."""
    whole = DropoutDraws(1, 7).mask("b", "fc7", torch.empty(12, 50), 0.5)
    for size in (1, 2, 3, 12):
        like = torch.empty(size, 50)
        pieces = [DropoutDraws(1, 7, first).mask("b", "fc7", like, 0.5) for first in range(0, 12, size)]
        assert torch.equal(torch.cat(pieces), whole)


class _Elements(TorchDispatchMode):
    """Counts the elements of everything that torch computes."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        self.num += found.numel()
        return found


def test_a_replica_draws_its_own_rows_only() -> None:
    """Pair 63 of 64 computes as much as a pair alone: some passes over a random word for four units."""
    like, counts = torch.empty(128, 1000), []
    for first in (0, 63 * 128):
        with _Elements() as counted:
            DropoutDraws(1, 7, first).mask("a", "fc6", like, 0.5)
        counts.append(counted.num)
    assert counts[0] == counts[1] < 12 * like.numel()


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9, 0.99999])
def test_units_and_rows_are_dropped_by_themselves(rate: float) -> None:
    """Every unit at the rate asked for, whatever its neighbors, its row above and its place in a random word do."""
    mask = DropoutDraws(3, 5).mask("a", "fc6", torch.empty(2048, 512, dtype=torch.float64), rate)
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(mask.mean() - (1 - rate)) < 5 * deviation / mask.numel() ** 0.5 + 1 / 65536
    for lane in range(4):
        assert abs(mask[:, lane::4].mean() - (1 - rate)) < 5 * deviation / (mask.numel() / 4) ** 0.5 + 1 / 65536
    if rate < 0.99:
        centered = (mask - mask.mean()) / mask.std()
        for rows, units in ((0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (128, 0)):
            other = centered.roll((rows, units), (0, 1))
            assert abs((centered * other).mean()) < 5 / mask.numel() ** 0.5, (rows, units)


def test_the_mask_is_written_down() -> None:
    """The draws of a seed stay what they are: a run goes on with them on another machine, device or version."""
    mask = DropoutDraws(1, 7, first=5).mask("b", "fc7", torch.empty(2, 10), 0.5)
    assert mask.int().tolist() == MASK
    seed, first = stable_seed(1, 7, "b", "fc7"), 5 * 3  # 10 units are three words of four
    words = [_splitmix64(seed + (first + number) * 0x9E3779B97F4A7C15) for number in range(6)]
    lanes = [word >> 16 * lane & 0xFFFF for word in words for lane in range(4)]
    kept = [int((lane ^ 0x8000) >= 32768) for lane in lanes]  # int16 compares the upper half as negative
    assert [kept[:10], kept[12:22]] == MASK


MASK = [[1, 1, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 1, 0, 1]]  # rows 5 and 6


def _splitmix64(z: int) -> int:
    """Steele, Lea and Flood, 2014, figure 17, in Python's own numbers."""
    word = (1 << 64) - 1
    z &= word
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & word
    z = (z ^ z >> 27) * 0x94D049BB133111EB & word
    return z ^ z >> 31


@pytest.mark.parametrize("kind", ["original", "inverted"])
@pytest.mark.parametrize("layer", ["fc6", "fc7"])
def test_dropout_in_training_and_in_testing(kind: str, layer: str) -> None:
    """Averaged over many masks, a layer's output in training equals the one in testing, for both kinds."""
    config = load_config(CONFIGS / "digits.toml", [f"model.dropout_kind={kind}"]).model
    dropout = Dropout(config, layer, TOWERS)
    x = torch.randn(4, 2 * config.hidden[0])
    mean = torch.stack([dropout.train()(x, DropoutDraws(0, step)) for step in range(3000)]).mean(0)
    torch.testing.assert_close(mean, dropout.eval()(x, None), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("layer", ["fc6", "fc7"])
def test_training_drops_units_of_both_layers(layer: str) -> None:
    """In training about the recipe's share of what fc6 and fc7 hand on is zero, other units each step; none in testing.

    Seen where the next layer takes it in, so that no layer can be left out.
    """
    config = load_config(CONFIGS / "digits.toml", ["model.activation=tanh", "model.dropout=0.3"]).model
    net, seen = AlexNet(config, seed=0), []
    following = {"fc6": net.fc7, "fc7": net.fc8}[layer]
    following.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(16, 1, 28, 28)
    for step in (0, 1):
        net.train()(images, DropoutDraws(0, step))
    net.eval()(images)
    first, second, tested = ((x == 0) for x in seen)
    for dropped in (first, second):
        a, b = dropped.chunk(2, dim=1)  # each tower's own units
        assert all(0.25 < half.double().mean() < 0.35 for half in (a, b))
        assert not torch.equal(a, b)
    assert not torch.equal(first, second)
    assert not tested.any()


def test_the_loss_is_a_mean_over_the_batch() -> None:
    """A batch twice over has the loss and the gradients of the batch: neither is a sum."""
    config = load_config(CONFIGS / "digits.toml", ["model.dropout=0"]).model
    net = AlexNet(config, seed=0).double()
    images, labels = torch.randn(3, 1, 28, 28, dtype=torch.float64), torch.tensor([1, 2, 3])
    expected = -net(images).log_softmax(1)[torch.arange(3), labels].sum().item() / 3
    once, twice = net.loss(images, labels), net.loss(images.repeat(2, 1, 1, 1), labels.repeat(2))
    assert (once.item(), twice.item()) == (pytest.approx(expected, rel=1e-12), pytest.approx(expected, rel=1e-12))
    for ours, theirs in zip(
        *(torch.autograd.grad(loss, list(net.parameters())) for loss in (once, twice)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_training_without_draws_is_refused() -> None:
    """A net in training mode cannot guess what to drop; a net in testing mode needs no draws."""
    net = AlexNet(load_config(CONFIGS / "digits.toml").model)
    with pytest.raises(AssertionError, match="what to drop"):
        net(torch.randn(2, 1, 28, 28))
    assert net.eval()(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("relu", lambda x: x.clamp_min(0)),
        ("tanh", lambda x: 1 - 2 / ((2 * x).exp() + 1)),
        ("maxpool", lambda x: x.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))),
        ("batch_norm", lambda x: (x - x.mean((0, 2, 3), True)) / (x.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()),
    ],
)
def test_what_follows_a_layer_by_hand(word: str, expected: Callable[[Tensor], Tensor]) -> None:
    """Each operation by its formula, on numbers so small that batch normalization's epsilon is seen."""
    model = load_config(CONFIGS / "paper.toml", [f'model.post_ops=[["{word}"], [], [], [], ["relu", "maxpool"]]']).model
    x = torch.randn(2, 96, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.01
    torch.testing.assert_close(post_ops(model, 0, 2).double()(x.clone()), expected(x), rtol=1e-9, atol=1e-12)


def test_towers_do_not_talk_before_conv3() -> None:
    """Changing tower b's conv2 leaves what tower a sees untouched; through conv3 it reaches everything."""
    net = AlexNet(load_config(CONFIGS / "digits.toml").model, seed=1).eval()
    images = torch.randn(2, 1, 28, 28)

    def seen_by_a() -> Tensor:
        return net.post2(net.conv2(net.post1(net.conv1(images)))).chunk(2, dim=1)[0]

    with torch.no_grad():
        before, logits = seen_by_a(), net(images)
        net.split_towers(dict(net.named_parameters()))["b"]["conv2.weight"].mul_(1.5)
        assert torch.equal(seen_by_a(), before)
        assert not torch.allclose(net(images), logits)


def test_one_tower_and_no_crossings() -> None:
    """The half net and the ablation without crossings have inputs of their own half only."""
    half = load_config(CONFIGS / "digits.toml", ["model.towers=1"]).model
    net = AlexNet(half).eval()
    assert net.towers == WholeNetLayers(half).towers == ("a",)
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    alone = load_config(CONFIGS / "digits.toml", ['model.crossings=["fc8"]']).model
    assert AlexNet(alone).conv3.weight.shape[1] == alone.channels[1]
    assert lone_tower(alone, "b").conv3.weight.shape[1] == alone.channels[1]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_state_dict_of_one_tower_is_a_slice_of_the_whole(layer: str) -> None:
    """Rows of every weight and bias: tower a's first; fc8 is tower a's alone."""
    model = load_config(CONFIGS / "digits.toml").model
    whole = AlexNet(model, seed=2)
    tensors = whole.state_dict()
    for number, tower in enumerate(TOWERS):
        for name, tensor in lone_tower(model, tower, 2).state_dict().items():
            if name.startswith(layer):
                rows = len(tensor)
                assert torch.equal(tensor, tensors[name][number * rows : (number + 1) * rows]), name
