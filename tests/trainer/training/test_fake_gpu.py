"""Whole commands on a GPU that is none (``tests/helpers/fake_gpu.py``): what lies behind ``is_cuda`` equals the CPU's.

No step makes the host wait: there torch's ``set_sync_debug_mode("error")`` is on.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.loader.batches import TrainingLoader
from tests.helpers.fake_gpu import FakeGpu, FakeTensor, fake_gpu
from tests.helpers.lagging import read_tensors
from tests.helpers.tiny_run import RECIPE
from tests.helpers.training_commands import ROOT
from trainer.bench.measure import BY_PHASE, BenchSettings, measure
from trainer.config import load_config
from trainer.model import kernels
from trainer.model.layers import DropoutDraws
from trainer.training.checkpoint import folder_of
from trainer.training.step_graph import WARM_UP, StepRunner

STEPS = 12
USUAL = (
    *("model.channels=[4, 4, 4, 4, 4]", "model.hidden=[16, 16]", "model.dropout=0.5", "train.epochs=4"),
    *("train.evaluate_every_epochs=2", "train.checkpoint_every_steps=5", "train.keep_checkpoints=9"),
    *("optimizer.learning_rate=1e-4", "optimizer.bias_learning_rate=1e-4", "train.loggers=[]"),
)
# 10, 10 and 4 images: a graph of whole batches, kernel by kernel the rest
PARTIAL, REPLAYS = ("train.batch_size=10", "data.last_batch=partial", "train.cuda_graph=on"), STEPS * 2 // 3 - WARM_UP
# in pieces, kernel by kernel; after an evaluation a step is read before its update
ODD = (
    *("train.accumulate=2", "train.cuda_graph=off"),
    *("optimizer.schedule=plateau", "optimizer.patience=1", "optimizer.threshold=0.95"),
)
slow = pytest.mark.slow
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[FakeGpu]:
    """It computes by torch operations; neither a step nor a batch may wait."""
    monkeypatch.setenv(kernels.SWITCH, "off")
    for owner, name in ((StepRunner, "__call__"), (TrainingLoader, "next")):
        monkeypatch.setattr(owner, name, waitless(getattr(owner, name)))
    with fake_gpu() as found:
        yield found


def waitless(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with all that makes the host wait an error."""

    def checked(*arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return work(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return checked


def train(trainer: Run, data: Path, run: Path, device: str, *changes: str, words: tuple[object, ...] = ()) -> Path:
    """A run of the tiny net, to its end."""
    settings = [word for text in (*USUAL, *changes) for word in ("--set", text)]
    code, _, errors = trainer("train", *RECIPE, *settings, "--data", data, "--run", run, "--device", device, *words)
    assert code == 0, errors
    return run


def rows(run: Path) -> list[dict[str, Any]]:
    """Of all steps."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["kind"] == "step"]


def check_alike(run: Path, other: Path) -> None:
    """Two runs, but for how they have added; a unit near 0 may go to its other side, so norms are compared."""
    for a, b in zip(rows(run), rows(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["learning_rate"] == pytest.approx(b["learning_rate"])
    found, exact = (read_tensors(folder_of(each, STEPS)) for each in (run, other))
    for name, tensor in exact.items():
        assert (found[name] - tensor).norm() <= 0.02 * tensor.norm(), name


def test_a_run_equals_one_on_the_cpu(gpu: FakeGpu, trainer: Run, tiny_data: Path, tmp_path: Path) -> None:
    """With dropout; steps in graphs and not; evaluations and checkpoints in between."""
    ours = train(trainer, tiny_data, tmp_path / "gpu", "cuda:0", "train.precision=fp32", *PARTIAL)
    assert gpu.replays == REPLAYS
    check_alike(ours, train(trainer, tiny_data, tmp_path / "cpu", "cpu", "train.precision=fp32", *PARTIAL))


@slow
def test_an_odd_run_goes_on_on_the_gpu(gpu: FakeGpu, trainer: Run, tiny_data: Path, tmp_path: Path) -> None:
    """Begun on the CPU, it equals one that stays there."""
    ours, other = tmp_path / "gpu", tmp_path / "cpu"
    train(trainer, tiny_data, ours, "cpu", "train.precision=fp32", "train.epochs=2", *ODD)
    train(trainer, tiny_data, ours, "cuda:0", "train.precision=fp32", *ODD, words=("--resume", "auto"))
    check_alike(ours, train(trainer, tiny_data, other, "cpu", "train.precision=fp32", *ODD))


def test_masks_are_the_same_bit_for_bit(gpu: FakeGpu) -> None:
    draws, like = DropoutDraws(7, 3, first=5), torch.ones(6, 37)
    wanted = draws.mask("b", "fc7", like, 0.5)
    found = draws.mask("b", "fc7", like.to("cuda:0"), 0.5)
    assert isinstance(found, FakeTensor) and torch.equal(found.cpu(), wanted) and 0 < wanted.mean() < 1


@slow
def test_looking_at_a_run(gpu: FakeGpu, trainer: Run, tiny_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    """``evaluate``, ``predict``, ``features``, ``neighbours``, a dry run: the words of the CPU."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    run = ("--run", tiny_run)
    for words in (
        ("evaluate", *run, "--data", tiny_data, "--views", "ten"),
        ("predict", *run, pictures),
        ("neighbours", *run, "--layer", "fc7", "--among", pictures, "--", pictures / "0.png"),
    ):
        said = [trainer(words[0], "--device", device, *words[1:]) for device in ("cuda:0", "cpu")]
        assert said[0] == said[1] and said[0][0] == 0, said
    values = []
    for device in ("cuda:0", "cpu"):
        file = tmp_path / f"{device[:3]}.npz"
        assert trainer("features", *run, "--device", device, "--output", file, pictures)[0] == 0
        values.append(np.load(file)["features"])
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4, atol=1e-5)
    planned = trainer(
        "train", *RECIPE, "--data", tiny_data, "--run", tmp_path / "new", "--device", "cuda:0", "--dry-run"
    )
    assert planned[0] == 0 and "fits: the device has 32,768 MiB free" in planned[1], planned


@slow
def test_the_bench_measures_it(gpu: FakeGpu, tiny_data: Path, tmp_path: Path) -> None:
    """In bf16, by phase and as a graph, with a loader and without."""
    small = (*USUAL, "train.batch_size=8", "model.classes=10", "model.in_channels=1", "train.precision=bf16")
    config = load_config(ROOT / "configs" / "digits.toml", small)
    settings = BenchSettings(tiny_data, seconds=0.05, rounds=1, stages=False)
    part = measure(config, settings, mesh=None, device="cuda:0", scratch=tmp_path)
    assert {"loader", "synthetic", BY_PHASE, "end to end"} <= part.intervals.keys() and gpu.replays
    assert {"graph", "step"} <= {name for name, *_ in part.intervals["end to end"][0].spans}


@slow
def test_two_towers_through_nccl(
    gpu: FakeGpu, trainer: Run, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages of the device, read one step late, uint8 crops that are shared: two processes equal one."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -m tests.helpers.fake_gpu "$@"\n')
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    both = ("--processes", 2, "--backend", "nccl")
    ours = train(trainer, tiny_data, tmp_path / "two", "cuda:0", "train.precision=fp32", words=both)
    check_alike(ours, train(trainer, tiny_data, tmp_path / "one", "cpu", "train.precision=fp32"))


INTERPRETED = """
import sys, torch
from pathlib import Path
from unittest import mock
from tests.helpers.fake_gpu import fake_gpu
from tests.helpers.lagging import NoiseTrainer, recipe, state_of
from trainer.model import kernels
from trainer.training import step_graph
torch.set_num_threads(1)
step_graph.WARM_UP = 1
found = []
with fake_gpu() as gpu:
    for load in (kernels.load_triton, lambda: None):
        with mock.patch.object(kernels, "load_triton", load):
            trainer = NoiseTrainer(recipe("usual", "train.batch_size=1"), Path(sys.argv[1]), device="cuda:0")
            before = state_of(trainer)
            trainer.make_steps(1)
            torch.cuda.set_sync_debug_mode("error")
            trainer.make_steps(2)
            torch.cuda.set_sync_debug_mode("default")
            found.append({name: (now - before[name]).cpu() for name, now in state_of(trainer).items()})
            trainer.runner.close()
    assert gpu.replays == 4, gpu.replays
    for name, moved in found[1].items():
        assert (found[0][name] - moved).norm() <= 1e-3 * moved.norm(), name
print("checked")
"""


@slow
def test_the_kernels_in_a_step(tmp_path: Path) -> None:
    """Triton's, interpreted, by launch and in a graph, beside torch's operations; in a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", kernels.SWITCH: "on"}
    command = [sys.executable, "-c", INTERPRETED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "checked\n", done.stderr


def test_the_rules_of_a_gpu(gpu: FakeGpu) -> None:
    """What the fake would not forgive."""
    x, host = torch.ones(3, device="cuda"), torch.ones(3)
    assert x.is_cuda and x.device == torch.device("cuda:0") and float((x + torch.tensor(1.0)).sum()) == 6
    with pytest.raises(RuntimeError, match="same device"):
        x + host
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    arrived = torch.zeros(3).pin_memory()
    arrived.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    assert arrived.isnan().all()
    event.synchronize()
    assert torch.equal(arrived, host)
    sent = host.pin_memory()
    x.copy_(sent, non_blocking=True)
    sent.zero_()
    with pytest.raises(AssertionError, match="being copied"):
        torch.cuda.synchronize()
    gpu.copies.clear()


WAITING: dict[str, Callable[[torch.Tensor], object]] = {
    "a number": lambda x: x.sum().item(),
    "a condition": lambda x: bool(x.sum() > 1),
    "a list": lambda x: x.tolist(),
    "a copy": lambda x: x.cpu(),
    "from memory that is not pinned": lambda x: x.copy_(torch.ones(3), non_blocking=True),
    "to memory that is not pinned": lambda x: torch.empty(3).copy_(x, non_blocking=True),
    "a number as a tensor": lambda x: torch.tensor(1.0, device=x.device),
    "a mask that indexes": lambda x: x[x > 0],
    "places": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("what", WAITING)
def test_what_makes_the_host_wait(what: str, gpu: FakeGpu) -> None:
    x = torch.ones(3, device="cuda")
    WAITING[what](x)
    assert gpu.waits
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        WAITING[what](x)
    torch.cuda.set_sync_debug_mode("default")
    with (
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        WAITING[what](x)
