"""Whole commands on a GPU that is none: every branch behind ``is_cuda`` runs, and does what the CPU's does."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.fake_gpu import FakeGpu, fake_gpu
from tests.helpers.lagging import read_tensors
from tests.helpers.tiny_run import RECIPE
from trainer.model import kernels
from trainer.training.checkpoint import folder_of
from trainer.training.step_graph import StepRunner

STEPS = 12
WAYS = {
    "graph": ("train.batch_size=8", "train.epochs=4"),
    "pieces": ("train.batch_size=8", "train.epochs=4", "train.accumulate=2", "train.cuda_graph=off"),
    "partial": ("train.batch_size=10", "train.epochs=4", "data.last_batch=partial"),
    "plateau": (
        *("train.batch_size=8", "train.epochs=4", "optimizer.schedule=plateau", "optimizer.patience=1"),
        "optimizer.threshold=0.95",
    ),
}
USUAL = (
    *("train.evaluate_every_epochs=1", "train.checkpoint_every_steps=5", "train.keep_checkpoints=9"),
    *("model.dropout=0.5", "optimizer.learning_rate=1e-4", "optimizer.bias_learning_rate=1e-4"),
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[FakeGpu]:
    """It computes by torch operations; a step that waits, and a batch, is an error."""
    monkeypatch.setenv(kernels.SWITCH, "off")
    step = StepRunner.__call__

    def waitless(self: StepRunner, *inputs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, *inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(StepRunner, "__call__", waitless)
    with fake_gpu() as found:
        yield found


def words(data: Path, run: Path, way: str, *more: str) -> list[object]:
    found: list[object] = ["train", *RECIPE, "--data", data, "--run", run]
    for text in (*USUAL, *WAYS[way], *more):
        found += ["--set", text]
    return found


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_equals_one_on_the_cpu(
    way: str, gpu: FakeGpu, trainer: Callable[..., Any], tiny_data: Path, tmp_path: Path
) -> None:
    folders = {device: tmp_path / device.replace(":", "") for device in ("cpu", "cuda:0")}
    for device, run in folders.items():
        code, _, errors = trainer(*words(tiny_data, run, way, "train.precision=fp32"), "--device", device)
        assert code == 0, errors
    ours, wanted = (folders[device] for device in ("cuda:0", "cpu"))
    assert gpu.replays == {"graph": STEPS - 3, "plateau": 5}.get(way, 0)
    for a, b in zip(rows(ours, "step"), rows(wanted, "step"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["learning_rate"] == b["learning_rate"]
    found, exact = (read_tensors(folder_of(run, STEPS)) for run in (ours, wanted))
    for name, tensor in exact.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
        print(name, float((found[name]-tensor).abs().max()), float(tensor.abs().max()))
