"""Training that begins with learned weights: what is taken, changed and left; other programs' files; frozen layers."""

import dataclasses
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.manifest import read_manifest
from tests.helpers.kept_run import make_kept_run, small_recipe
from tests.helpers.training_commands import ROOT, call
from trainer.errors import ExportError, RecipeError, RunError, TrainerError
from trainer.inference.export import export_run
from trainer.model.alexnet import AlexNet
from trainer.model.weight_files import read_weight_file
from trainer.training import checkpoint
from trainer.training.evaluate import load_network
from trainer.training.init_from import freeze, frozen_layers, initial_weights

pytestmark = pytest.mark.usefixtures("one_thread")

STD = np.array([60.0, 50.0, 40.0])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``, its ``data``, and its export ``net.safetensors``."""
    folder = tmp_path_factory.mktemp("source")
    export_run(make_kept_run(folder), folder / "net.safetensors")
    return folder


def begin(source: Path, data: Path, *changes: str, new_head: bool = False):
    config = small_recipe("train.seed=5", *changes)
    return initial_weights(config, source, read_manifest(data), STD, new_head=new_head)


@pytest.mark.parametrize("source", ["run", "net.safetensors"])
def test_a_run_and_its_export_are_taken_to_the_bit(place: Path, source: str) -> None:
    initial, wanted = begin(place / source, place / "data"), load_network(place / "run").net.state_dict()
    for name, tensor in initial.net.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert (len(initial.taken), initial.changed, initial.left) == (8, (), ())
    kind = "run" if source == "run" else "export"
    assert initial.lines()[0].endswith(f"{source} ({kind})")


def test_a_new_head_and_another_size_are_said(place: Path) -> None:
    initial = begin(place / "run", place / "data", "model.hidden=[24, 32]", "data.mean=channel", new_head=True)
    fresh, source = AlexNet(initial.net.config, seed=5).state_dict(), load_network(place / "run").net.state_dict()
    for name, tensor in initial.net.state_dict().items():
        expected = fresh if name.startswith(("fc7", "fc8")) else source
        assert torch.equal(tensor, expected[name]), name
    assert initial.taken == ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6")
    assert initial.left == ("fc7 (fc7.weight is (48, 48) there, (64, 48) here)", "fc8 (new head, 10 classes)")
    assert initial.notes == ("data.mean",)


def test_a_head_for_other_classes_is_refused(place: Path, tmp_path: Path) -> None:
    manifest = read_manifest(place / "data")
    with pytest.raises(RunError, match=r"its class 0 is .* add --new-head"):
        other = manifest.classes[1:] + manifest.classes[:1]
        swapped = dataclasses.replace(manifest, classes=other)
        initial_weights(small_recipe(), place / "run", swapped, STD, new_head=False)
    torch.save(torchvision_like().state_dict(), tmp_path / "alexnet.pth")
    with pytest.raises(RunError, match="its fc8 has 12 classes, and the data set 10: add --new-head"):
        begin(tmp_path / "alexnet.pth", place / "data", *ONE_TOWER)


ONE_TOWER = (
    "model.towers=1",
    "model.channels=[6, 9, 8, 7, 5]",
    "model.hidden=[20, 16]",
    "model.paddings=[[2, 2], [2, 2], [1, 1], [1, 1], [1, 1]]",
    'model.post_ops=[["relu", "maxpool"], ["relu", "maxpool"], ["relu"], ["relu"], ["relu", "maxpool"]]',
    "model.dropout_kind=inverted",
    "data.mean=channel",
)


def torchvision_like(classes: int = 12) -> nn.Module:
    """torchvision's AlexNet, layer by layer, at the size of these tests."""
    torch.manual_seed(1)
    features = nn.Sequential(
        nn.Conv2d(3, 6, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(6, 9, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(9, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 7, 3, padding=1), nn.ReLU(),
        nn.Conv2d(7, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    classifier = nn.Sequential(
        nn.Dropout(), nn.Linear(5, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, classes)
    )
    return nn.ModuleDict({"features": features, "classifier": classifier}).eval()


@pytest.mark.parametrize("normalize", ["per_channel", "none"])
@pytest.mark.parametrize("old", [False, True])
def test_torchvisions_net_computes_the_same_here(place: Path, tmp_path: Path, normalize: str, old: bool) -> None:
    """Its input is divided by deviations; where the recipe's is not, conv1 does it."""
    theirs, file = torchvision_like(10), tmp_path / "alexnet.pth"
    torch.save(theirs.state_dict(), file, _use_new_zipfile_serialization=not old)
    initial = begin(file, place / "data", *ONE_TOWER, f"data.normalize={normalize}")
    pixels = torch.rand(4, 3, 80, 80, generator=torch.Generator().manual_seed(2)) * 200 - 100
    scaled = pixels / torch.from_numpy(STD).float()[:, None, None]
    with torch.no_grad():
        expected = theirs["classifier"](theirs["features"](scaled).flatten(1))
        found = initial.net.eval()(scaled if normalize == "per_channel" else pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert bool(initial.changed) == (normalize == "none") and initial.left == ()


def test_the_real_torchvision_names_fit_a_one_tower_recipe(place: Path, tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    config = [*ONE_TOWER, "model.image_px=224", "model.channels=[64, 192, 384, 256, 256]", "model.hidden=[4096, 4096]"]
    initial = begin(tmp_path / "alexnet.pth", place / "data", *config, "data.normalize=per_channel", new_head=True)
    assert initial.taken == ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7")


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
def test_caffes_channels_are_turned_and_its_groups_are_towers(place: Path, tmp_path: Path, suffix: str) -> None:
    """Blue, green, red; names conv1.weight or conv1_w; old blobs have four dimensions."""
    source = load_network(place / "run").net.state_dict()
    named = dict(source) | {"conv1.weight": source["conv1.weight"].flip(1).contiguous()}
    file = tmp_path / f"caffe{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in named.items()}}, file)
    elif suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, file)
    else:
        blobs = {re.sub(r"\.(w|b)\w+", r"_\1", name): tensor.numpy() for name, tensor in named.items()}
        np.savez(file, **{name: blob[None, None] if blob.ndim < 3 else blob for name, blob in blobs.items()})
    initial = begin(file, place / "data", "model.dropout_kind=inverted")
    for name, tensor in initial.net.state_dict().items():
        assert torch.equal(tensor, source[name]), name
    assert initial.changed == ("conv1.weight: its channels turned from blue, green, red to red, green, blue",)


def test_two_groups_become_one_dense_layer(place: Path) -> None:
    one = ("model.towers=1", "model.channels=[16, 24, 20, 20, 12]", "model.hidden=[48, 48]")
    no_norm = 'model.post_ops=[["relu", "maxpool"], ["relu", "maxpool"], ["relu"], ["relu"], ["relu", "maxpool"]]'
    initial = begin(place / "run", place / "data", *one, no_norm)
    assert "conv2.weight: two groups as one dense layer" in initial.changed and "model.post_ops" in initial.notes
    two = AlexNet(small_recipe(no_norm).model)
    two.load_state_dict(load_network(place / "run").net.state_dict())
    images = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(3)) * 50
    with torch.no_grad():
        torch.testing.assert_close(initial.net.eval()(images), two.eval()(images), rtol=1e-4, atol=1e-5)


def test_another_unit_and_another_dropout_change_weights_and_not_the_answer(place: Path) -> None:
    """From gray levels and halved outputs in testing to deviations and inverted dropout."""
    initial = begin(place / "run", place / "data", "data.normalize=per_channel", "model.dropout_kind=inverted")
    pixels = torch.rand(3, 3, 80, 80, generator=torch.Generator().manual_seed(2)) * 200 - 100
    scaled = pixels / torch.from_numpy(STD).float()[:, None, None]
    with torch.no_grad():
        expected = load_network(place / "run").net(pixels)
        torch.testing.assert_close(initial.net.eval()(scaled), expected, rtol=1e-4, atol=1e-5)
    assert [text.partition(":")[0] for text in initial.changed] == ["conv1.weight", "fc7.weight", "fc8.weight"]
    assert initial.taken == ("conv2", "conv3", "conv4", "conv5", "fc6")
    assert initial.notes == ("data.normalize",)


def checkpoint_of_2012(net: AlexNet, path: Path, *, places: bool) -> None:
    """A checkpoint as the program writes it, names and order of inputs as in its layer file of run #145."""
    names = ["data", "conv1a", "conv1b", "conv2a", "conv2b", "conv3a", "conv3b", "conv4a", "conv4b", "conv5a", "conv5b"]
    names += ["fc2048a", "fc2048b", "hs1a", "hs1b", "fc2048ba", "fc2048bb", "fc1000"]
    sees = {"conv1": ("data",), "conv3": ("conv2a", "conv2b"), "fc2048": ("conv5a", "conv5b")}
    whole = net.state_dict()
    rows = []
    for name in names:
        layer, tower = (name[:-1], name[-1]) if name[-1] in "ab" and not name.startswith("data") else (name, "")
        ours = {"fc2048": "fc6", "fc2048b": "fc7", "fc1000": "fc8"}.get(layer, layer)
        row: dict = {"name": name, "type": "fc" if ours.startswith("fc") else "conv", "inputs": []}
        if f"{ours}.weight" in whole:
            half = 0 if tower in ("a", "") else 1
            weight, bias = (whole[f"{ours}.{kind}"].chunk(2 if tower else 1)[half] for kind in ("weight", "bias"))
            inputs = sees.get(
                layer, (f"conv{int(layer[-1]) - 1}{tower}",) if layer.startswith("conv") else ("hs1a", "hs1b")
            )
            parts = list(weight.chunk(len(inputs), dim=1))
            if name == "fc2048bb":  # the layer file: inputs=hs1b,hs1a
                inputs, parts = inputs[::-1], parts[::-1]
            row["inputs"] = [names.index(each) for each in inputs] if places else list(inputs)
            row["weights"] = [np.asfortranarray(part.flatten(1).T.numpy()) for part in parts]
            row["biases"] = bias.numpy()[:, None]
            row["filterSize"] = [weight.shape[-1]] * len(inputs)
        rows.append(row)
    layers = rows if places else {row["name"]: row for row in rows}
    path.write_bytes(pickle.dumps({"model_state": {"layers": layers, "epoch": 91}, "op": NoClassOfOurs()}, protocol=2))


class NoClassOfOurs:
    """Stands for the program's options, whose class nobody has."""


@pytest.mark.parametrize("places", [True, False])
def test_a_checkpoint_of_2012_comes_in_the_order_of_the_towers(place: Path, tmp_path: Path, places: bool) -> None:
    net = load_network(place / "run").net
    checkpoint_of_2012(net, tmp_path / "91.200", places=places)
    found = read_weight_file(tmp_path / "91.200")
    assert found.kind == "2012"
    for name, tensor in net.state_dict().items():
        assert torch.equal(found.tensors[name], tensor), name


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "touched",))

    (tmp_path / "bad").write_bytes(pickle.dumps({"model_state": {"layers": [Hostile()]}}, protocol=2))
    with pytest.raises(ExportError, match="no checkpoint of the 2012 program"):
        read_weight_file(tmp_path / "bad")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pth", None, "no weights at"),
        ("empty.pth", b"", "cannot be read as safetensors, .npz"),
        ("text.pth", b"not weights at all", "cannot be read as safetensors, .npz"),
        ("short.safetensors", b"\x10\0\0\0\0\0\0\0{}", "cannot be read as safetensors"),
        ("no.npz", b"PK\x03\x04 and nothing", "cannot be read as safetensors, .npz"),
    ],
)
def test_files_that_are_no_weights_are_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainerError, match=message) as caught:
        read_weight_file(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_other_nets_are_named(place: Path, tmp_path: Path) -> None:
    save_file({"layer1.0.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ExportError, match=r"no weights that are known here.*it has layer1.0.weight"):
        read_weight_file(tmp_path / "resnet.safetensors")
    save_file({"conv1.weight": torch.zeros(2, 3, 5, 5)}, tmp_path / "small.safetensors")
    with pytest.raises(RunError, match="nothing in it fits this recipe's net"):
        begin(tmp_path / "small.safetensors", place / "data", new_head=True)


def test_freezing_names_layers() -> None:
    config = freeze(small_recipe(), ("conv2", "conv1"))
    assert frozen_layers(config) == ("conv1", "conv2")
    assert freeze(config, ("conv1", "conv2")) == config
    with pytest.raises(RecipeError, match="--freeze conv9: expected layers out of conv1, "):
        freeze(config, ("conv9",))


BATCH_NORM = (
    'model.post_ops=[["batch_norm", "maxpool", "relu"], ["maxpool", "relu"], ["relu"], ["relu"], ["maxpool", "relu"]]'
)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_begins_with_another_goes_on_and_leaves_frozen_layers_alone(
    tiny_data, tmp_path, monkeypatch, capsys, processes
):
    """Through the command: the first checkpoint is the source, to the bit; frozen layers, statistics too, stay so."""
    common = ["--config", ROOT / "configs" / "digits.toml", "--data", tiny_data, "--device", "cpu"]
    for value in ("train.batch_size=8", "train.epochs=1", "train.keep_checkpoints=9", BATCH_NORM, "train.threads=1"):
        common += ["--set", value]
    assert call(monkeypatch, "train", *common, "--run", tmp_path / "one") == 0
    words = ["train", *common, "--run", tmp_path / "two", "--init-from", tmp_path / "one", "--freeze", "conv1,conv3"]
    words += ["--processes", processes]
    capsys.readouterr()
    assert call(monkeypatch, *words) == 0
    assert "taken: conv1, conv2, conv3, conv4, conv5, fc6, fc7, fc8" in capsys.readouterr().out
    one, first, last = (
        load_network(tmp_path / run, which=which).net.state_dict()
        for run, which in (("one", "newest"), ("two", "0"), ("two", "newest"))
    )
    for name in one:
        assert torch.equal(first[name], one[name]), name
        frozen = name.startswith(("conv1", "post1", "conv3"))
        assert torch.equal(last[name], one[name]) == frozen, name
    assert call(monkeypatch, *words, "--resume", "auto") == 0
    assert "finished already" in capsys.readouterr().out
    assert checkpoint.choose(tmp_path / "two").record.step == 3


def test_options_that_contradict_each_other_are_refused(tiny_data, tmp_path, monkeypatch, capsys):
    common = ["train", "--config", ROOT / "configs" / "digits.toml", "--data", tiny_data, "--run", tmp_path / "run"]
    for words, message in (
        (["--new-head"], "--new-head goes with --init-from"),
        (["--freeze", "conv1"], "--freeze goes with --init-from"),
        (["--init-from", tmp_path / "none", "--set", "train.batch_size=8"], "no weights at"),
    ):
        assert call(monkeypatch, *common, *words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
