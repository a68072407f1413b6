"""Exported weights in a plain torch net written here and in onnxruntime; the round trip of export and import."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from skimage import data as photos
from torch import nn
from torch.nn import functional

from tests.helpers.loader_data_set import make_data_set
from tests.helpers.synthetic_run import ROOT, digits_config, make_run
from trainer.__main__ import main
from trainer.config import load_config, to_toml
from trainer.errors import ExportError, RunError
from trainer.inference.export import export_run
from trainer.inference.import_weights import import_weights
from trainer.training import checkpoint
from trainer.training.evaluate import load_network
from trainer.training.optimizer import PaperSGD

pytestmark = pytest.mark.numeric

# The paper's layers at a size for tests: every layer keeps its kernel, stride and pad.
SMALL = [
    "model.image_px=80",
    "model.channels=[8, 12, 10, 10, 6]",
    "model.hidden=[24, 24]",
    "model.classes=7",
    "model.init_std=[0.02, 0.03, 0.05, 0.05, 0.05, 0.1, 0.2, 0.2]",
]
ORIGINAL = [
    'model.post_ops=[["lrn", "maxpool", "relu"], ["relu", "lrn", "lrn_within_channel", "maxpool"], '
    '["relu"], ["relu"], ["maxpool", "relu"]]',
    "model.lrn.alpha=2e-5",
    'data.color="deviation"',
    "data.color_divisor=1.1",
]
VARIANTS = {
    "paper": [],
    "original": ORIGINAL,
    "inverted": ['model.dropout_kind="inverted"', "model.dropout=0.3"],
    "tanh, dropout 0.3": ['model.activation="tanh"', "model.dropout=0.3"],
    "batch norm": [
        'model.post_ops=[["batch_norm", "relu", "maxpool"], ["batch_norm", "relu", "maxpool"], '
        '["relu"], ["relu"], ["relu", "maxpool"]]'
    ],
    "pools that round up": ["model.pool_px=2", "model.pool_ceil=true"],
    "no crossings": ['model.crossings=["fc8"]'],
    "one tower": ["model.towers=1"],
}


class PlainNet(nn.Module):
    """The paper's net as anyone would write it: grouped convolutions, torch's own normalization, a tower at a time."""

    def __init__(self, maps: list[int], units: int, classes: int) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = (2 * count for count in maps)
        self.conv1 = nn.Conv2d(3, c1, 11, stride=4)
        self.conv2 = nn.Conv2d(c1, c2, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1)
        self.conv4 = nn.Conv2d(c3, c4, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(c4, c5, 3, padding=1, groups=2)
        self.fc6 = nn.Linear(c5, 2 * units)  # 80 px leave one pixel
        self.fc7 = nn.Linear(2 * units, 2 * units)
        self.fc8 = nn.Linear(2 * units, classes)
        self.norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)  # torch divides alpha by 5

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        def norm_pool(x: torch.Tensor) -> torch.Tensor:
            halves = [self.norm(half) for half in functional.relu(x).chunk(2, dim=1)]
            return functional.max_pool2d(torch.cat(halves, dim=1), 3, 2)

        x = norm_pool(self.conv1(functional.pad(images, (0, 3, 0, 3))))
        x = norm_pool(self.conv2(x))
        x = functional.relu(self.conv3(x))
        x = functional.relu(self.conv4(x))
        x = functional.max_pool2d(functional.relu(self.conv5(x)), 3, 2).flatten(1)
        x = 0.5 * functional.relu(self.fc6(x))
        return self.fc8(0.5 * functional.relu(self.fc7(x)))


def recipe(*changes: str):
    return load_config(None, [*SMALL, *changes])


def a_run(folder, *changes: str):
    """A run of 3 steps; the statistics of a batch normalization are not those of its start."""
    run = make_run(folder, recipe(*changes), steps=3)
    loaded = load_network(run)
    net, config = loaded.net, loaded.config
    if not list(net.buffers()):
        return run
    generator = torch.Generator().manual_seed(4)
    for buffer in net.buffers():
        buffer.uniform_(1, 9, generator=generator)
    checkpoint.save_towers(checkpoint.unfinished(run, 3), net, PaperSGD(net.named_parameters(), config.optimizer))
    checkpoint.commit(run, 3, config=to_toml(config), loader={}, towers=net.towers)
    return run


def real_images(count: int = 6) -> torch.Tensor:
    """Crops of photos, (count, 3, 80, 80), their mean subtracted."""
    photo = photos.astronaut()
    crops = np.stack([photo[60 * i : 60 * i + 80, 50 * i : 50 * i + 80] for i in range(count)])
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).float()
    return (images - images.mean(0)).contiguous()


@torch.no_grad()
def logits_of(run, images: torch.Tensor) -> torch.Tensor:
    """In the dtype of the images."""
    return load_network(run).net.to(images.dtype)(images)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Greatest difference as a share of the greatest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def test_exported_weights_reproduce_the_run_in_a_plain_module(tmp_path):
    run = a_run(tmp_path / "run")
    net = PlainNet([8, 12, 10, 10, 6], 24, 7)
    net.load_state_dict(load_file(export_run(run, tmp_path / "net.safetensors", preprocessing=False)))
    images = real_images().double()
    expected = logits_of(run, images)
    assert float(expected.std(0).min()) > 1e-3  # the images differ in every logit
    with torch.no_grad():
        assert relative_error(net.double()(images), expected) < 1e-12


def test_the_plain_module_notices_swapped_towers(tmp_path):
    run = a_run(tmp_path / "run")
    weights = load_file(export_run(run, tmp_path / "net.safetensors", preprocessing=False))
    first, second = weights["conv2.weight"].chunk(2)
    net = PlainNet([8, 12, 10, 10, 6], 24, 7)
    net.load_state_dict(weights | {"conv2.weight": torch.cat((second, first))})
    images = real_images()
    with torch.no_grad():
        assert relative_error(net(images), logits_of(run, images)) > 1e-3


def test_the_papers_shapes():
    from trainer.model.alexnet import AlexNet
    from trainer.model.weights import merge_towers

    config = load_config(None, ["model.hidden=[16, 16]"]).model  # the full fully connected layers take a second to draw
    shapes = {name: tuple(tensor.shape) for name, tensor in merge_towers(AlexNet(config)).items()}
    assert shapes["conv1.weight"] == (96, 3, 11, 11)
    assert shapes["conv2.weight"] == (256, 48, 5, 5)
    assert shapes["conv3.weight"] == (384, 256, 3, 3)
    assert shapes["conv4.weight"] == (384, 192, 3, 3)
    assert shapes["conv5.weight"] == (256, 192, 3, 3)
    assert shapes["fc6.weight"] == (32, 9216)
    assert next(iter(shapes)) == "conv1.weight"
    assert list(shapes)[-1] == "fc8.bias"
    assert shapes["fc8.bias"] == (1000,)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_onnxruntime_gives_the_runs_logits(tmp_path, changes):
    """fp32 is all that the file has: eight layers, sums of up to 363 products, a random walk: 8 sqrt(363) 2^-24 = 9e-6.

    Against float64, so that the roundings are onnxruntime's only.
    """
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra dev)")
    pytest.importorskip("onnx", reason="onnx is not installed (extra dev)")
    run = a_run(tmp_path / "run", *changes)
    path = export_run(run, tmp_path / "net.onnx", preprocessing=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for count in (6, 1):  # the batch is free
        images = real_images(count)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        assert relative_error(torch.from_numpy(found).double(), logits_of(run, images.double())) < 1e-5


def test_onnx_normalizes_each_tower_alone_and_scales_alpha(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra dev)")
    path = export_run(a_run(tmp_path / "run"), tmp_path / "net.onnx", preprocessing=False)
    model = onnx.load(path)
    norms = [node for node in model.graph.node if node.op_type == "LRN"]
    assert len(norms) == 4  # two layers, two towers
    alphas = {attribute.f for node in norms for attribute in node.attribute if attribute.name == "alpha"}
    assert alphas == {np.float32(5e-4)}  # the paper's 1e-4 on the sum, and ONNX divides by 5
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert float(facts["test_factor"]) == 0.5
    assert "flatten(1)" in facts["layout"]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_export_and_import_are_exact(tmp_path, changes):
    run = a_run(tmp_path / "run", *changes)
    exported = export_run(run, tmp_path / "net.safetensors", preprocessing=False)
    folder = import_weights(exported, tmp_path / "again")
    assert checkpoint.read_record(folder).step == 0
    before, after = (load_network(folder).net.state_dict() for folder in (run, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    again = export_run(tmp_path / "again", tmp_path / "again.safetensors", preprocessing=False)
    assert load_file(again).keys() == load_file(exported).keys()
    images = real_images(2)
    assert torch.equal(logits_of(run, images), logits_of(tmp_path / "again", images))


def test_metadata_says_how_the_weights_lie(tmp_path):
    path = export_run(a_run(tmp_path / "run", *ORIGINAL), tmp_path / "net.safetensors", preprocessing=False)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    assert json.loads(facts["groups"])["conv2"] == 2
    assert json.loads(facts["groups"])["conv3"] == 1
    assert facts["step"] == "3"
    assert "(N, 3, 80, 80)" in facts["input"] and "divided" not in facts["input"]
    toml = tmp_path / "recipe.toml"
    toml.write_text(facts["config"])
    assert load_config(toml) == recipe(*ORIGINAL)


def test_weights_of_another_net_are_refused_by_name(tmp_path):
    exported = export_run(a_run(tmp_path / "run"), tmp_path / "net.safetensors", preprocessing=False)
    with pytest.raises(ExportError, match=r"fc8.weight is of shape \(7, 48\) in the file, and of shape \(8, 48\)"):
        import_weights(exported, tmp_path / "again", config=recipe("model.classes=8"))
    assert not (tmp_path / "again").exists()
    weights = load_file(exported)
    with safe_open(exported, "pt") as file:
        facts = file.metadata()
    for change, message in (
        ({"conv9.weight": torch.zeros(1)}, r"conv9.weight is of shape \(1,\) in the file, and nothing"),
        ({"conv1.bias": weights["conv1.bias"].double()}, "conv1.bias is torch.float64"),
    ):
        save_file(weights | change, tmp_path / "odd.safetensors", facts)
        with pytest.raises(ExportError, match=message):
            import_weights(tmp_path / "odd.safetensors", tmp_path / "again", config=recipe())


def test_what_cannot_be_exported_or_imported_is_said(tmp_path):
    run = a_run(tmp_path / "run")
    with pytest.raises(ExportError, match=r"ends in .safetensors or .onnx"):
        export_run(run, tmp_path / "net.pt", preprocessing=False)
    with pytest.raises(ExportError, match="no weights at"):
        import_weights(tmp_path / "none.safetensors", tmp_path / "again", config=recipe())
    (tmp_path / "truncated.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ExportError, match="cannot be read as safetensors"):
        import_weights(tmp_path / "truncated.safetensors", tmp_path / "again", config=recipe())
    with pytest.raises(RunError, match="holds a run"):
        import_weights(export_run(run, tmp_path / "net.safetensors", preprocessing=False), run)


def test_training_goes_on_from_imported_weights(tmp_path, monkeypatch, capsys):
    """One step at a rate too small to change a weight ends with the imported ones: it began with them."""
    data = make_data_set(tmp_path / "data", encoding="png", channels=1, size=(32, 32), train=64, val=8)
    path = export_run(
        make_run(tmp_path / "run", digits_config(), steps=3), tmp_path / "net.safetensors", preprocessing=False
    )
    changes = ["train.epochs=1", "train.batch_size=64", "optimizer.learning_rate=1e-30"]
    changes += ["optimizer.bias_learning_rate=1e-30", "train.seed=9"]
    recipe_words = ["--config", str(ROOT / "configs" / "digits.toml"), "--run", str(tmp_path / "again")]
    recipe_words += [word for change in changes for word in ("--set", change)]
    monkeypatch.setattr("sys.argv", ["trainer", "import", "--weights", str(path), *recipe_words])
    assert main() == 0
    words = ["train", *recipe_words, "--data", str(data), "--device", "cpu", "--resume", "auto"]
    monkeypatch.setattr("sys.argv", ["trainer", *words])
    assert main() == 0
    assert "finished at step 1" in capsys.readouterr().out
    ended = load_file(export_run(tmp_path / "again", tmp_path / "again.safetensors", preprocessing=False))
    imported = load_file(path)
    for name in imported:
        torch.testing.assert_close(ended[name], imported[name], rtol=0, atol=1e-20)  # biases of 0 move by 1e-30
