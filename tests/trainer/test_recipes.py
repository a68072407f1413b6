"""The recipes against the facts of 2012, and the paper's ablations: values that build, train and matter."""

import dataclasses
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.loader.augmentation import Augmentation
from trainer.config import Config, load_config
from trainer.model.alexnet import DropoutDraws, TwoTowerNet
from trainer.planning.describe import to_dict
from trainer.training import checkpoint
from trainer.training.optimizer import PaperSGD, rates_at

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OF_2012 = ("paper", "original", "handsoff", "half", "batchnorm")
# The recipe's structure at a size for tests: 67 px give maps of 15, 7, 3 and 1 px; louder weights, no decay.
SMALL = (
    "model.image_px=67",
    "data.crop_px=67",
    "model.classes=10",
    "model.maps=[6, 8, 8, 8, 8]",
    "model.units=16",
    "model.init_std=[0.05, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2]",
    "optimizer.weight_decay=0",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Nets this small are quicker with one thread, by far on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.toml", overrides)


def ablations() -> list[tuple[str, list[str]]]:
    """Name and overrides of every row of the ablation table in configs/README.md."""
    rows = re.findall(r"^\| ([^|]+?) \| `(--set .+?)` \|", (CONFIGS / "README.md").read_text(), flags=re.MULTILINE)
    return [(name, [word for word in shlex.split(words) if word != "--set"]) for name, words in rows]


ABLATIONS = ablations()


def a_batch(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight mean-subtracted pictures of noise that differ in contrast, and labels."""
    generator = torch.Generator().manual_seed(1)
    side = config.model.image_px
    images = torch.randn(8, config.model.channels, side, side, generator=generator)
    return images * torch.linspace(20, 80, 8).view(8, 1, 1, 1), torch.arange(8) % config.model.classes


@functools.cache
def two_steps(config: Config) -> dict[str, torch.Tensor]:
    """Trains two steps. Returns the logits before and after, tested; checks that every parameter has learnt."""
    net = TwoTowerNet(config.model, seed=3)
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    images, labels = a_batch(config)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with torch.no_grad():
        logits = {"before": net(images)}
    for step in range(2):
        optimizer.zero_grad()
        net.loss(images, labels, DropoutDraws(0, step)).backward()
        optimizer.set_rates(rates_at(config.optimizer, step / 10, epochs=config.train.epochs))
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if name.endswith("bias") and name.replace("bias", "scale") in before:
            continue  # batch norm subtracts what such a bias adds, so its gradient is zero
        assert not torch.equal(parameter, before[name]), f"{name} has no gradient"
    with torch.no_grad():
        return logits | {"after": net(images)}


def test_the_table_of_ablations_is_read() -> None:
    """Every switch that the paper's text has is there."""
    names = {name for name, _ in ABLATIONS}
    assert len(names) == len(ABLATIONS) == 11
    assert {"no response normalisation", "pooling without overlap", "no crossings but fc8's"} <= names
    assert {"tanh instead of ReLU", "no dropout", "no colour shift", "one tower", "batch normalisation"} <= names


@pytest.mark.parametrize(("name", "overrides"), ABLATIONS, ids=[name for name, _ in ABLATIONS])
def test_ablation_builds_trains_and_differs(name: str, overrides: list[str]) -> None:
    """Its outputs differ from the recipe's before and after two steps; an ablation of the data changes the draws."""
    base, ablated = recipe("original", *SMALL), recipe("original", *SMALL, *overrides)
    assert base != ablated
    if base.model == ablated.model:
        differences = [not np.array_equal(colour_of(base, epoch), colour_of(ablated, epoch)) for epoch in (0, 70)]
        assert differences == [ablated.data.colour == "none", ablated.data.colour != "none"]
        return
    ours, theirs = two_steps(base), two_steps(ablated)
    for when in ("before", "after"):
        difference = (ours[when] - theirs[when]).norm() / ours[when].norm()
        assert difference > 1e-3, f"{name}: logits {when} training are the recipe's"


def colour_of(config: Config, epoch: int) -> np.ndarray:
    """Colour shifts of an epoch's first pictures, for made-up statistics."""
    steps = np.diag([12.0, 4.0, 2.0]) if config.data.colour != "none" else np.zeros((3, 3))
    return Augmentation(config.data, seed=1, height_px=256, width_px=256, steps=steps).draw(epoch, 0, 8).shift


def test_facts_of_run_145() -> None:
    """configs/original.toml, value for value, as the program's layer files have it; the loader's part included."""
    config = recipe("original")
    model, data, train = config.model, config.data, config.train
    assert model.after == ("norm pool relu", "relu norm spatial_norm pool", "relu", "relu", "pool relu")
    assert model.init_std == (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01)
    assert model.init_bias == (0, 1, 0, 1, 1, 1, 1, 0)
    assert (model.norm.size * model.norm.alpha, model.norm.k, model.norm.beta) == (pytest.approx(1e-4), 2, 0.75)
    assert (25 * model.norm.spatial_alpha, model.norm.spatial_size) == (pytest.approx(1e-3), 5)
    assert (model.pads[0], model.dropout, model.dropout_kind) == ((0, 3), 0.5, "original")
    assert (data.crop_px, data.crop_shared_by, data.mean, data.divisor) == (224, 32, "centre", 1.1)
    assert (data.colour, data.colour_sigma, data.colour_off_epoch, data.scale) == ("deviation", 0.1, 67, "255")
    assert (train.epochs, train.batch_size) == (91, 128)
    assert (config.optimizer.momentum, config.optimizer.weight_decay) == (0.9, 0.0005)
    assert not config.optimizer.decay_biases
    facts = to_dict(model)
    assert (facts["parameters"], facts["multiply_accumulates"]) == (60_965_224, 724_406_816)


@pytest.mark.parametrize(
    ("name", "epochs", "expected"),
    [
        # weights, biases and conv1 at the start of a few epochs, by hand from the logs' schedules
        ("original", 91, {0: (1e-2, 2e-2, None), 25: (1e-3, 2e-3, None), 67: (1e-4, 2e-4, 1e-5), 90: (1e-5, 2e-5, 0)}),
        ("handsoff", 95, {23: (1e-2, 2e-2, None), 24: (1.5874e-3, 2e-2, None), 48: (2.5198e-4, 2e-3, None)}),
        ("handsoff", 95, {73: (4e-5, 2e-3, None), 74: (4e-5, 2e-3, 0)}),
        ("half", 91, {51: (1e-4, 2e-4, None), 79: (1e-5, 2e-5, 0)}),
        ("batchnorm", 95, {0: (1e-2, 2e-2, None), 94: (4e-5, 8e-5, None)}),
        ("paper", 90, {0: (1e-2, 1e-2, None), 89: (1e-2, 1e-2, None)}),
    ],
)
def test_rates_of_the_recipes(name: str, epochs: int, expected: dict[int, tuple[float, float, float | None]]) -> None:
    """The recipes' schedules; the paper's waits for the validation error."""
    config = recipe(name)
    assert config.train.epochs == epochs
    for epoch, (weights, biases, conv1) in expected.items():
        rates = rates_at(config.optimizer, float(epoch), epochs=epochs)
        assert (rates.weights, rates.biases) == (pytest.approx(weights, rel=1e-4), pytest.approx(biases, rel=1e-4))
        assert rates.layers.get("conv1") == conv1
    if name == "paper":
        dropped = [rates_at(config.optimizer, 1.0, epochs=epochs, plateaus=n).weights for n in range(4)]
        assert dropped == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5])


