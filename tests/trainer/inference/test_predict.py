"""Predictions of files: the same as of a data set's samples, whatever the recipe; bad files; the three outputs."""

import dataclasses
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ImageError
from pipeline.loader.batches import EvaluationLoader
from pipeline.loader.config import LoaderConfig
from pipeline.loader.image_reader import ImageReader
from pipeline.preparation.image import make_image
from tests.helpers import loader_data_set
from tests.helpers.loader_data_set import make_data_set, photo_crop
from tests.helpers.synthetic_run import digits_config, make_run
from trainer.__main__ import main
from trainer.errors import RunError
from trainer.inference import load
from trainer.inference.predict import find_images
from trainer.training.evaluate import evaluate_run

pytestmark = pytest.mark.numeric

NUM_VAL = 6
RECIPES = [
    LoaderConfig(crop_px=32),
    LoaderConfig(crop_px=30, mean="image_center", color="deviation", color_divisor=1.1),
    LoaderConfig(crop_px=33, mean="channel", normalize="per_channel", color="deviation"),
    LoaderConfig(crop_px=32, mean="none", normalize="per_image"),
]


def source_file(folder: Path, number: int, size: tuple[int, int] = (40, 40), channels: int = 3) -> Path:
    """A photo as a PNG file, as a user has one; ``number`` is that of loader_data_set's samples."""
    path = folder / f"photo-{number}.png"
    Image.fromarray(photo_crop(number, *size, channels).squeeze()).save(path)
    return path


def prepared(folder: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set whose samples pipeline.preparation.image has encoded, as prepare does."""

    def encode(pixels: np.ndarray, encoding: str) -> bytes:
        from pipeline.config import ImageSettings

        return make_image(pixels, ImageSettings(resize_px=40, encoding=encoding)).data

    monkeypatch.setattr(loader_data_set, "encode", encode)
    return make_data_set(folder, encoding=encoding, val=NUM_VAL)


def stored_files(data: Path) -> list[bytes]:
    """The images of the val split, as they lie in its tars."""
    found = []
    for path in sorted((data / "val").glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    return found


@pytest.mark.parametrize("views", ["center", "ten"])
@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_files_become_what_the_loader_makes_of_samples(tmp_path, monkeypatch, encoding, views):
    """A data set's own JPEGs, and the files behind raw pixels: predictions add no loss that the file has not."""
    data = prepared(tmp_path / "data", encoding, monkeypatch)
    files: list[Path | bytes] = [source_file(tmp_path, 1000 + i) for i in range(NUM_VAL)]
    if encoding == "jpeg":
        files = stored_files(data)
    for config in RECIPES:
        reader = ImageReader(data, config, views=views)
        found = reader.images([reader.read(path) for path in files])
        (batch,) = EvaluationLoader(data, config, batch_size=NUM_VAL, views=views)
        assert found.shape == batch.images.shape
        difference = (found - batch.images).abs().numpy()
        # JPEG: DALI's decoder and libjpeg-turbo differ by a gray level here and there; raw: float rounding.
        scale = float(batch.images.std()) / 50
        assert difference.max() < (3 * scale if encoding == "jpeg" else 1e-4), config
        assert difference.mean() < 0.1 * scale, config


def test_reader_resizes_and_turns_as_prepare_does(tmp_path):
    data = make_data_set(tmp_path / "data", encoding="raw")
    reader = ImageReader(data, LoaderConfig(crop_px=32))
    wide = Image.fromarray(photo_crop(3, 160, 80, 3))
    wide.save(tmp_path / "wide.png")
    upright = reader.read(tmp_path / "wide.png")
    assert upright.shape == (40, 40, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    wide.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.abs(reader.read(tmp_path / "turned.png").astype(int) - upright).max() <= 1


def test_reader_names_what_is_wrong_with_a_file(tmp_path):
    reader = ImageReader(make_data_set(tmp_path / "data", encoding="raw"), LoaderConfig(crop_px=32))
    (tmp_path / "note.jpg").write_text("no image")
    with pytest.raises(ImageError, match="not an image by its content: expected JPEG, PNG"):
        reader.read(tmp_path / "note.jpg")
    with pytest.raises(ImageError, match="No such file"):
        reader.read(tmp_path / "gone.jpg")
    reader.settings = dataclasses.replace(reader.settings, max_bytes=1000)
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    with pytest.raises(ImageError, match="more than 1,000 bytes, the data set's --max-bytes"):
        reader.read(tmp_path / "endless.jpg")


@pytest.fixture(scope="module")
def run_and_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    data = make_data_set(folder / "data", encoding="png", channels=1, size=(32, 32), train=64, val=NUM_VAL)
    run = make_run(folder / "run", digits_config(), steps=3)
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"data": str(data)}))
    return run, data


