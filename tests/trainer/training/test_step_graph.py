"""Steps in graphs equal steps without, to the bit. The graphs are recordings (``tests/helpers/recorded_graphs.py``)."""

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.lagging import at_step, make_trainer, read_tensors, recipe, spoil, state_of, trained
from tests.helpers.recorded_graphs import RecordedGraphs, TableUpdate
from trainer.config import Config
from trainer.errors import DivergedError
from trainer.model import kernels
from trainer.training import step_graph
from trainer.training.checkpoint import checkpoints
from trainer.training.step_graph import WARM_UP, find_backend, map_tensors

SMOOTH = "optimizer.warmup_epochs=0"
FREEZES = 'optimizer.layer_overrides=[{layer="conv1", epoch=3, learning_rate=0, bias_learning_rate=0}]'


@pytest.fixture(autouse=True)
def torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording sees torch's operations; C++ kernels it does not."""
    monkeypatch.setattr(kernels, "load", lambda: None)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> TableUpdate:
    """All parameters are updated by one launch that reads its rates from a table, as on a GPU."""
    found = TableUpdate()
    functions = type("Functions", (), {"make_update": staticmethod(lambda _: found)})
    monkeypatch.setattr(kernels, "on_gpu", lambda x: functions if isinstance(x, nn.Parameter) else None)
    return found


def assert_same(found: Path, expected: Path) -> None:
    """Every tensor of every checkpoint."""
    assert [path.name for path in checkpoints(found)] == [path.name for path in checkpoints(expected)]
    for mine, theirs in zip(checkpoints(found), checkpoints(expected), strict=True):
        ours, wanted = read_tensors(mine), read_tensors(theirs)
        assert all(torch.equal(ours[key], wanted[key]) for key in wanted), mine.name


def two_runs(config: Config, data: Path, folder: Path) -> RecordedGraphs:
    """A run without graphs, and one with them, are the same."""
    graphs, runs = RecordedGraphs(), [folder / "plain", folder / "graphs"]
    for run, backend in zip(runs, (None, graphs), strict=True):
        run.mkdir()
        trained(config, data, run, lag=1, graphs=backend)
    assert_same(runs[1], runs[0])
    return graphs


def test_a_run_of_graphs(tiny_data: Path, tmp_path: Path) -> None:
    """Dropout, batch normalization, falling rates, warm-up, evaluations and checkpoints between, partial batches."""
    graphs = two_runs(recipe("partial", "train.epochs=4", "train.evaluate_every_epochs=2"), tiny_data, tmp_path)
    # of eight whole batches the first has the rate 0, and so updates nothing: the others are of another kind
    assert (graphs.captures, graphs.replays) == (1, 7 - WARM_UP)
    assert graphs.beside_count == 1 + WARM_UP + 4


def test_the_update_is_in_the_graph(table: TableUpdate, tiny_data: Path, tmp_path: Path) -> None:
    """Its rates are sent before each replay; where other layers are updated, another graph is captured."""
    graphs = two_runs(recipe("partial", SMOOTH, FREEZES, "train.epochs=6"), tiny_data, tmp_path)
    assert graphs.captures == 2 and graphs.replays == 6 - WARM_UP + 6 - WARM_UP
    assert len(table.sent) == 18 - 4  # conv1's weight, bias, scale and shift stay


def test_gradients_are_the_graphs_own_in_a_replay(table: TableUpdate, tiny_data: Path, tmp_path: Path) -> None:
    """A step without a graph between two replays has others; the update is told where they lie, each time."""
    trainer = make_trainer(recipe("partial", SMOOTH), tiny_data, tmp_path, lag=1, graphs=RecordedGraphs())
    found: list[set[int]] = []
    for _ in range(9):
        trainer._one_step()
        found.append({id(parameter.grad) for parameter in trainer.net.parameters()})
        assert found[-1] == {id(member.g) for member in table.sent}
    assert found[4] == found[6] == found[7] and found[5] != found[4]  # whole, whole and whole; the sixth is partial
    trainer._settle()
    trainer.loader.close()


