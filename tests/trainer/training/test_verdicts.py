"""A host that reads one step late, as beside a GPU: the same run as one that waits, to the bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.lagging import (
    KEYS,
    at_step,
    lag_facts,
    make_trainer,
    read_tensors,
    spoil,
    state_of,
    trained,
)
from tests.helpers.pair import run_mesh
from tests.helpers.recorded_graphs import NoWaits
from trainer.errors import DivergedError, LostError
from trainer.model import kernels
from trainer.parallel.status import PendingStatus
from trainer.training import loop
from trainer.training import step as step_module
from trainer.training.checkpoint import checkpoints
from trainer.training.step import StepInputs
from trainer.training.verdicts import default_lag


@pytest.fixture(scope="module")
def waiting(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run whose host waits in each step, by recipe."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = trained(name, tiny_data, tmp_path_factory.mktemp("waiting"), lag=0)
        return made[name]

    return run


def rows(folder: Path) -> list[dict[str, Any]]:
    """What a run has written of its steps, without times."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in KEYS if key in row} for row in found]


@pytest.mark.parametrize("name", ["usual", "plateau", pytest.param("partial", marks=pytest.mark.slow)])
def test_a_late_host_changes_nothing(name: str, tiny_data: Path, waiting: Callable[[str], Path], tmp_path: Path):
    """Weights, velocities, statistics of every checkpoint, rows of metrics; also where rates follow evaluations."""
    late, expected = trained(name, tiny_data, tmp_path, lag=1), waiting(name)
    assert rows(late) == rows(expected)
    assert [path.name for path in checkpoints(late)] == [path.name for path in checkpoints(expected)]
    for mine, theirs in zip(checkpoints(late), checkpoints(expected), strict=True):
        found, wanted = read_tensors(mine), read_tensors(theirs)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_interrupted_equals_uninterrupted(tiny_data: Path, waiting: Callable[[str], Path], tmp_path: Path):
    """A stop is noticed one step later, at most; what it saves is what it has done."""
    trainer = make_trainer("usual", tiny_data, tmp_path, lag=1)
    at_step(trainer, 1, lambda: setattr(trainer.stop, "name", "SIGTERM"))
    result = trainer.train()
    assert (result.exit_reason, result.step) == ("stopped", 3)  # asked for in the second step, known after the third
    assert checkpoints(tmp_path)[-1].name == "step-00000003"
    result = make_trainer("usual", tiny_data, tmp_path, lag=1).train()
    found, wanted = (read_tensors(checkpoints(run)[-1]) for run in (tmp_path, waiting("usual")))
    assert result.exit_reason == "finished" and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_stop_while_gradients_are_computed_is_that_steps(tiny_data: Path, tmp_path: Path) -> None:
    """A step may take minutes on a CPU: nobody waits for another one."""
    trainer = make_trainer("usual", tiny_data, tmp_path, lag=0)
    norms, made = step_module.gradient_norms, []

    def gradients_are_there(net: Any) -> Any:
        made.append(1)
        if len(made) == 2:
            trainer.stop.name = "SIGTERM"
        return norms(net)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(step_module, "gradient_norms", gradients_are_there)
        result = trainer.train()
    assert (result.exit_reason, result.step) == ("stopped", 2)


@pytest.mark.parametrize(("lag", "bad"), [(0, 3), (1, 3), (1, 4), (1, 11)])  # 4: a checkpoint is due; 11: the last
def test_nothing_is_applied_once_a_loss_is_not_finite(lag: int, bad: int, tiny_data: Path, tmp_path: Path):
    """Neither in that step nor in the one that was launched before the host knew; step and images are named."""
    trainer = make_trainer("usual", tiny_data, tmp_path, lag=lag)
    seen, before = spoil(trainer, bad)
    with pytest.raises(DivergedError) as caught:
        trainer.train()
    assert str(caught.value).startswith(f"step {bad}: not finite (loss nan, gradient norms a nan, b nan)")
    assert f"batch keys {', '.join(seen[bad][:4])}, ..." in str(caught.value)
    assert len(seen) == bad + 1 + (lag and bad == 3)
    found = state_of(trainer)
    assert before.keys() == found.keys() and all(torch.equal(found[key], before[key]) for key in before)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["exit_reason"], result["step"]) == ("failed", bad)
    assert [row["step"] for row in rows(tmp_path) if row["kind"] == "step"] == list(range(1, bad + 1))