@pytest.fixture
def images(tmp_path):
    """A folder with three good files, one of them in a subfolder, and two bad ones."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for i in range(2):
        source_file(folder, 1000 + i, (32, 32), 1)
    source_file(folder / "more", 1002, (32, 32), 1)
    (folder / "empty.png").touch()
    (folder / "truncated.png").write_bytes((folder / "photo-1000.png").read_bytes()[:200])
    (folder / ".hidden").write_text("x")
    return folder


@pytest.mark.parametrize("views", ["center", "ten"])
def test_predictions_are_those_of_an_evaluation(run_and_data, tmp_path, views):
    """Batches of other sizes add in another order; what that makes of a probability: see test_evaluate.py."""
    run, data = run_and_data
    evaluation = evaluate_run(run, data, views=views)
    files = [source_file(tmp_path, 1000 + i, (32, 32), 1) for i in range(NUM_VAL)]
    found = list(load(run, views=views).predict(files, top=20))
    assert [row.path for row in found] == files
    assert [row.classes[0].label for row in found] == evaluation.predicted.tolist()
    np.testing.assert_allclose([row.classes[0].probability for row in found], evaluation.confidence, rtol=1e-4)
    for row in found:
        assert len(row.classes) == 10
        assert sum(share.probability for share in row.classes) == pytest.approx(1, abs=1e-5)
        assert row.image.shape == (28, 28, 1)


def test_files_are_found_in_order_hidden_ones_not(images):
    names = [path.relative_to(images).as_posix() for path in find_images([images])]
    assert names == ["empty.png", "more/photo-1002.png", "photo-1000.png", "photo-1001.png", "truncated.png"]
    (images / "none").mkdir()
    with pytest.raises(RunError, match="has no files in it"):
        find_images([images / "none"])


def predict(monkeypatch, *words) -> int:
    monkeypatch.setattr("sys.argv", ["trainer", "predict", "--device", "cpu", *map(str, words)])
    return main()


def test_bad_files_are_a_line_each_and_the_others_are_predicted(run_and_data, images, monkeypatch, capsys):
    code = predict(monkeypatch, images, images / "gone.jpg", "--run", run_and_data[0], "--json")
    output = capsys.readouterr()
    assert code == 3
    rows = [json.loads(line) for line in output.out.splitlines()]
    assert len(rows) == 6
    assert ["error" in row for row in rows] == [True, False, False, False, True, True]
    assert [share["label"] for share in rows[1]["classes"]] != []
    assert len(rows[1]["classes"]) == 5
    errors = output.err.splitlines()
    assert len(errors) == 3
    assert errors[0] == f"error: {images / 'empty.png'}: empty file"
    assert errors[1].startswith(f"error: {images / 'truncated.png'}: truncated PNG")


def test_table_and_page(run_and_data, images, tmp_path, monkeypatch, capsys):
    html = tmp_path / "page.html"
    good = [images / "photo-1000.png", images / "more"]
    assert predict(monkeypatch, *good, "--run", run_and_data[0], "--html", html) == 0
    output = capsys.readouterr()
    assert output.err == f"wrote {html}\n"
    assert "photo-1002.png" in output.out
    page = html.read_text()
    assert page.count("data:image/png") == 2
    assert "photo-1002.png" in page and "Not used" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert predict(monkeypatch, images, "--run", run_and_data[0], "--html", html) == 3
    assert "Not used" in html.read_text() and "empty file" in html.read_text()


def test_images_are_kept_only_for_a_page(run_and_data, images):
    files = [images / "photo-1000.png", images / "empty.png"]
    found = list(load(run_and_data[0]).predict(files, images=False))
    assert [row.image for row in found] == [None, None]
    assert found[0].classes and found[1].error == "empty file"


def test_names_are_not_markup(run_and_data, tmp_path, monkeypatch, capsys):
    file = source_file(tmp_path, 1000, (32, 32), 1)
    odd = file.rename(tmp_path / "[red]<b>x.png")
    html = tmp_path / "page.html"
    assert predict(monkeypatch, odd, "--run", run_and_data[0], "--html", html) == 0
    assert "[red]<b>x.png" in capsys.readouterr().out
    assert "<b>x" not in html.read_text()


def test_a_run_that_does_not_name_its_data_asks_for_it(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", digits_config(), steps=3)
    assert predict(monkeypatch, tmp_path / "x.png", "--run", run) == 2
    assert capsys.readouterr().err == (
        f"error: {run} keeps no class table and no statistics: name its data set with --data DIR\n"
    )
