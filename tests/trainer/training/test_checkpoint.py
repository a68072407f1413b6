"""Checkpoints: complete or invisible, exact, readable by one process or two, and never trusted unseen."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.side_by_side import lone_tower
from trainer.config import Config, load_config
from trainer.errors import CheckpointError, DamagedError
from trainer.model.alexnet import AlexNet
from trainer.training import checkpoint
from trainer.training.optimizer import PaperSGD

CONFIG = load_config(Path(__file__).resolve().parents[3] / "configs" / "digits.toml")


def make(tower: str = "", seed: int = 0, config: Config = CONFIG) -> tuple[AlexNet, PaperSGD]:
    """A net and its optimizer, with velocities that are not zero."""
    net = lone_tower(config.model, tower, seed) if tower else AlexNet(config.model, seed=seed)
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    for parameter in net.parameters():
        optimizer.velocity(parameter).copy_(parameter.detach() * 0.5 + 1)
    return net, optimizer


def write(run: Path, step: int, *parts: tuple[AlexNet, PaperSGD]) -> Path:
    """A checkpoint written by one process, or by several, each with its own towers."""
    for net, optimizer in parts:
        checkpoint.save_towers(checkpoint.unfinished(run, step), net, optimizer)
    return checkpoint.commit(run, step, config="c", loader={"position": step}, towers=("a", "b"))


def test_two_processes_write_what_one_reads_and_the_other_way_round(tmp_path: Path) -> None:
    """Names and bytes do not depend on who wrote them."""
    one, two = tmp_path / "one", tmp_path / "two"
    folder = write(one, 7, make())
    write(two, 7, make("b"), make("a"))
    for name in ("tower-a.safetensors", "tower-b.safetensors"):
        assert (checkpoint.folder_of(one, 7) / name).read_bytes() == (checkpoint.folder_of(two, 7) / name).read_bytes()
    net, optimizer = make("b", seed=9)
    expected_net, expected_optimizer = make()
    checkpoint.load_towers(folder, net, optimizer)
    weights = dict(expected_net.named_parameters())
    expected = expected_net.split_towers(weights)["b"]
    velocities = expected_net.split_towers({n: expected_optimizer.velocity(p) for n, p in weights.items()})["b"]
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, expected[name])
        assert torch.equal(optimizer.velocity(parameter), velocities[name])
    assert checkpoint.read_record(folder).loader == {"position": 7}


def test_unfinished_checkpoints_are_invisible(tmp_path: Path) -> None:
    """Killed before the commit: the one before is still the newest, and the rest is swept at the next save."""
    first = write(tmp_path, 1, make())
    net, optimizer = make()
    checkpoint.save_towers(checkpoint.unfinished(tmp_path, 2), net, optimizer)
    assert checkpoint.latest_checkpoint(tmp_path) == first
    checkpoint.rotate(tmp_path, first, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    """Only the newest stay."""
    for step in (1, 2, 10):
        written = write(tmp_path, step, make())
    checkpoint.rotate(tmp_path, written, 2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    """One flipped bit, a cut file, a missing file."""
    folder = write(tmp_path, 3, make())
    path = folder / "tower-b.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes(data) if damage == "flip" else bytes(data[:-10]))
    with pytest.raises(CheckpointError, match=r"tower-b\.safetensors"):
        checkpoint.read_record(folder)


def test_another_net_is_refused(tmp_path: Path) -> None:
    """The tensor that does not fit is named with both shapes."""
    folder = write(tmp_path, 3, make())
    config = load_config(Path(__file__).resolve().parents[3] / "configs" / "digits.toml", ["model.hidden=[32, 32]"])
    net, optimizer = make(config=config)
    with pytest.raises(CheckpointError, match=r"fc6\.weight is \(128, 128\), and this recipe.s net needs \(32, 128\)"):
        checkpoint.load_towers(folder, net, optimizer)


def write_rated(run: Path, step: int, top1: float | None) -> Path:
    """A checkpoint with the accuracy that its record states."""
    net, optimizer = make()
    checkpoint.save_towers(checkpoint.unfinished(run, step), net, optimizer)
    return checkpoint.commit(run, step, config="c", loader=None, towers=("a", "b"), top1=top1)


def test_the_best_is_kept_besides_the_newest(tmp_path: Path) -> None:
    """The newest of equals is the best one; it survives any number of worse ones."""
    for step, top1 in ((1, 0.7), (2, 0.9), (3, 0.9), (4, None), (5, 0.8), (6, 0.85)):
        checkpoint.rotate(tmp_path, write_rated(tmp_path, step, top1), 2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [f"step-0000000{n}" for n in (3, 5, 6)]
    for which, step in (("best", 3), ("newest", 6), ("5", 5), ("step-00000005", 5)):
        found = checkpoint.choose(tmp_path, which)
        assert found is not None
        assert found.record.step == step


def test_a_damaged_newest_is_passed_over_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one before is used; asked for by its number, the damaged one is refused; with none whole, an error."""
    write_rated(tmp_path, 1, 0.5)
    with (write_rated(tmp_path, 2, 0.6) / "tower-a.safetensors").open("ab") as file:
        file.write(b"x")
    found = checkpoint.choose(tmp_path)
    assert found is not None
    assert found.record.step == 1
    assert "tower-a.safetensors is damaged" in capsys.readouterr().err
    for which in ("2", "best"):
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.choose(tmp_path, which)
    (tmp_path / "checkpoints" / "step-00000001" / "tower-b.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint.choose(tmp_path, quiet=True)


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    """The steps that there are, in the message."""
    assert checkpoint.choose(tmp_path) is None
    write_rated(tmp_path, 4, None)
    with pytest.raises(CheckpointError, match=r"--checkpoint 7: it has checkpoints of steps 4"):
        checkpoint.choose(tmp_path, "7")
    with pytest.raises(CheckpointError, match=r"no checkpoint has been evaluated"):
        checkpoint.choose(tmp_path, "best")


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("count", [1, 2, 9])
def test_rotation_never_removes_what_was_just_written(tmp_path: Path, count: int) -> None:
    """Whatever step the others are of: a run that went back writes smaller numbers than are there."""
    for step in (3, 10, 11):
        write_rated(tmp_path, step, None)
    checkpoint.rotate(tmp_path, write_rated(tmp_path, 5, None), count)
    kept = {1: [5], 2: [5, 11], 9: [3, 5, 10, 11]}[count]
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]