def test_hands_off_is_the_same_net() -> None:
    """Run #170 differs from run #145 in its schedule only."""
    ours, theirs = recipe("handsoff"), recipe("original")
    assert ours.model == theirs.model
    assert dataclasses.replace(ours.data, colour_off_epoch=67) == theirs.data


def test_half_net() -> None:
    """48-128-192-192-256, 4096 units, one tower; its parameters by hand are about those of both towers."""
    model = recipe("half").model
    assert (model.maps, model.units, model.towers) == ((48, 128, 192, 192, 256), 4096, 1)
    by_hand = [48 * 363, 128 * 1200, 192 * 1152, 192 * 1728, 256 * 1728, 4096 * 9216, 4096 * 4096, 1000 * 4096]
    facts = to_dict(model)
    assert facts["parameters"] == sum(by_hand) + 48 + 128 + 192 + 192 + 256 + 4096 + 4096 + 1000
    assert facts["parameters_b"] == 0
    assert facts["crossings"] == []


@pytest.mark.parametrize("name", OF_2012)
def test_large_recipes_say_that_nothing_was_measured(name: str) -> None:
    """Nobody may take the paper's figures for this project's."""
    header = (CONFIGS / f"{name}.toml").read_text().split("[model]")[0]
    assert re.search(r"not run here|not measured", header)
    assert re.search(r"not this project's|not of this project|from others", header)


