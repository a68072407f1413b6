"""The refusal matrix: whatever a command refuses, RUN and DATASET are afterwards what they were, to the byte.

Each row is one mistake: what is put in the way, the command, and words of the one line that names it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_run import RECIPE, flip, other_classes, other_images
from tests.helpers.training_commands import CONFIG, call
from tests.helpers.trees import tree
from trainer.training import checkpoint, run_folder
from trainer.training.run_lock import hold_run


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a row plays.

    Attributes:
        data: a data set; ``run``: a finished run on it; both shared, and only looked at.
        tmp: a folder of the row's own.
        stack: undoes what the row puts in the way.
        patch: monkeypatch.
    """

    data: Path
    run: Path
    tmp: Path
    stack: contextlib.ExitStack
    patch: pytest.MonkeyPatch

    @property
    def copy(self) -> Path:
        """The run again, to be damaged."""
        return self._copied("run", self.run)

    @property
    def data_copy(self) -> Path:
        """The data set again, to be damaged."""
        return self._copied("data", self.data)

    def _copied(self, name: str, of: Path) -> Path:
        if not (self.tmp / name).exists():
            shutil.copytree(of, self.tmp / name)
        return self.tmp / name

    @property
    def new(self) -> Path:
        """Where a run could be made; must not be there afterwards."""
        return self.tmp / "new"


@pytest.fixture
def place(tiny_data: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.delenv("RANK", raising=False)
    with contextlib.ExitStack() as stack:
        yield Place(tiny_data, tiny_run, tmp_path, stack, monkeypatch)


def train(place: Place, run: Path, *more: object, data: Path | None = None, sets: tuple[str, ...] = ()) -> list[object]:
    words = ["train", *RECIPE, *(word for text in sets for word in ("--set", text))]
    return [*words, "--data", data or place.data, "--run", run, *more]


def damaged_everywhere(place: Place) -> Path:
    for folder in checkpoint.checkpoints(place.copy):
        flip(folder / "tower-a.safetensors")
    return place.copy


def unreadable(place: Place) -> Path:
    """EIO where a checkpoint's file is read: not its content's fault."""
    digest, name = hashlib.file_digest, checkpoint.checkpoints(place.copy)[-1].name

    def fail(file: Any, algorithm: str) -> Any:
        if name in str(Path(f"/proc/self/fd/{file.fileno()}").readlink()):
            raise OSError(5, "Input/output error")
        return digest(file, algorithm)

    place.patch.setattr(hashlib, "file_digest", fail)
    return place.copy


def full(place: Place) -> Path:
    usage = namedtuple("usage", "total used free")
    place.patch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1000))
    return place.new


def not_writable(place: Place) -> Path:
    place.patch.setattr(os, "access", lambda path, mode: False)
    return place.new


def held(place: Place) -> Path:
    place.stack.enter_context(hold_run(place.copy))
    return place.copy