def test_killed_between_the_rename_and_the_rotation(tmp_path: Path) -> None:
    """One too many, all of them whole: the newest is used, and the next rotation removes the rest."""
    for step in (1, 2, 3):
        write_rated(tmp_path, step, None)
    found = checkpoint.choose(tmp_path)
    assert found is not None and found.record.step == 3
    checkpoint.rotate(tmp_path, write_rated(tmp_path, 4, None), 1)
    assert names(tmp_path) == ["step-00000004"]


def test_damaged_ones_are_set_aside_and_few(tmp_path: Path) -> None:
    """Under names that no reader takes; the newest two of all that ever were."""
    for step in (1, 2, 3, 4):
        write_rated(tmp_path, step, 0.5)
    for step in (2, 3, 4):
        (checkpoint.folder_of(tmp_path, step) / "tower-a.safetensors").write_bytes(b"x")
    found = checkpoint.choose(tmp_path, quiet=True)
    assert found is not None and found.record.step == 1
    assert [path.name for path in found.passed_over] == [f"step-0000000{step}" for step in (4, 3, 2)]
    checkpoint.set_aside(tmp_path, [path.name for path in found.passed_over])
    assert names(tmp_path) == [".damaged-step-00000003", ".damaged-step-00000004", "step-00000001"]
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000001"]
    best = checkpoint.choose(tmp_path, "best")
    assert best is not None and best.record.step == 1


def test_a_step_that_is_written_again(tmp_path: Path) -> None:
    """What had its name is never half removed under it."""
    first = write_rated(tmp_path, 7, 0.1)
    assert write_rated(tmp_path, 7, 0.2) == first
    assert checkpoint.read_record(first).top1 == 0.2


def unreadable_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    digest = hashlib.file_digest

    def fail(file: Any, algorithm: str) -> Any:
        if Path(f"/proc/self/fd/{file.fileno()}").readlink().parent == folder:
            raise OSError(5, "Input/output error")
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", fail)


