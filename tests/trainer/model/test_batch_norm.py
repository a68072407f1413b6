"""Batch normalization in the net of 2012: its parameters, what it computes, and its statistics in checkpoints."""

from pathlib import Path

import pytest
import torch

from tests.helpers.recipes import SMALL, a_batch, recipe
from tests.helpers.side_by_side import lone_tower
from trainer.config import LAYERS
from trainer.model.alexnet import AlexNet
from trainer.model.layers import DropoutDraws
from trainer.planning.describe import to_dict
from trainer.training import checkpoint
from trainer.training.optimizer import PaperSGD

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("one_thread")]


def test_batch_norm_parameters_are_counted_and_named() -> None:
    """scale and shift a map, undecayed; describe counts them; nothing more crosses than with response normalization."""
    model = recipe("batchnorm", *SMALL).model
    net = AlexNet(model)
    names = set(lone_tower(model, "b").state_dict())
    norms = {
        f"post{i}.batch_norm.{kind}" for i in range(1, 6) for kind in ("weight", "bias", "running_mean", "running_var")
    }
    assert names == norms | {f"{layer}.{kind}" for layer in LAYERS[:7] for kind in ("weight", "bias")}
    for tower in ("a", "b"):
        count = sum(p.numel() for p in lone_tower(model, tower).parameters())
        assert count == to_dict(model)[f"parameters_{tower}"]
    assert to_dict(recipe("batchnorm").model)["crossings"] == to_dict(recipe("paper").model)["crossings"]
    optimizer = PaperSGD(net.named_parameters(), recipe("batchnorm").optimizer)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for name, p in net.named_parameters() if name.endswith("weight") and "norm" not in name}


def test_batch_norm_trains_on_the_batch_and_tests_on_what_it_has_seen() -> None:
    """In training: mean 0 and deviation 1 a map over the batch. In testing: no image depends on its neighbors.

    float64; the deviation is 1 but for batch normalization's epsilon.
    """
    config = recipe(
        "batchnorm", *SMALL, "model.post_ops=[['batch_norm'], ['batch_norm', 'relu'], ['relu'], ['relu'], []]"
    )
    net = AlexNet(config.model, seed=1).double()
    images, labels = a_batch(config)
    images = images.double()
    net.loss(images, labels, DropoutDraws(0, 0))
    raw = net.conv1(images)  # (8, 12, 15, 15)
    maps = net.post1(raw)  # still in training
    assert maps.mean((0, 2, 3)).abs().max() < 1e-12
    ones = torch.ones(12, dtype=torch.float64)
    torch.testing.assert_close(maps.var((0, 2, 3), unbiased=False), ones, rtol=1e-4, atol=0)
    seen = 2  # twice above, a tenth each: 1 - 0.9^2 of the batch's mean
    wanted = (1 - 0.9**seen) * raw.mean((0, 2, 3))
    torch.testing.assert_close(net.post1.batch_norm.running_mean, wanted, rtol=1e-12, atol=1e-12)
    net.eval()
    with torch.no_grad():
        alone, together = net(images[:1]), net(images)[:1]
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)


def test_batch_norm_statistics_travel_in_checkpoints(tmp_path: Path) -> None:
    """Saved by two processes, read by one: the same logits to the bit; without them other ones."""
    config = recipe("batchnorm", *SMALL)
    trained = AlexNet(config.model, seed=1)
    images, labels = a_batch(config)
    for step in range(3):
        trained.loss(images, labels, DropoutDraws(0, step))
    unfinished = checkpoint.unfinished(tmp_path, 3)
    for tower in ("b", "a"):
        half = lone_tower(config.model, tower, 1)
        half.load_state_dict(trained.split_towers(trained.state_dict())[tower])
        checkpoint.save_towers(unfinished, half, PaperSGD(half.named_parameters(), config.optimizer))
    folder = checkpoint.commit(tmp_path, 3, config="c", loader={}, towers=("a", "b"))
    fresh = AlexNet(config.model, seed=1)
    trained.eval(), fresh.eval()
    with torch.no_grad():
        expected = trained(images)
        assert not torch.allclose(fresh(images), expected, rtol=1e-2)
        checkpoint.load_towers(folder, fresh, PaperSGD(fresh.named_parameters(), config.optimizer))
        assert torch.equal(fresh(images), expected)
