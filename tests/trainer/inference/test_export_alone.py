"""An exported file says what predictions say, without this project: onnxruntime, and the programs of docs/export.md."""

import ast
import io
import json
import re
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.helpers.kept_run import make_kept_run
from tests.helpers.loader_data_set import photo_crop
from trainer.errors import RunError
from trainer.inference import load
from trainer.inference.export import export_run
from trainer.inference.import_weights import import_weights

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("one_thread")]

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "export.md"
OPS_OF_2012 = (
    'model.post_ops=[["lrn", "maxpool", "relu"], ["relu", "lrn", "lrn_within_channel", "maxpool"], ["relu"], ["relu"], '
    '["maxpool", "relu"]]'
)
BATCH_NORM = 'model.post_ops=[["batch_norm", "maxpool", "relu"], ["batch_norm", "relu"], ["relu"], ["relu"], ["tanh"]]'
LOUD = "model.init_std=[0.1, 0.1, 0.1, 0.15, 0.15, 0.4, 0.3, 0.3]"  # for inputs of deviation 1
INPUTS = {
    "the paper's mean image": (3, ()),
    "2012": (3, ("data.mean=image_center", OPS_OF_2012)),
    "photos": (3, ("data.mean=channel", LOUD, "data.normalize=per_channel", "model.dropout_kind=inverted", BATCH_NORM)),
    "mean image and deviations": (3, (LOUD, "data.normalize=per_channel", "model.towers=1")),
    "standardized": (3, (LOUD, "data.mean=none", "data.normalize=per_image", 'model.crossings=["fc8"]')),
    "gray": (1, (LOUD, "data.normalize=per_image", "model.activation=tanh", "model.pool_px=2", "model.pool_ceil=true")),
}


def photo(folder: Path, channels: int = 3) -> Path:
    """A photo as a camera leaves it: not square, larger than any stored image, lying on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = folder / "photo.jpg"
    Image.fromarray(photo_crop(5, 230, 150, channels).squeeze()).save(path, quality=95, exif=exif)
    return path


def shares(run: Path, pictures: list) -> np.ndarray:
    """(N, classes), by the Python API, in the order of labels."""
    rows = [sorted(row.classes, key=lambda share: share.label) for row in load(run).classify(pictures, top=99)]
    return np.array([[share.probability for share in row] for row in rows])


def program_outputs(path: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the lines in a safetensors file's metadata compute."""
    with safe_open(path, "pt") as file:
        names, lines = file.keys(), json.loads(file.metadata()["program"])
        values = {name: file.get_tensor(name) for name in names}
    values["images"] = images
    for output, function, inputs, options in lines:
        call = getattr(torch.nn.functional, function, None) or getattr(torch, function)
        values[output] = call(*(values[name] for name in inputs), **options)
    return values