def test_a_run_goes_on_from_graphs(tiny_data: Path, tmp_path: Path) -> None:
    """Stopped among replays, resumed with graphs again: as without them and uninterrupted."""
    plain, run = tmp_path / "plain", tmp_path / "graphs"
    plain.mkdir()
    run.mkdir()
    trained("usual", tiny_data, plain, lag=0)
    first = make_trainer("usual", tiny_data, run, lag=1, graphs=RecordedGraphs())
    at_step(first, 7, lambda: setattr(first.stop, "name", "SIGTERM"))
    assert first.train().step == 9
    trained("usual", tiny_data, run, lag=1, graphs=RecordedGraphs())
    ours, wanted = (read_tensors(checkpoints(each)[-1]) for each in (run, plain))
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("in_graph", [False, True])
def test_nothing_is_applied_once_a_replay_is_not_finite(
    in_graph: bool, request: pytest.FixtureRequest, tiny_data: Path, tmp_path: Path
) -> None:
    """As without a graph: the guard is read by the update wherever that is launched from."""
    if in_graph:
        request.getfixturevalue("table")
    trainer = make_trainer("usual", tiny_data, tmp_path, lag=1, graphs=RecordedGraphs())
    seen, before = spoil(trainer, 7)
    with pytest.raises(DivergedError) as caught:
        trainer.train()
    assert "step 7: not finite" in str(caught.value) and f"batch keys {', '.join(seen[7])}, ..." in str(caught.value)
    assert len(seen) == 9  # the ninth was launched, too
    found = state_of(trainer)
    assert before.keys() == found.keys() and all(torch.equal(found[key], before[key]) for key in before)


