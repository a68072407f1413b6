"""A step on a real GPU: a graph equals launching each kernel, nobody waits, nothing that is not finite is applied."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.lagging import NoiseTrainer, recipe, spoil, state_of
from trainer.errors import DivergedError
from trainer.model import kernels
from trainer.training import step
from trainer.training.step import StepInputs
from trainer.training.step_graph import WARM_UP

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
REPLAYS = 5
DEVICE = "cuda:0"
WAYS = [("auto", True), ("off", True), ("auto", False), ("off", False)]  # graphs; kernels
Make = Callable[..., NoiseTrainer]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A trainer on the GPU; cuDNN adds up in the same order each time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    made: list[NoiseTrainer] = []

    def new(graphs: str = "auto", *, compiled: bool = True, **changes: Any) -> NoiseTrainer:
        if not compiled:
            monkeypatch.setattr(kernels, "load_triton", lambda: None)
        words = [f"train.cuda_graph={graphs}", *(f"train.{name}={value}" for name, value in changes.items())]
        made.append(NoiseTrainer(recipe("usual", *words), tmp_path, device=DEVICE))
        return made[-1]

    yield new
    for trainer in made:
        trainer.runner.close()


def moved(trainer: NoiseTrainer, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What steps have changed."""
    return {name: tensor - before[name] for name, tensor in state_of(trainer).items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_equal_launches(precision: str, make: Make) -> None:
    """Five replays after the warm-up, across a drop of the rates, with dropout: weights and velocities."""
    found = []
    for graphs in ("off", "auto"):
        trainer = make(graphs, precision=precision)
        assert trainer.verdicts.lag == 1 and trainer.runner.has_graphs == (graphs == "auto")
        before = state_of(trainer)
        trainer.make_steps(WARM_UP + REPLAYS)
        assert len(trainer.runner._graphs) == (graphs == "auto")
        assert all(captured.has_update for captured in trainer.runner._graphs.values())
        found.append(moved(trainer, before))
    for name, wanted in found[0].items():
        assert wanted.norm() > 0, name
        limit = 1e-4 if precision == "fp32" else 1e-2
        assert (found[1][name] - wanted).norm() <= limit * wanted.norm(), name


def test_capturing_computes_nothing(make: Make) -> None:
    """Weights, velocities and the guard are, after the capture, to the bit what they were."""
    trainer = make()
    trainer.make_steps(WARM_UP)
    batch, before = trainer.loader.next(), state_of(trainer)
    captured = trainer.runner._capture(StepInputs(batch.images, batch.labels, lambda: (1, 2, 0), trainer.step))
    assert captured is not None and captured.has_update
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(trainer).items())
    assert trainer.work.guard is not None and trainer.work.guard.item() == 1
    trainer.make_steps(2)  # its own capture, and a replay


@pytest.mark.parametrize(("graphs", "compiled"), WAYS)
def test_a_step_waits_for_nothing(graphs: str, compiled: bool, make: Make) -> None:
    """Launching, sending, reading the step before: torch finds no operation that holds up the host."""
    trainer = make(graphs, compiled=compiled)
    trainer.make_steps(WARM_UP + 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.make_steps(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("graphs", "compiled"), WAYS)
def test_nothing_is_applied_once_a_loss_is_not_finite(graphs: str, compiled: bool, make: Make) -> None:
    """Bit for bit, neither in that step nor in the next, which was launched already; step and images are named."""
    trainer = make(graphs, compiled=compiled)
    bad = WARM_UP + 2
    seen, before = spoil(trainer, bad)
    with pytest.raises(DivergedError) as caught:
        trainer.make_steps(bad + 4)
    assert f"step {bad}: not finite" in str(caught.value) and f"{', '.join(seen[bad][:4])}, ..." in str(caught.value)
    assert len(seen) == bad + 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(trainer).items())


def test_a_capture_that_fails_leaves_all_as_it_was(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Something in the step asks the GPU for a number: one line, and the same run kernel by kernel."""
    plain = make("off")
    plain.make_steps(WARM_UP + REPLAYS)
    norms = step.gradient_norms

    def asking(net: Any) -> dict[str, torch.Tensor]:
        found = norms(net)
        if torch.cuda.is_current_stream_capturing():
            next(iter(found.values())).item()
        return found

    monkeypatch.setattr(step, "gradient_norms", asking)
    capsys.readouterr()
    trainer = make("auto")
    trainer.make_steps(WARM_UP + REPLAYS)
    errors = capsys.readouterr().err
    assert errors.startswith("note: no CUDA graph, each kernel of a step is launched: ") and errors.count("\n") == 1
    assert "previous error" not in errors, "what is told is what went wrong first"
    assert not trainer.runner.has_graphs and torch.cuda.current_stream() == torch.cuda.default_stream()
    wanted = state_of(plain)
    for name, tensor in state_of(trainer).items():
        assert (tensor - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name