def holding(place: Place, *names: str) -> Path:
    """A folder with empty files of these names."""
    for name in names:
        (place.tmp / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (place.tmp / "folder" / name).touch()
    return place.tmp / "folder"


def recipe_alone(place: Place) -> Path:
    shutil.copy(place.run / "config.toml", holding(place, "notes.txt"))
    return place.tmp / "folder"


def another_program(place: Place) -> Path:
    (holding(place, "main.py", "checkpoints/theirs.pt") / "config.toml").write_text("[model]\nlayers = 3\n")
    return place.tmp / "folder"


def dangling(place: Place) -> Path:
    (place.tmp / "link").symlink_to(place.tmp / "gone")
    return place.tmp / "link"


def with_damage(place: Place, name: str) -> Path:
    flip(place.data_copy / name)
    return place.data_copy


def truncated(place: Place) -> Path:
    os.truncate(place.data_copy / "val" / "val-000000.tar", 512)
    return place.data_copy


def skip(place: Place) -> Path:
    key = (place.data / "train" / "train-000000.idx").read_text().split()[-1].split(".")[0]
    (place.tmp / "skip.txt").write_text(key + "\n")
    return place.tmp / "skip.txt"


def moved_away(place: Place) -> Path:
    environment = json.loads((place.copy / "environment.json").read_text())
    (place.copy / "environment.json").write_text(json.dumps(environment | {"data": "/nowhere/at/all"}))
    return place.copy


def edited(place: Place, *edits: tuple[str, str]) -> Path:
    """The run, with lines of its recipe changed by hand; by default one that steers the steps to come."""
    path = place.copy / "config.toml"
    lines = path.read_text().splitlines()
    for name, value in edits or (("dropout", "0.25"),):
        at = next(number for number, line in enumerate(lines) if line.startswith(f"{name} = "))
        lines[at] = f"{name} = {value}"
    path.write_text("\n".join(lines))
    return place.copy


AUTO = ("--resume", "auto")
Words = Callable[[Place], list[object]]
# mistake, command, words of the line. All of these also with --dry-run.
TRAIN: list[tuple[str, Words, str]] = [
    ("unknown field", lambda p: train(p, p.new, sets=("train.epoch=3",)), "did you mean train.epochs"),
    ("value", lambda p: train(p, p.new, sets=("train.epochs=0",)), "expected 1 to 1,073,741,824"),
    ("no recipe", lambda p: ["train", "--config", p.tmp / "x", "--data", p.data, "--run", p.new], "no recipe at"),
    ("replicas", lambda p: train(p, p.new, "--processes", 2, "--replicas", 3), "cannot be divided"),
    ("one process", lambda p: train(p, p.new, "--replicas", 2), "add --processes 2"),
    ("one tower", lambda p: train(p, p.new, "--processes", 2, sets=("model.towers=1",)), "runs in one process"),
    ("no data", lambda p: train(p, p.new, data=p.tmp / "none"), "no data set folder"),
    ("classes", lambda p: train(p, p.new, sets=("model.classes=12",)), "model.classes = 12"),
    ("channels", lambda p: train(p, p.new, sets=("model.in_channels=3",)), "model.in_channels = 3"),
    ("size", lambda p: train(p, p.new, sets=("model.image_px=40",)), "--resize 40"),
    ("split", lambda p: train(p, p.new, sets=("train.evaluate_split=test",)), "no split 'test'"),
    ("batch", lambda p: train(p, p.new, sets=("train.batch_size=99",)), "only 24 training images"),
    ("short tar", lambda p: train(p, p.new, data=truncated(p)), "512 bytes"),
    ("index", lambda p: train(p, p.new, data=with_damage(p, "train/train-000000.idx")), "not the index"),
    ("statistics", lambda p: train(p, p.new, data=with_damage(p, "statistics.npz")), "statistics.npz"),
    ("skip list", lambda p: train(p, p.new, "--skip-list", p.tmp / "none"), "cannot be read"),
    ("full disk", lambda p: train(p, full(p)), "are free there"),
    ("not writable", lambda p: train(p, not_writable(p)), "cannot be written"),
    ("inside the data set", lambda p: train(p, p.data / "run"), "lies in the data set"),
    ("the data set", lambda p: train(p, p.data), "is a data set"),
    ("among a run's files", lambda p: train(p, p.run / "checkpoints" / "new"), "is the run's own"),
    ("where a run keeps its data", lambda p: train(p, p.run / "trained_on", "--overwrite"), "is a data set"),
    ("a name too long", lambda p: train(p, p.tmp / ("x" * 300)), "File name too long"),
    ("data: a name too long", lambda p: train(p, p.new, data=p.tmp / ("x" * 300)), "File name too long"),
    ("a file", lambda p: train(p, holding(p, "x") / "x"), "is not a folder"),
    ("below a file", lambda p: train(p, holding(p, "x") / "x" / "run"), "is not a folder"),
    ("a link to nothing", lambda p: train(p, dangling(p)), "where nothing is"),
    ("something else", lambda p: train(p, holding(p, "a", "b")), "not a run (a, b; no config.toml)"),
    ("something else, overwrite", lambda p: train(p, holding(p, "a"), "--overwrite"), "not a run"),
    ("another program's, overwrite", lambda p: train(p, another_program(p), "--overwrite"), "no run that this version"),
    ("a recipe, overwrite", lambda p: train(p, recipe_alone(p), "--overwrite"), "a recipe and no run"),
    ("a run", lambda p: train(p, p.run), "--resume auto, or replace it with --overwrite"),
    ("both", lambda p: train(p, p.run, *AUTO, "--overwrite"), "--overwrite and --resume auto"),
    ("held", lambda p: train(p, held(p), *AUTO, sets=("train.epochs=3",)), "in use by process"),
    ("held, overwrite", lambda p: train(p, held(p), "--overwrite"), "in use by process"),
    ("seed", lambda p: train(p, p.run, *AUTO, sets=("train.seed=3",)), "train.seed = 3 instead of train.seed = 0"),
    ("fewer epochs", lambda p: train(p, p.run, *AUTO, sets=("train.epochs=1",)), "expected more epochs"),
    (
        "other data",
        lambda p: train(p, p.run, *AUTO, data=other_images(p.data, p.tmp / "o")),
        "is not the data set that",
    ),
    ("other classes", lambda p: train(p, p.run, *AUTO, data=other_classes(p.data, p.tmp / "o")), "is not the data set"),
    ("other skip list", lambda p: train(p, p.run, *AUTO, "--skip-list", skip(p)), "--skip-list: it leaves 1"),
    ("damaged", lambda p: train(p, damaged_everywhere(p), *AUTO), "no complete checkpoint"),
    ("unreadable", lambda p: train(p, unreadable(p), *AUTO), "cannot be read: Input/output error"),
    ("edited recipe", lambda p: ["train", "--resume", edited(p)], "config.toml was edited: model.dropout = 0.25"),
    (
        "edited recipe, longer",
        lambda p: ["train", "--resume", edited(p, ("weight_decay", "0.5"), ("epochs", "9"))],
        "optimizer.weight_decay = 0.5 instead of",
    ),
    ("edited to nonsense", lambda p: ["train", "--resume", edited(p, ("epochs", "'x'"))], "config.toml: train.epochs"),
    ("two folders", lambda p: train(p, p.new, "--resume", p.run), "are two folders"),
    ("no such run", lambda p: ["train", "--resume", p.new], "no run at"),
    ("data gone", lambda p: ["train", "--resume", moved_away(p)], "which is gone: say with --data DIR"),
    ("no --data", lambda p: ["train", *RECIPE, "--run", p.new], "--data DIR is missing"),
    ("no --run", lambda p: ["train", *RECIPE, "--data", p.data], "--run DIR is missing"),
]


def evaluate(p: Place, *more: object, run: Path | None = None, data: Path | None = None) -> list[object]:
    return ["evaluate", "--run", run or p.run, "--data", data or p.data, *more]


def predict(p: Place, *more: object, run: Path | None = None) -> list[object]:
    return ["predict", CONFIG, "--run", run or p.run, *more]


def export(p: Place, output: Path, *more: object, run: Path | None = None) -> list[object]:
    return ["export", "--run", run or p.run, "--output", output, *more]


def newest_tower(p: Place) -> Path:
    return checkpoint.checkpoints(p.run)[-1] / "tower-a.safetensors"


def import_(p: Place, run: Path, *more: object, weights: Path | None = None) -> list[object]:
    return ["import", "--config", CONFIG, "--weights", weights or newest_tower(p), "--run", run, *more]


def no_kept_manifest(p: Place) -> Path:
    flip(p.copy / run_folder.DATA_SET_NAME / "manifest.json")
    return p.copy


OTHERS: list[tuple[str, Words, str]] = [
    ("evaluate: no run", lambda p: evaluate(p, run=p.new), "no run at"),
    ("evaluate: no data", lambda p: evaluate(p, data=p.new), "no data set folder"),
    ("evaluate: classes", lambda p: evaluate(p, data=other_classes(p.data, p.tmp / "o")), "class 3 is 'other' there"),
    ("evaluate: split", lambda p: evaluate(p, "--split", "test"), "no split 'test'"),
    ("evaluate: checkpoint", lambda p: evaluate(p, "--checkpoint", 99), "it has checkpoints of steps"),
    ("evaluate: damaged", lambda p: evaluate(p, run=damaged_everywhere(p)), "no complete checkpoint"),
    ("evaluate: unreadable", lambda p: evaluate(p, run=unreadable(p)), "cannot be read: Input/output error"),
    ("evaluate: short tar", lambda p: evaluate(p, data=truncated(p)), "512 bytes"),
    ("evaluate: into the run", lambda p: evaluate(p, "--confusion", p.run / "result.json"), "is the run's own"),
    ("evaluate: into the data set", lambda p: evaluate(p, "--confusion", p.data / "c.png"), "lies in the data set"),
    ("evaluate: suffix", lambda p: evaluate(p, "--confusion", p.tmp / "c.txt"), "--confusion"),
    ("evaluate: data gone", lambda p: ["evaluate", "--run", moved_away(p)], "which is gone"),
    ("evaluate: edited", lambda p: evaluate(p, run=edited(p)), "config.toml was edited: model.dropout = 0.25"),
    (
        "predict: edited",
        lambda p: predict(p, run=edited(p, ("alpha", "0.5"))),
        "was edited: model.lrn.alpha",
    ),
    ("export: edited", lambda p: export(p, p.tmp / "x.onnx", run=edited(p)), "config.toml was edited"),
    ("predict: no run", lambda p: predict(p, run=p.new), "no run at"),
    ("predict: classes", lambda p: predict(p, "--data", other_classes(p.data, p.tmp / "o")), "class 3 is 'other'"),
    ("predict: kept data damaged", lambda p: predict(p, run=no_kept_manifest(p)), "manifest.json is damaged: copy"),
    ("predict: page in the run", lambda p: predict(p, "--html", p.run / "config.toml"), "is the run's own"),
    ("predict: page is a folder", lambda p: predict(p, "--html", p.tmp), "is a folder"),
    ("predict: empty folder", lambda p: ["predict", holding(p, "f/.hidden"), "--run", p.run], "has no files in it"),
    ("export: no run", lambda p: export(p, p.tmp / "x.onnx", run=p.new), "no run at"),
    ("export: a name too long", lambda p: export(p, p.tmp / ("x" * 300 + ".onnx")), "File name too long"),
    ("export: suffix", lambda p: export(p, p.tmp / "x.bin"), "ends in .safetensors or .onnx"),
    ("export: a checkpoint", lambda p: export(p, newest_tower(p)), "is the run's own"),
    ("export: into the data set", lambda p: export(p, p.data / "x.onnx"), "lies in the data set"),
    ("export: classes", lambda p: export(p, p.tmp / "x.onnx", "--data", other_classes(p.data, p.tmp / "o")), "class 3"),
    ("export: unreadable", lambda p: export(p, p.tmp / "x.onnx", run=unreadable(p)), "Input/output error"),
    ("import: a run", lambda p: import_(p, p.run), "holds a run"),
    ("import: inside the data set", lambda p: import_(p, p.data / "run"), "lies in the data set"),
    ("import: among a run's files", lambda p: import_(p, p.run / "profile" / "new"), "is the run's own"),
    ("import: something else", lambda p: import_(p, holding(p, "a")), "not a run"),
    ("import: no weights", lambda p: import_(p, p.new, weights=p.tmp / "none"), "no weights at"),
    ("import: no safetensors", lambda p: import_(p, p.new, weights=CONFIG), "cannot be read as safetensors"),
    ("import: one tower's", lambda p: import_(p, p.new), "one tower of a checkpoint"),
    ("import: not writable", lambda p: import_(p, not_writable(p)), "cannot be written"),
    ("import: data", lambda p: import_(p, p.new, "--data", p.tmp / "none"), "no data set folder"),
    ("report: no run", lambda p: ["report", "--run", p.new], "no run folder"),
    ("report: classes", lambda p: ["report", "--run", p.run, "--data", other_classes(p.data, p.tmp / "o")], "class 3"),
    ("report: damaged", lambda p: ["report", "--run", damaged_everywhere(p)], "no complete checkpoint"),
    ("bench: classes", lambda p: ["bench", *RECIPE, "--set", "model.classes=12", "--data", p.data], "model.classes"),
    ("bench: both", lambda p: ["bench", "--synthetic", "--data", p.data], "not both"),
    ("bench: into the run", lambda p: ["bench", "--synthetic", "--json", p.run / "result.json"], "the run's own"),
    (
        "bench: into the data set",
        lambda p: ["bench", "--data", p.data, "--html", p.data / "b.html"],
        "lies in the data",
    ),
]
ROWS = [
    *((f"train: {name}", words, said) for name, words, said in TRAIN),
    *((f"dry run: {name}", lambda p, words=words: [*words(p), "--dry-run"], said) for name, words, said in TRAIN),
    *OTHERS,
]


@pytest.mark.parametrize(("words", "said"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_refusal_changes_nothing(
    place: Place, words: Words, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, exit code 2, and every file of RUN, DATASET and what lies beside is what it was."""
    asked = words(place)
    folders = (place.run, place.data, place.tmp)
    before = [tree(folder) for folder in folders]
    capsys.readouterr()
    assert call(monkeypatch, *asked) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    assert said in errors[0]
    assert not errors[0].startswith("error: [") and "Traceback" not in errors[0]
    assert [tree(folder) for folder in folders] == before


def test_no_reader_advises_to_overwrite() -> None:
    """Whoever cannot read a run must not be told to remove it; only a start into a run may name the option."""
    for path in (run_folder.__file__, checkpoint.__file__, *Path("trainer/inference").glob("*.py")):
        assert "--overwrite" not in Path(path).read_text(), path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is made."""
    before = tree(place.tmp)
    assert call(place.patch, *train(place, place.new, "--device", "cuda")) == 2
    assert "no GPU" in capsys.readouterr().err
    assert tree(place.tmp) == before


@pytest.mark.parametrize("device", ["cuda:2", "cuda:9", "cuda:-1", "cuda:", "cuda:x", "cpu:0", "tpu", "CUDA", ""])
@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "bench"])
def test_a_device_with_a_name_or_number_that_there_is_not(
    place: Place, command: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two GPUs there is no third; and what is no device never becomes one."""
    place.patch.setattr(torch.cuda, "is_available", lambda: True)
    place.patch.setattr(torch.cuda, "device_count", lambda: 2)
    words = {
        "train": train(place, place.new),
        "evaluate": evaluate(place),
        "predict": predict(place),
        "bench": ["bench", *RECIPE, "--data", place.data],
    }[command]
    before = tree(place.tmp)
    with contextlib.suppress(SystemExit):
        assert call(place.patch, *words, f"--device={device}") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "--device" in errors[0] and device in errors[0], errors
    assert "expected cpu, cuda or cuda:N" in errors[0] or "torch sees 2 GPUs here, cuda:0 to cuda:1" in errors[0]
    assert tree(place.tmp) == before
