"""``features`` and ``neighbours`` as a user calls them: files, tables, pages, bad images, missing packages."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers.kept_run import make_kept_run
from tests.helpers.loader_data_set import photo_crop
from tests.helpers.training_commands import call
from trainer.inference import load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_kept_run(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(photo_crop(number, 96, 96, 3)).save(folder / f"<b>{number}.png")
    (folder / "note.png").write_text("no image")
    return folder


def test_features_are_written_and_bad_files_named(run, photos, tmp_path, monkeypatch, capsys):
    file = tmp_path / "codes.npz"
    assert call(monkeypatch, "features", photos, "--run", run, "--output", file, "--layer", "fc6") == 3
    assert "error: " in capsys.readouterr().err
    good = sorted(photos.glob("<b>*"))
    with np.load(file, allow_pickle=False) as arrays:
        assert arrays["paths"].tolist() == [str(path) for path in good] and str(arrays["layer"]) == "fc6"
        np.testing.assert_array_equal(arrays["features"], load(run).features(good, "fc6"))


def test_parquet_has_the_same_values(run, photos, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra parquet)")
    (photos / "note.png").unlink()
    file = tmp_path / "codes.parquet"
    assert call(monkeypatch, "features", photos, "--run", run, "--output", file, "--layer", "conv5") == 0
    table = parquet.read_table(file)
    shape = json.loads(table.schema.metadata[b"shape"])
    found = np.array(table["features"].to_pylist(), np.float32).reshape(-1, *shape)
    np.testing.assert_array_equal(found, load(run).features(sorted(photos.iterdir()), "conv5"))


def test_a_file_that_cannot_be_written_is_refused_first(run, photos, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "features", photos, "--run", run, "--output", tmp_path / "codes.txt") == 2
    assert "ends in .npz or .parquet" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert call(monkeypatch, "features", photos, "--run", run, "--output", tmp_path / "codes.parquet") == 2
    assert "pip install pyarrow" in capsys.readouterr().err
    assert call(monkeypatch, "features", photos / "note.png", "--run", run, "--output", tmp_path / "x.npz") == 2
    assert "none of the images could be used" in capsys.readouterr().err and not (tmp_path / "x.npz").exists()


def test_neighbours_as_lines_and_as_a_page(run, photos, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.html"
    words = ("neighbours", photos / "<b>0.png", "--among", photos, "--run", run, "--count", 2, "--json", "--html", page)
    assert call(monkeypatch, *words) == 3
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    codes = load(run).features(sorted(photos.glob("<b>*")))
    distances = np.linalg.norm(codes[1:] - codes[0], axis=1)
    order = np.argsort(distances)[:2]
    assert [near["image"] for near in row["nearest"]] == [str(photos / f"<b>{1 + place}.png") for place in order]
    assert [near["distance"] for near in row["nearest"]] == pytest.approx(distances[order].tolist(), rel=1e-5)
    html = page.read_text()
    assert html.count("data:image/png") + html.count("data:image/jpeg") == 3
    assert "Not used" in html and "<b>0.png" not in html and "http" not in html.replace("http-equiv", "")