def test_batch_norm_parameters_are_counted_and_named() -> None:
    """scale and shift a map, undecayed; describe counts them; nothing more crosses than with response normalisation."""
    model = recipe("batchnorm", *SMALL).model
    net = TwoTowerNet(model)
    names = {name for name, _ in net.tower("b").named_parameters()}
    assert {f"conv{i}.{kind}" for i in range(1, 6) for kind in ("weight", "bias", "scale", "shift")} <= names
    for tower in ("a", "b"):
        assert sum(p.numel() for p in net.tower(tower).parameters()) == to_dict(model)[f"parameters_{tower}"]
    assert to_dict(recipe("batchnorm").model)["crossings"] == to_dict(recipe("paper").model)["crossings"]
    optimizer = PaperSGD(net.named_parameters(), recipe("batchnorm").optimizer)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for name, p in net.named_parameters() if name.endswith("weight")}


def test_batch_norm_trains_on_the_batch_and_tests_on_what_it_has_seen() -> None:
    """In training: mean 0 and deviation 1 a map over the batch. In testing: no picture depends on its neighbours."""
    config = recipe("batchnorm", *SMALL, "model.after=['batch_norm', 'batch_norm relu', 'relu', 'relu', '']")
    net = TwoTowerNet(config.model, seed=1)
    images, labels = a_batch(config)
    net.loss(images, labels, DropoutDraws(0, 0))
    maps = net.tower("a").conv1(images)  # (8, 6, 15, 15), still in training
    assert maps.mean((0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(maps.var((0, 2, 3), unbiased=False), torch.ones(6), rtol=1e-4, atol=0)
    raw = net.tower("a").conv1.convolve(images, net.tower("a").conv1.weight, net.tower("a").conv1.bias)
    seen = 2  # twice above, a tenth each: 1 - 0.9^2 of the batch's mean
    torch.testing.assert_close(net.tower("a").conv1.running_mean, (1 - 0.9**seen) * raw.mean((0, 2, 3)))
    with torch.no_grad():
        alone, together = net(images[:1]), net(images)[:1]
    torch.testing.assert_close(alone, together)


def test_batch_norm_statistics_travel_in_checkpoints(tmp_path: Path) -> None:
    """Saved by two processes, read by one: the same logits to the bit; without them other ones."""
    config = recipe("batchnorm", *SMALL)
    trained = TwoTowerNet(config.model, seed=1)
    images, labels = a_batch(config)
    for step in range(3):
        trained.loss(images, labels, DropoutDraws(0, step))
    unfinished = checkpoint.unfinished(tmp_path, 3)
    for tower in ("b", "a"):
        half = TwoTowerNet(config.model, held=(tower,), seed=1)
        half.tower(tower).load_state_dict(trained.tower(tower).state_dict())
        checkpoint.save_towers(unfinished, half, PaperSGD(half.named_parameters(), config.optimizer))
    folder = checkpoint.commit(tmp_path, 3, config="c", loader={}, towers=("a", "b"))
    fresh = TwoTowerNet(config.model, seed=1)
    with torch.no_grad():
        expected = trained(images)
        assert not torch.allclose(fresh(images), expected, rtol=1e-2)
        checkpoint.load_towers(folder, fresh, PaperSGD(fresh.named_parameters(), config.optimizer))
        assert torch.equal(fresh(images), expected)