@pytest.mark.parametrize(("channels", "changes"), INPUTS.values(), ids=INPUTS)
def test_both_files_take_bytes_and_say_what_predictions_say(tmp_path, channels, changes):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra dev)")
    run = make_kept_run(tmp_path, *changes, channels=channels)
    pictures = [photo_crop(number, 96, 96, channels) for number in (3, 4, 5)]
    expected = shares(run, pictures)
    assert expected.std(0).max() > 1e-3  # the pictures differ
    crops = np.stack([load(run).crop(picture) for picture in pictures])
    session = onnxruntime.InferenceSession(export_run(run, tmp_path / "net.onnx"))
    for count in (3, 1):  # a free batch
        (found,) = session.run(["probabilities"], {"images": crops[:count]})
        np.testing.assert_allclose(found, expected[:count], atol=2e-6)
    values = program_outputs(export_run(run, tmp_path / "net.safetensors"), torch.from_numpy(crops))
    np.testing.assert_allclose(values["probabilities"].numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("number", ["onnx", "torch"])
def test_the_ten_lines_of_the_document_agree_with_predict(tmp_path, monkeypatch, number):
    if number == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra dev)")
    code = re.search(rf"<!-- run: {number} -->\n```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)[1]
    rows = [line for line in code.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
    assert len(rows) <= {"onnx": 11, "torch": 14}[number]  # torch's has the names of what it may call besides
    modules = {alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"json", "sys", "numpy", {"onnx": "onnxruntime"}.get(number, number)}  # and PIL, safetensors
    assert set(re.findall(r"^from (\w+)", code, flags=re.MULTILINE)) <= {"PIL", "safetensors"}
    run, path = make_kept_run(tmp_path), photo(tmp_path)
    file = export_run(run, tmp_path / f"net.{'onnx' if number == 'onnx' else 'safetensors'}")
    (tmp_path / "program.py").write_text(code)
    monkeypatch.setattr(sys, "argv", ["program.py", str(file), str(path)])
    printed = io.StringIO()
    with redirect_stdout(printed):
        runpy.run_path(str(tmp_path / "program.py"))
    found = re.findall(r"^\(?([\d.e-]+),? '?(\w+)'?\)?$", printed.getvalue(), flags=re.MULTILINE)
    expected = {share.title: share.probability for share in load(run).classify(path, top=99)[0].classes}
    assert 0.02 < max(expected.values()) < 0.98  # no answer that anything would round to
    assert {title: pytest.approx(share, abs=1e-5) for title, share in expected.items()} == {
        title: float(share) for share, title in found
    }


def test_the_file_tells_what_a_stranger_needs(tmp_path):
    run = make_kept_run(tmp_path, "data.mean=channel", "data.normalize=per_channel")
    with safe_open(export_run(run, tmp_path / "net.safetensors"), "pt") as file:
        facts = file.metadata()
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra dev)")
    model = onnx.load(export_run(run, tmp_path / "net.onnx"))
    theirs = {entry.key: entry.value for entry in model.metadata_props}
    assert {key: facts[key] for key in theirs} == theirs
    assert set(facts) - set(theirs) == {"program", "manifest"}
    net = load(run)
    assert json.loads(facts["classes"]) == [record.title for record in net.classes]
    assert (facts["crop_px"], facts["resize_px"], facts["color"], facts["views"]) == ("80", "96", "RGB", "center")
    assert "96x96 px (bicubic, antialiased)" in facts["resize"] and "(8, 8)" in facts["resize"]
    assert len(facts["fingerprint"]) == len(facts["recipe_fingerprint"]) == 64
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert shapes == {"images": ["N", 80, 80, 3]}
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_an_imported_file_is_a_whole_run(tmp_path):
    """Recipe, classes, statistics: nothing is asked for, and the predictions are the same to the bit."""
    run = make_kept_run(tmp_path)
    file = export_run(run, tmp_path / "net.safetensors")
    import_weights(file, tmp_path / "again")
    picture = photo(tmp_path)
    assert load(tmp_path / "again").classify(picture)[0].classes == load(run).classify(picture)[0].classes
    again = export_run(tmp_path / "again", tmp_path / "again.safetensors")
    with safe_open(file, "pt") as one, safe_open(again, "pt") as two:
        keys = ("fingerprint", "recipe_fingerprint", "data_set_fingerprint", "class_names", "manifest", "program")
        assert [one.metadata()[key] for key in keys] == [two.metadata()[key] for key in keys]
    import_weights(file, tmp_path / "longer", overrides=["train.epochs=7"])
    assert load(tmp_path / "longer").config.train.epochs == 7


def test_a_run_that_knows_no_statistics_says_how_to_go_on(tmp_path):
    run = make_kept_run(tmp_path)
    (run / "trained_on" / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"--data DIR, or export without the input's part \(--no-preprocessing\)"):
        export_run(run, tmp_path / "net.onnx")
    assert export_run(run, tmp_path / "net.onnx", preprocessing=False).exists()
    from_data = export_run(run, tmp_path / "named.onnx", data=tmp_path / "data")
    assert from_data.stat().st_size > (tmp_path / "net.onnx").stat().st_size
