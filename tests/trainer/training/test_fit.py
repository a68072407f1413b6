"""A recipe and a data set: numbers taken from it, every misfit in one message with the command that mends it, notes."""

import dataclasses
import itertools
import shlex
from pathlib import Path

import pytest

from pipeline.manifest import ClassRecord, ImageFormat, Manifest, SplitRecord
from tests.helpers.recipes import CONFIGS
from trainer.config import Config, load_config
from trainer.errors import RecipeError
from trainer.training.fit import check_fits, check_resolved, notes, resolve

DATA = Path("data/photos")


def manifest(*, classes: int = 3, channels: int = 3, side: int | None = 144, **splits: int) -> Manifest:
    """A data set's record, without its files."""
    return Manifest(
        format=1,
        source="folder",
        settings={},
        image=ImageFormat("jpeg", channels, side, side),
        classes=tuple(ClassRecord(f"c{label}", f"class {label}") for label in range(classes)),
        label_order="alphabetical",
        splits={name: SplitRecord(count, 0, ()) for name, count in (splits or {"train": 50, "val": 10}).items()},
        files={},
        num_found=sum((splits or {"train": 50, "val": 10}).values()),
    )


def recipe(name: str, *changes: str) -> Config:
    return load_config(CONFIGS / f"{name}.toml", changes)


def refusal(config: Config, record: Manifest, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["trainer", *words])
    with pytest.raises(RecipeError) as caught:
        check_fits(config, record, DATA, extend=bool(words))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("channels", [1, 3])
def test_zero_means_as_the_data_set(channels: int) -> None:
    config = check_fits(recipe("photos"), manifest(classes=7, channels=channels), DATA)
    assert (config.model.classes, config.model.in_channels) == (7, channels)
    assert config == resolve(config, manifest(classes=9))  # numbers that are there stay


def test_a_net_without_a_size_is_not_described() -> None:
    check_resolved(recipe("digits"))
    with pytest.raises(RecipeError, match=r"model.classes = 0 and model.in_channels = 0: .*--set model.classes=10"):
        check_resolved(recipe("photos"))


def test_all_misfits_are_in_one_message_and_its_command_mends_them(monkeypatch) -> None:
    """The digits' recipe on photos, as a new user would try; the command at the end fits."""
    record = manifest(train=20, test=5, side=26)
    words = ["train", "--config", str(CONFIGS / "digits.toml"), "--data", "my photos", "--run", "r"]
    message = refusal(recipe("digits"), record, monkeypatch, *words)
    for part in ("model.in_channels = 1", "model.classes = 10", "image_px = 28", "only 20 training", "no split 'val'"):
        assert part in message
    command = shlex.split(message.partition("; try: ")[2])
    assert command[:10] == ["python", "-m", "trainer", *words]
    changes = [after for before, after in itertools.pairwise(command) if before == "--set"]
    check_fits(recipe("digits", *changes), record, DATA)


def test_what_no_option_mends_names_what_prepare_should_do(monkeypatch) -> None:
    words = ("train", "--data", "d")
    assert "--set" not in refusal(recipe("photos"), manifest(side=16), monkeypatch, *words)
    assert "--resize 128 or more" in refusal(recipe("photos"), manifest(side=16), monkeypatch, *words)
    assert "--val-fraction" in refusal(recipe("photos"), manifest(train=50), monkeypatch, *words)
    assert "two class folders" in refusal(recipe("photos"), manifest(classes=1), monkeypatch, *words)


def test_other_commands_do_not_offer_to_change_a_run(monkeypatch) -> None:
    assert "try:" not in refusal(recipe("digits"), manifest(), monkeypatch)


def test_notes_tell_of_small_crops_and_dropped_images() -> None:
    photos, record = resolve(recipe("photos", "data.last_batch=drop"), manifest()), manifest()
    assert notes(photos, record, 48) == notes(resolve(recipe("photos"), record), record, 53) == []
    (dropped,) = notes(photos, record, 53)
    assert dropped.startswith("an epoch leaves 5 of 53 training images out, others in each")
    (same,) = notes(dataclasses.replace(photos, data=dataclasses.replace(photos.data, shuffle="once")), record, 53)
    assert "the same in each" in same
    digits = recipe("digits", "model.in_channels=3")
    (small,) = notes(digits, manifest(side=256), 64)
    assert small.startswith("model.image_px = 28, and the images are 256 px: a crop shows 1 % of an image")
    assert "--resize 32" in small or "--resize 31" in small
    assert notes(digits, manifest(side=56), 64) == [] != notes(digits, manifest(side=57), 64)
