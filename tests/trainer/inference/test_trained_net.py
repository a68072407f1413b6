"""The Python API: every kind of picture goes the same way, features are the layers' own, mistakes are said."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import ImageError
from pipeline.loader.batches import EvaluationLoader
from tests.helpers.kept_run import make_kept_run
from tests.helpers.loader_data_set import photo_crop
from tests.helpers.torch_kernels import TorchKernels
from trainer.config import LAYERS
from trainer.errors import RunError
from trainer.inference import TrainedNet, load
from trainer.inference.neighbours import find_neighbours
from trainer.inference.trained_net import FeatureRow
from trainer.model import kernels
from trainer.model.layers import Conv2d

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TrainedNet:
    """Of a run on 96-px photos that sees 80."""
    return load(make_kept_run(tmp_path_factory.mktemp("net")))


def test_every_kind_of_picture_is_the_same_picture(net, tmp_path):
    pixels = photo_crop(7, 130, 110, 3)
    image, file, buffer = Image.fromarray(pixels), tmp_path / "a.png", io.BytesIO()
    image.save(file)
    image.save(buffer, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned, turned_file = image.transpose(Image.Transpose.ROTATE_180), tmp_path / "turned.png"
    turned.save(turned_file, exif=exif)
    kinds = [
        file,
        str(file),
        buffer.getvalue(),
        image,
        pixels,
        image.convert("RGBA"),
        turned_file,
        Image.open(turned_file),
    ]
    inputs = net.preprocess(kinds)
    assert inputs.shape == (8, 3, 80, 80) and inputs.dtype == torch.float32
    for each in inputs:
        assert torch.equal(each, inputs[0])
    found = net.classify(kinds)
    assert [row.path.name for row in found[:3]] == ["a.png", "a.png", "picture 2"]
    assert len({row.classes[0].label for row in found}) == 1


def test_gray_pictures_are_taken_by_a_net_of_colors(net):
    gray = photo_crop(7, 96, 96, 1)
    three = np.repeat(gray, 3, axis=2)
    for kind in (gray, gray[..., 0], Image.fromarray(gray[..., 0])):
        assert torch.equal(net.preprocess(kind), net.preprocess(three))
    assert net.preprocess(np.stack([three, three])).shape[0] == 2  # an array of four dimensions is several


def test_what_is_no_picture_is_said(net, tmp_path):
    for wrong, message in (
        (np.zeros((9, 9, 3)), "array of float64"),
        (np.zeros((9, 9, 4), np.uint8), r"shape \(9, 9, 4\)"),
        (np.zeros((0, 9, 3), np.uint8), "expected uint8"),
        (Image.new("F", (9, 9)), "mode F"),
        (b"", "empty file"),
        (tmp_path / "none.jpg", "No such file"),
    ):
        with pytest.raises(ImageError, match=message):
            net.preprocess(wrong)
        assert re.search(message, net.classify([wrong])[0].error)
    with pytest.raises(RunError, match="layer 'conv9': expected one of conv1, conv2"):
        net.features([], "conv9")
    with pytest.raises(ImageError, match="picture 0: empty file"):
        net.features([b""])


def test_features_are_what_the_next_layer_gets(net):
    """fc8 of fc7's features is what the net says; conv5's flattened are fc6's input."""
    pictures = [photo_crop(number, 96, 96, 3) for number in (1, 2, 3, 4, 5)]
    found = {layer: net.features(pictures, layer) for layer in LAYERS}
    weights = net._net.state_dict()
    logits = torch.from_numpy(found["fc7"]) @ weights["fc8.weight"].T + weights["fc8.bias"]
    torch.testing.assert_close(logits, torch.from_numpy(found["fc8"]), rtol=1e-4, atol=1e-5)
    shares = torch.from_numpy(found["fc8"]).softmax(1).max(1).values
    stated = [row.classes[0].probability for row in net.classify(pictures)]
    torch.testing.assert_close(shares, torch.tensor(stated), rtol=1e-4, atol=1e-6)
    before = torch.from_numpy(found["conv5"]).flatten(1) @ weights["fc6.weight"].T + weights["fc6.bias"]
    torch.testing.assert_close(0.5 * before.relu(), torch.from_numpy(found["fc6"]), rtol=1e-4, atol=1e-4)
    sides = list(net.config.model.map_sizes().values())
    assert found["conv1"].shape == (5, 16, sides[1], sides[1]) and found["fc7"].shape == (5, 48)
    assert net.kernels().shape == (16, 11, 11, 3)


def test_features_as_a_gpu_computes_them(net, monkeypatch):
    """Towers that are apart between two layers are joined for whoever asks."""
    pictures = [photo_crop(number, 96, 96, 3) for number in (1, 2)]
    found = {layer: net.features(pictures, layer) for layer in LAYERS}
    functions = TorchKernels()
    monkeypatch.setattr(Conv2d, "forward", Conv2d.rearranged)
    monkeypatch.setattr(kernels, "on_gpu", lambda _: functions)
    for layer, wanted in found.items():
        np.testing.assert_allclose(net.features(pictures, layer), wanted, rtol=1e-4, atol=1e-4)
    assert functions.called


def test_a_stored_image_is_seen_as_in_an_evaluation(net, tmp_path):
    run = make_kept_run(tmp_path)
    (batch,) = EvaluationLoader(tmp_path / "data", net.config.data, batch_size=4)
    pictures = [photo_crop(1000 + number, 96, 96, 3) for number in range(4)]
    torch.testing.assert_close(load(run).preprocess(pictures), batch.images, rtol=0, atol=1e-4)


def rows(*points: tuple[str, float, float]) -> list[FeatureRow]:
    return [FeatureRow(Path(name), np.array([x, y], np.float32)) for name, x, y in points]


def test_neighbours_are_the_nearest_and_never_the_file_itself():
    points = rows(("a", 0, 0), ("b", 3, 4), ("c", 1, 0), ("d", 0, 0))
    found = find_neighbours(points[:2], points, 2)
    assert [[(near.row.path.name, near.distance) for near in each.nearest] for each in found] == [
        [("d", 0.0), ("c", 1.0)],
        [("c", pytest.approx(20**0.5)), ("a", 5.0)],
    ]
    with pytest.raises(RunError, match="there is one image only"):
        find_neighbours(points[:1], points[:1], 2)
