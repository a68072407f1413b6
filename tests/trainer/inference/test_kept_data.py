"""A run is complete in itself: what it keeps of its data set serves predict, export and report; others are compared."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from pipeline.manifest import STATISTICS_NAME, SplitRecord, read_manifest
from tests.helpers.tiny_run import RECIPE, change_manifest, flip, other_classes, other_images
from tests.helpers.trees import tree
from trainer.training import kept_data, run_folder
from trainer.training.checkpoint import latest_checkpoint

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def alone(tiny_run: Path, tmp_path: Path) -> Path:
    """A run whose data set is nowhere any more."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "alone"))
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"data": "/nowhere/at/all"}))
    return run


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(np.arange(40 * 40, dtype=np.uint16).reshape(40, 40).astype(np.uint8)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def shares(said: str) -> dict[str, float]:
    return {row["title"]: row["probability"] for row in json.loads(said)["classes"]}


def test_what_a_run_keeps_is_its_data_sets(tiny_run: Path, tiny_data: Path) -> None:
    """Byte for byte: class table, image format, fingerprint, statistics."""
    for name in ("manifest.json", STATISTICS_NAME):
        assert (tiny_run / run_folder.DATA_SET_NAME / name).read_bytes() == (tiny_data / name).read_bytes()
    assert kept_data.kept_manifest(tiny_run) == read_manifest(tiny_data)


def test_without_a_data_set(
    alone: Path, tiny_run: Path, tiny_data: Path, image: Path, trainer: Call, tmp_path: Path
) -> None:
    """predict says what it says with one; export has the class names; report is written; nothing warns."""
    expected = trainer("predict", image, "--run", tiny_run, "--data", tiny_data, "--json", "--top", 10)
    found = trainer("predict", image, "--run", alone, "--json", "--top", 10)
    assert (found[0], found[2]) == (0, "")
    assert shares(found[1]) == shares(expected[1])
    code, _, errors = trainer("export", "--run", alone, "--output", tmp_path / "net.safetensors")
    assert (code, errors) == (0, "")
    with safe_open(tmp_path / "net.safetensors", "numpy") as file:
        names = json.loads(file.metadata()["classes"])
    assert names == [row.title for row in read_manifest(tiny_data).classes]
    assert trainer("report", "--run", alone)[0] == 0


def test_another_data_set_is_said_aloud(
    tiny_run: Path, tiny_data: Path, image: Path, trainer: Call, tmp_path: Path
) -> None:
    """The same classes and other images: a warning, and the same figures, as the run's own statistics apply."""
    other = other_images(tiny_data, tmp_path / "other")
    expected = json.loads(trainer("evaluate", "--run", tiny_run, "--data", tiny_data, "--json")[1])
    code, said, errors = trainer("evaluate", "--run", tiny_run, "--data", other, "--json")
    assert code == 0 and json.loads(said) == expected
    warning = f"warning: {other} is not the data set that {tiny_run} was trained on"
    assert errors.startswith(warning) and "the run's" in errors
    for words in (
        ("predict", image, "--run", tiny_run, "--data", other),
        ("export", "--run", tiny_run, "--data", other, "--output", tmp_path / "net.onnx"),
        ("report", "--run", Path(shutil.copytree(tiny_run, tmp_path / "run")), "--data", other),
    ):
        code, _, errors = trainer(*words)
        assert code == 0 and " is not the data set that " in errors, words


def test_the_statistics_are_those_of_training(tiny_run: Path, tiny_data: Path, trainer: Call, tmp_path: Path) -> None:
    """Another data set's own mean image does not count: subtracting it would shift what the net sees."""
    other = Path(shutil.copytree(tiny_data, tmp_path / "other"))
    with np.load(other / STATISTICS_NAME) as found:
        arrays = {name: found[name] for name in found.files}
    arrays["mean_image"] = 255 - arrays["mean_image"]
    np.savez(other / STATISTICS_NAME, **arrays)
    content = (other / STATISTICS_NAME).read_bytes()
    record = {"size_bytes": len(content), "sha256": kept_data.file_sha256(other / STATISTICS_NAME)}
    files = read_manifest(other).files | {STATISTICS_NAME: record}
    shifted = change_manifest(other, tmp_path / "shifted", files=files)
    losses = [
        json.loads(trainer("evaluate", "--run", tiny_run, "--data", data, "--json")[1])["loss"]
        for data in (tiny_data, shifted)
    ]
    assert losses[0] == losses[1]
    without = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.rmtree(without / run_folder.DATA_SET_NAME)
    assert json.loads(trainer("evaluate", "--run", without, "--data", shifted, "--json")[1])["loss"] != losses[0]


def test_other_classes_are_refused_by_name(
    tiny_run: Path, tiny_data: Path, image: Path, trainer: Call, tmp_path: Path
) -> None:
    """Whatever order or name differs; the first that does."""
    other = other_classes(tiny_data, tmp_path / "other")
    rows = read_manifest(tiny_data).classes
    swapped = change_manifest(tiny_data, tmp_path / "swapped", classes=(rows[1], rows[0], *rows[2:]))
    for data, known in ((other, rows[3].name), (swapped, rows[0].name)):
        for words in (("evaluate",), ("predict", image), ("export", "--output", tmp_path / "net.onnx"), ("report",)):
            code, _, errors = trainer(*words, "--run", tiny_run, "--data", data)
            assert code == 2 and f"{known!r} in the data set that {tiny_run} was trained on" in errors, words
    assert not (tmp_path / "net.onnx").exists()


def test_a_split_of_its_own_is_enough(tiny_run: Path, tiny_data: Path, trainer: Call, tmp_path: Path) -> None:
    """Held-out images alone can be evaluated: what training needs of a data set, evaluation does not."""
    val = read_manifest(tiny_data).splits["val"]
    renamed = tuple(dataclasses.replace(shard, name=shard.name.replace("val", "test")) for shard in val.shards)
    split = SplitRecord(val.num_samples, 0, renamed)
    held_out = change_manifest(tiny_data, tmp_path / "held-out", splits={"test": split}, files={})
    (held_out / "val").rename(held_out / "test")
    for path in (held_out / "test").iterdir():
        path.rename(path.with_name(path.name.replace("val", "test")))
    (held_out / STATISTICS_NAME).unlink()
    code, said, errors = trainer("evaluate", "--run", tiny_run, "--data", held_out, "--split", "test", "--json")
    assert code == 0, errors
    assert json.loads(said)["num_samples"] == 10


@pytest.mark.parametrize("name", ["manifest.json", STATISTICS_NAME])
def test_damage_to_what_is_kept(alone: Path, image: Path, tiny_data: Path, trainer: Call, name: str) -> None:
    """One line that names the file and how to mend it; nobody is sent to prepare the data set again."""
    flip(alone / run_folder.DATA_SET_NAME / name)
    code, _, errors = trainer("predict", image, "--run", alone)
    assert code == 2 and len(errors.splitlines()) == 1
    assert f"{name} is damaged: copy {name} there" in errors and "prepare" not in errors
    shutil.copy(tiny_data / name, alone / run_folder.DATA_SET_NAME)
    assert trainer("predict", image, "--run", alone)[0] == 0


def test_what_is_kept_cannot_be_read(alone: Path, image: Path, trainer: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not damaged: the reason."""
    open_ = os.open

    def fail(path: Any, *words: Any, **options: Any) -> int:
        if Path(os.fsdecode(path)).parent.name == run_folder.DATA_SET_NAME:
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, *words, **options)

    monkeypatch.setattr(os, "open", fail)
    _, _, errors = trainer("predict", image, "--run", alone)
    assert "cannot be read (Permission denied)" in errors and "damaged" not in errors


def test_runs_of_before_and_imported_ones(
    alone: Path, tiny_run: Path, tiny_data: Path, image: Path, trainer: Call, tmp_path: Path
) -> None:
    """Without a copy the noted folder serves; without that, one line. import keeps the file's, or --data's."""
    old = Path(shutil.copytree(tiny_run, tmp_path / "old"))
    shutil.rmtree(old / run_folder.DATA_SET_NAME)
    assert trainer("predict", image, "--run", old)[0] == 0
    shutil.rmtree(alone / run_folder.DATA_SET_NAME)
    code, _, errors = trainer("predict", image, "--run", alone)
    assert code == 2 and "trained on was at /nowhere/at/all: name its data set with --data DIR" in errors
    weights = tmp_path / "net.safetensors"
    assert trainer("export", "--run", tiny_run, "--output", weights)[0] == 0
    for number, data in enumerate(((), ("--data", tiny_data))):
        run = tmp_path / f"imported{number}"
        assert trainer("import", *RECIPE, "--weights", weights, "--run", run, *data)[0] == 0
        assert latest_checkpoint(run) is not None and not (run / ".lock").exists()
        assert trainer("predict", image, "--run", run)[0] == 0


def test_readers_leave_everything_as_it_is(
    tiny_run: Path, tiny_data: Path, image: Path, trainer: Call, tmp_path: Path
) -> None:
    """evaluate, predict and export neither lock nor touch; they read a run that is being trained, too."""
    before = tree(tiny_run), tree(tiny_data)
    assert trainer("evaluate", "--run", tiny_run)[0] == 0, "the data set is where the run notes it"
    assert trainer("predict", image, "--run", tiny_run, "--html", tmp_path / "page.html")[0] == 0
    assert trainer("export", "--run", tiny_run, "--output", tmp_path / "net.onnx")[0] == 0
    assert (tree(tiny_run), tree(tiny_data)) == before


def test_a_failed_import_leaves_no_run(
    tiny_run: Path, trainer: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle: the folder is as it was, and the next try works."""
    weights = tmp_path / "net.safetensors"
    trainer("export", "--run", tiny_run, "--output", weights)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    words = ("import", *RECIPE, "--weights", weights, "--run", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("trainer.training.checkpoint.commit", full)
        code, _, errors = trainer(*words)
    assert code == 2 and "cannot be written: No space left" in errors
    assert not (tmp_path / "run").exists()
    assert trainer(*words)[0] == 0
