"""A data set of 24 images and a run of two epochs of three steps on it, made in this process in about a second."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from pipeline.manifest import MANIFEST_NAME, ClassRecord, Manifest, read_manifest
from tests.helpers.loader_data_set import make_data_set
from tests.helpers.training_commands import CONFIG, call

OVERRIDES = (
    "train.epochs=2",
    "train.batch_size=8",
    "train.evaluate_every_epochs=0",
    "train.checkpoint_every_steps=1",
    "train.keep_checkpoints=2",
    "train.threads=1",
    "optimizer.milestones=[]",
)
LAST = 6  # its last step
RECIPE = ("--config", CONFIG, *(word for text in OVERRIDES for word in ("--set", text)))


def make_tiny_data(folder: Path) -> Path:
    return make_data_set(folder, encoding="png", channels=1, size=(32, 32), train=24, val=10)


def make_tiny_run(folder: Path, data: Path) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(monkeypatch, "train", *RECIPE, "--data", data, "--run", folder) == 0
    return folder


def change_manifest(data: Path, copy: Path, **changes: object) -> Path:
    """A copy of a data set whose manifest says something else, and is as sound."""
    shutil.copytree(data, copy)
    changed: Manifest = dataclasses.replace(read_manifest(data), **changes)  # type: ignore[arg-type]
    (copy / MANIFEST_NAME).write_text(changed.to_json())
    return copy


def other_classes(data: Path, copy: Path) -> Path:
    """As many classes, of which one has another name."""
    classes = list(read_manifest(data).classes)
    classes[3] = ClassRecord("other", "other")
    return change_manifest(data, copy, classes=tuple(classes))


def other_images(data: Path, copy: Path) -> Path:
    """The same classes, and another fingerprint."""
    return change_manifest(data, copy, source="another")


def flip(path: Path) -> None:
    """Changes one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
