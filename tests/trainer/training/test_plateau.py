"""The plateau schedule over a run: only tower a sees the held-out error, and both towers drop at the same step."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.training_commands import run, train_words
from trainer.training.checkpoint import checkpoints, folder_of

pytestmark = pytest.mark.numeric

OVERRIDES = (
    "train.epochs=3",  # of 11 steps
    "train.evaluate_every_epochs=1",
    "optimizer.milestones=[]",
    "optimizer.schedule=plateau",
    "optimizer.patience=1",
    "optimizer.threshold=0.95",  # no fall is large enough: the second evaluation, after step 22, is a plateau
    "optimizer.max_drops=1",
    "optimizer.gamma=1e-30",  # gradients no longer move anything: from then on v = 0.9 v
)


def rates(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["learning_rate"] for row in rows if row["kind"] == "step"]


def tensors(folder: Path, step: int, tower: str) -> dict[str, torch.Tensor]:
    return load_file(folder_of(folder, step) / f"tower-{tower}.safetensors")


def is_decay_only(folder: Path, tower: str, start: int, end: int) -> bool:
    """Whether between two checkpoints every velocity did nothing but shrink by 0.9 a step."""
    before, after = tensors(folder, start, tower), tensors(folder, end, tower)
    names = [name for name in before if name.startswith("velocity/")]
    return all(torch.allclose(after[n], before[n] * 0.9 ** (end - start), rtol=1e-4, atol=1e-12) for n in names)


@pytest.mark.slow
def test_both_towers_drop_together_and_again_after_a_resume(digits: Path, tmp_path: Path) -> None:
    """The rates by hand; both towers' velocities show the drop; going on after it, from step 24, is exact."""
    pair, resumed = tmp_path / "pair", tmp_path / "resumed"
    run(*train_words(digits, pair, "--processes", 2, overrides=OVERRIDES))
    assert rates(pair) == pytest.approx([1e-2] * 22 + [1e-32] * 11, rel=1e-9)
    for tower in ("a", "b"):
        assert not is_decay_only(pair, tower, 16, 20)
        assert is_decay_only(pair, tower, 24, 28)
    shutil.copytree(pair, resumed)
    for folder in checkpoints(resumed):
        if folder > folder_of(resumed, 24):
            shutil.rmtree(folder)
    run(*train_words(digits, resumed, "--processes", 2, "--resume", "auto", overrides=OVERRIDES))
    assert rates(resumed) == rates(pair)
    for tower in ("a", "b"):
        expected = tensors(pair, 33, tower)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(resumed, 33, tower).items())