def unreadable_record(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    read = checkpoint.parse_object

    def fail(path: Path) -> dict[str, Any]:
        if path.parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(checkpoint, "parse_object", fail)


def unreadable_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def fail(path: Path) -> Any:
        raise OSError(116, os.strerror(116), str(path))

    monkeypatch.setattr(Path, "iterdir", fail)


@pytest.mark.parametrize("how", [unreadable_file, unreadable_record, unreadable_folder])
def test_what_cannot_be_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[[pytest.MonkeyPatch, Path], None]
) -> None:
    """A failing disk, another user's file, a stale mount: the reason, and nobody goes back to an older one silently."""
    for step in (1, 2):
        folder = write_rated(tmp_path, step, 0.5)
    how(monkeypatch, folder)
    for which in ("newest", "best", "2"):
        with pytest.raises(CheckpointError, match=r"cannot be read: (Input/output|Permission denied|Stale)") as found:
            checkpoint.choose(tmp_path, which)
        assert not isinstance(found.value, DamagedError) and "damaged" not in str(found.value)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"step": 1}', "null"])
def test_a_damaged_record(tmp_path: Path, content: str | None) -> None:
    """Missing, cut or something else: the one before is used, and rotation and the best one do not stumble."""
    first = write_rated(tmp_path, 1, 0.5)
    record = write_rated(tmp_path, 2, 0.9) / checkpoint.RECORD
    if content is None:
        record.unlink()
    else:
        record.write_text(content)
    found = checkpoint.choose(tmp_path, quiet=True)
    assert found is not None and found.folder == first
    best = checkpoint.choose(tmp_path, "best")
    assert best is not None and best.folder == first
    with pytest.raises(DamagedError, match=r"is damaged"):
        checkpoint.choose(tmp_path, "2")


def test_removed_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that goes on rotates: its reader takes the newer one instead of calling the old one damaged."""
    old, read = write_rated(tmp_path, 1, None), checkpoint.read_record

    def rotated(folder: Path) -> checkpoint.CheckpointRecord:
        if folder == old:
            checkpoint.rotate(tmp_path, write_rated(tmp_path, 2, None), 1)
        return read(folder)

    monkeypatch.setattr(checkpoint, "read_record", rotated)
    found = checkpoint.choose(tmp_path)
    assert found is not None and found.record.step == 2


def test_none_is_seen_half_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks while old ones are removed: they have lost their name before they lose a file."""
    seen, remove = [], checkpoint.shutil.rmtree

    def look(path: Path, **more: bool) -> None:
        seen.append([folder.name for folder in checkpoint.checkpoints(tmp_path)])
        remove(path, **more)

    for step in (1, 2, 3):
        written = write(tmp_path, step, make())
    monkeypatch.setattr(checkpoint.shutil, "rmtree", look)
    checkpoint.rotate(tmp_path, written, 1)
    assert seen == [["step-00000003"]] * 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.parametrize(
    "change",
    [
        {"step": 1},
        {"step": -3},
        {"step": "3"},
        {"files": {}},
        {"files": {"../../config.toml": {}}},
        {"files": []},
        {"loader": 5},
    ],
)
def test_a_record_that_was_edited(tmp_path: Path, change: dict[str, object]) -> None:
    """Of another step, or silent about its files: damaged as any other, and the one before is used."""
    for step in (2, 3):
        folder = write_rated(tmp_path, step, None)
    record = json.loads((folder / checkpoint.RECORD).read_text())
    (folder / checkpoint.RECORD).write_text(json.dumps(record | change))
    with pytest.raises(DamagedError, match=r"checkpoint\.json is damaged"):
        checkpoint.read_record(folder)
    found = checkpoint.choose(tmp_path)
    assert found is not None and found.record.step == 2 and found.passed_over == (folder,)


@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to a file", "link to a folder"])
def test_what_is_no_checkpoint_by_the_name_of_one(tmp_path: Path, kind: str) -> None:
    """Passed over, set aside, and in the end removed; what a link points to stays."""
    write_rated(tmp_path, 2, None)
    other = tmp_path / "other"
    for step in (3, 4, 5):
        path = checkpoint.folder_of(tmp_path, step)
        if kind == "file":
            path.touch()
        elif kind != "link to nothing":
            other.mkdir(exist_ok=True)
            (other / "x").touch()
            path.symlink_to(other / "x" if kind == "link to a file" else other)
        else:
            path.symlink_to(tmp_path / "gone")
    found = checkpoint.choose(tmp_path)
    assert found is not None and found.record.step == 2
    checkpoint.set_aside(tmp_path, [path.name for path in found.passed_over])
    left = {".damaged-step-00000004", ".damaged-step-00000005", "step-00000002"}
    assert {path.name for path in (tmp_path / checkpoint.CHECKPOINTS_NAME).iterdir()} == left
    assert not other.exists() or (other / "x").exists()