def test_a_capture_that_fails_changes_nothing(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One line says why; the run goes on kernel by kernel, from exactly where it was."""
    plain, run = tmp_path / "plain", tmp_path / "graphs"
    plain.mkdir()
    run.mkdir()
    trained("usual", tiny_data, plain, lag=1)
    capsys.readouterr()
    failing = RecordedGraphs(RuntimeError("CUDA error: operation failed\nCompile with TORCH_USE_CUDA_DSA"))
    trained("usual", tiny_data, run, lag=1, graphs=failing)
    errors = capsys.readouterr().err
    assert errors == "note: no CUDA graph, each kernel of a step is launched: CUDA error: operation failed\n"
    assert (failing.captures, failing.replays) == (1, 0)
    assert_same(run, plain)


def test_the_warm_up_launches_what_is_captured(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers come out of tensors in both: a kernel that is compiled or loaded for the first time may end a capture."""
    trainer = make_trainer("usual", tiny_data, tmp_path, lag=1, graphs=RecordedGraphs())
    seen: list[Any] = []
    measure = trainer.work.measure
    monkeypatch.setattr(trainer.work, "measure", lambda inputs: seen.append(inputs) or measure(inputs))
    for _ in range(WARM_UP + 2):
        trainer._one_step()
    trainer._settle()
    trainer.loader.close()
    assert len(seen) == WARM_UP + 1  # the last is captured
    for inputs in seen:
        assert inputs.words.shape == (3,) and set(inputs.starts) == {(t, f) for t in "ab" for f in ("fc6", "fc7")}
        assert {start.shape for start in inputs.starts.values()} == {()}


class _Played:
    """What :class:`CudaGraphs` asks of torch, without a GPU; the end of a capture fails where the capture did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends_itself: bool) -> None:
        self.said: list[Any] = []
        self.current, self.captures, self._ends_itself = "usual", False, ends_itself
        for name, value in (
            ("Stream", lambda _: "captures"),
            ("CUDAGraph", lambda: self),
            ("graph_pool_handle", lambda: (0, 7)),
            ("current_stream", lambda _: self.current),
            ("set_stream", lambda stream: setattr(self, "current", stream)),
            ("device", lambda _: contextlib.nullcontext()),
            ("graph", self.graph),
        ):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_allocating)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *of: self.said.append(("released", *of)))

    @contextlib.contextmanager
    def graph(self, _: Any, *, pool: Any, stream: str, capture_error_mode: str) -> Iterator[None]:
        assert (pool, capture_error_mode) == ((0, 7), "thread_local")
        assert not gc.isenabled(), "what is collected in a capture may end it"
        before, self.current, self.captures = self.current, stream, True
        try:
            yield
        except BaseException:
            if not self._ends_itself:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from None
            self.captures = False
            raise
        self.current, self.captures = before, False

    def _end_allocating(self, *of: Any) -> None:
        if not self.captures:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.captures = False
        self.said.append(("ended", *of))

    def replay(self) -> None:
        self.said.append("replayed")


@pytest.mark.parametrize("ends_itself", [True, False])
def test_a_capture_that_fails_leaves_torch_as_it_was(ends_itself: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is the one before, the allocator captures no more, and what is raised is what went wrong first."""
    played = _Played(monkeypatch, ends_itself)

    def work() -> torch.Tensor:
        raise ValueError("a number was asked for")

    with pytest.raises(ValueError, match="a number was asked for"):
        step_graph.CudaGraphs("cuda:1").capture(work)
    assert played.said == ([] if ends_itself else [("ended", 1, (0, 7)), ("released", 1, (0, 7))])
    assert played.current == "usual" and not played.captures
    assert gc.isenabled()


def test_a_capture_is_repeated_by_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    played, told = _Played(monkeypatch, True), torch.ones(1)
    replay, found = step_graph.CudaGraphs("cuda:1").capture(lambda: told)
    replay()
    assert found is told and played.said == ["replayed"] and played.current == "usual" and gc.isenabled()


@pytest.mark.parametrize(
    ("asked", "device", "between_gpus", "lag", "changes", "found", "line"),
    [
        ("auto", "cpu", None, 0, (), False, ""),
        ("on", "cpu", None, 0, (), False, "the device is cpu, and only a GPU has them"),
        ("off", "cpu", None, 0, (), False, ""),
        ("auto", "cuda:0", None, 1, (), True, ""),
        ("off", "cuda:0", None, 1, (), False, ""),
        ("auto", "cuda:0", None, 1, ("data.last_batch=partial",), False, ""),
        ("on", "cuda:0", None, 1, ("data.last_batch=partial",), True, ""),
        ("auto", "cuda:0", True, 1, (), False, ""),
        ("on", "cuda:0", True, 1, (), True, ""),
        ("on", "cuda:0", False, 0, (), False, "gloo carries what crosses between the towers, through the host"),
        ("on", "cuda:0", None, 0, (), False, "the host looks at each step before its update"),
    ],
)
def test_who_gets_graphs(
    asked: str,
    device: str,
    between_gpus: bool | None,
    lag: int,
    changes: tuple[str, ...],
    found: bool,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, and only where they are asked for and cannot be had."""
    monkeypatch.setattr(step_graph, "CudaGraphs", lambda device: f"graphs of {device}")
    config, said = recipe("usual", f"train.cuda_graph={asked}", *changes), list[str]()
    mesh: Any = (
        None if between_gpus is None else type("Mesh", (), {"link": type("Link", (), {"between_gpus": between_gpus})})
    )
    backend: Any = find_backend(config, device, mesh, lag=lag, say=said.append)
    assert backend == (f"graphs of {device}" if found else None)
    assert said == ([f"note: train.cuda_graph = 'on', and there are no CUDA graphs here: {line}"] if line else [])


def test_inputs_of_any_form_have_places() -> None:
    """Floats in channels_last; bytes, and what lies in dataclasses, as they come; values that are no tensors stay."""

    @dataclasses.dataclass(frozen=True)
    class Crops:
        pixels: torch.Tensor
        shifts: tuple[torch.Tensor, ...]
        scale: float

    crops = Crops(torch.ones(2, 5, 6, 3, dtype=torch.uint8), (torch.ones(2, 3),), 2.0)
    place = map_tensors({"crops": crops, "floats": torch.ones(2, 3, 5, 6)}, step_graph._place_for)
    assert place["crops"].scale == 2.0 and torch.equal(place["crops"].shifts[0], crops.shifts[0])
    assert place["crops"].pixels.stride() == crops.pixels.stride() and place["crops"].pixels is not crops.pixels
    assert place["floats"].is_contiguous(memory_format=torch.channels_last)