def test_a_step_asks_the_device_for_nothing(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the gradients to the update there is no number that the host would have to wait for."""
    monkeypatch.setattr(kernels, "load", lambda: None)
    trainer = make_trainer("usual", tiny_data, tmp_path, lag=1)
    for step in range(2):
        batch = trainer.loader.next()
        with NoWaits():
            told = trainer.runner(StepInputs(batch.images, batch.labels, lambda: (1, 2, 0), step))
    with pytest.raises(RuntimeError, match="_local_scalar_dense"), NoWaits():
        told.sum().item()
    trainer.loader.close()


def test_who_lags():
    """A GPU, unless gloo carries the messages: that waits in any case."""
    link = type("Link", (), {"between_gpus": False})
    gloo = type("Mesh", (), {"link": link})
    nccl = type("Mesh", (), {"link": type("Link", (), {"between_gpus": True})})
    assert [default_lag("cpu", None), default_lag("cuda:0", None)] == [0, 1]
    assert [default_lag("cuda:0", gloo), default_lag("cuda:0", nccl), default_lag("cpu", gloo)] == [0, 1, 0]  # type: ignore[arg-type]


def test_what_an_aborted_message_brought_is_not_read(monkeypatch: pytest.MonkeyPatch):
    """A peer that is lost while the GPU waits for it ends the wait, and what then lies in memory is anything."""

    def check() -> None:
        raise LostError("tower b (rank 1) is lost at control")

    mesh: Any = type("Mesh", (), {"failures": type("Failures", (), {"check": staticmethod(check)})})
    pending = PendingStatus(mesh, ("a",), torch.zeros(8, dtype=torch.int64), "step 3")
    monkeypatch.setattr(pending, "_event", type("Event", (), {"synchronize": staticmethod(lambda: None)}))
    with pytest.raises(LostError, match="lost at control"):
        pending.read()


@pytest.mark.slow
def test_late_hosts_agree(tiny_data: Path, tmp_path: Path) -> None:
    """Processes that each read one step late: as those that wait; all stop at one step, all name the same bad one.

    Only the last process is asked to stop, and only its images are no numbers.
    """
    ranks: list[dict[str, Any]] = run_mesh(lag_facts, str(tiny_data), str(tmp_path), replicas=1)
    assert [facts["stopped at"] for facts in ranks] == [3, 3]
    wanted = read_tensors(checkpoints(tmp_path / "waits")[-1])
    found = read_tensors(checkpoints(tmp_path / "lags")[-1])
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    for facts in ranks:
        assert all(torch.equal(facts["lags"][key], tensor) for key, tensor in facts["waits"].items())
        assert facts["diverged"].startswith("step 3: not finite") and len(facts["seen"]) == 5
        assert f"batch keys {', '.join(facts['seen'][3][:4])}, ..." in facts["diverged"]
        assert all(torch.equal(facts["after"][key], tensor) for key, tensor in facts["before"].items())
        assert all(torch.equal(facts["resumed"][key], tensor) for key, tensor in facts["uninterrupted"].items())


def test_a_trainer_works_on_its_own_gpu(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two is the current one before the net is made: the first may be somebody's, and full."""
    chosen: list[str] = []

    def no_net(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(loop, "make_net", no_net)
    for device in ("cuda:1", "cpu"):
        with pytest.raises(NotImplementedError):
            make_trainer("usual", tiny_data, tmp_path, device=device)
    assert chosen == ["cuda:1"]
