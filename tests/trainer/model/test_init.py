"""Initial weights that follow a layer's size, whoever holds it; and layers whose statistics stand still."""

import pytest
import torch

from tests.helpers.recipes import recipe
from tests.helpers.side_by_side import lone_tower
from trainer.model.alexnet import AlexNet
from trainer.model.layers import BatchNorm2d, freeze_statistics

HE = ("model.classes=10", "model.in_channels=3", "model.hidden=[64, 64]")


@pytest.mark.parametrize("image_px", [128, 64])
def test_he_follows_the_inputs_of_a_unit(image_px: int) -> None:
    """(2 / inputs)^0.5, whatever the net's size; the bound is six deviations of such an estimate."""
    net = AlexNet(recipe("photos", *HE, f"model.image_px={image_px}").model, seed=3)
    for name, weight in net.named_parameters():
        if name.endswith("weight") and not name.startswith("post"):
            expected = (2 / weight[0].numel()) ** 0.5
            assert float(weight.detach().std()) == pytest.approx(expected, rel=6 / (2 * weight.numel()) ** 0.5), name


@pytest.mark.parametrize("tower", ["a", "b"])
def test_a_towers_weights_do_not_depend_on_who_holds_it(tower: str) -> None:
    config = recipe("photos", *HE).model
    whole = AlexNet(config, seed=3)
    lone, wanted = lone_tower(config, tower, seed=3), whole.split_towers(whole.state_dict())[tower]
    for name, part in lone.split_towers(lone.state_dict())[tower].items():
        assert torch.equal(part, wanted[name]), name


def test_frozen_statistics_stand_still_in_training() -> None:
    net = AlexNet(recipe("photos", *HE).model, seed=3)
    freeze_statistics(net, ("conv1", "fc7"))
    net.eval().train()
    x = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    first, second = net.post1(net.conv1(x)), net.post2(net.conv2(net.post1(net.conv1(x))))
    assert second.isfinite().all()
    for name, buffer in net.named_buffers():
        changed = not torch.equal(buffer, before[name])
        assert changed == name.startswith("post2"), name
    assert torch.equal(first[:1], net.post1(net.conv1(x[:1])))  # an image does not see the batch that it is in
    assert [m.frozen for m in net.modules() if isinstance(m, BatchNorm2d)] == [True] + [False] * 4
