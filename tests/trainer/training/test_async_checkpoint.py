"""Saving beside the training: a copy of the moment, visible only when whole, and a failure that everybody learns of."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.config import load_config
from trainer.errors import CheckpointError
from trainer.model.alexnet import AlexNet
from trainer.parallel.status import GlobalStatus
from trainer.training import checkpoint
from trainer.training.async_checkpoint import AsyncCheckpointer, PendingCheckpoint
from trainer.training.optimizer import PaperSGD

CONFIG = load_config(Path(__file__).resolve().parents[3] / "configs" / "digits.toml")
PATIENCE_S = 60


def make_saver(run: Path) -> tuple[AsyncCheckpointer, AlexNet]:
    net = AlexNet(CONFIG.model)
    return AsyncCheckpointer(run, net, PaperSGD(net.named_parameters(), CONFIG.optimizer), mesh=None, keep=2), net


def draft(step: int) -> PendingCheckpoint:
    return PendingCheckpoint(step, "c", {"position": step}, None)


def verdict(*, written: bool = False, unsaved: bool = False) -> GlobalStatus:
    return GlobalStatus(True, False, 0, {}, 0.0, written, unsaved)


def test_the_step_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights may change at once; the checkpoint holds those of its step, invisible until all have written."""
    disk_is_free, write = threading.Event(), checkpoint.write_towers

    def slow(folder, towers):
        assert disk_is_free.wait(PATIENCE_S)
        write(folder, towers)

    monkeypatch.setattr(checkpoint, "write_towers", slow)
    saver, net = make_saver(tmp_path)
    expected = net.split_towers(net.state_dict())["a"]["conv1.weight"].clone()
    saver.begin(draft(4))
    with torch.no_grad():
        net.conv1.weight.add_(1)
    saver.advance(verdict())
    assert not saver.written
    assert checkpoint.checkpoints(tmp_path) == []
    disk_is_free.set()
    saver._wait()
    assert saver.written
    assert checkpoint.checkpoints(tmp_path) == [], "the other tower has not said yet that it has written"
    saver.advance(verdict(written=True))
    saver.finish()
    (folder,) = checkpoint.checkpoints(tmp_path)
    assert checkpoint.read_record(folder).loader == {"position": 4}
    assert torch.equal(load_file(folder / "tower-a.safetensors")["conv1.weight"], expected)


def test_a_failure_reaches_all_at_the_next_control_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the checkpoint before stays, the unfinished one is removed."""
    saver, _ = make_saver(tmp_path)
    saver.begin(draft(1))
    saver.finish()

    def full(folder, towers):
        folder.mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_towers", full)
    saver.begin(draft(2))
    saver._wait()
    assert saver.failed
    with pytest.raises(CheckpointError, match=r"step 2 cannot be saved.*No space left"):
        saver.advance(verdict(unsaved=True))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_finish_makes_it_visible_without_another_step(tmp_path: Path) -> None:
    """The end of a run, or a signal; without a checkpoint under way it does nothing."""
    saver, _ = make_saver(tmp_path)
    saver.finish()
    for step in (3, 5, 9):
        saver.begin(draft(step))
        saver.finish()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000005", "step-00000009"]
