"""Figure 1's net and its run: by hand, stopped and gone on with, refused, and as an experiment."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.experiments import tiny_words, train_here
from tests.helpers.tiny_run import OVERRIDES
from tests.helpers.training_commands import CONFIG
from trainer.config import ModelConfig, load_config, to_toml
from trainer.errors import RecipeError
from trainer.experiments import four_layers
from trainer.experiments.catalog import count_four_layers, last_side, make_experiment
from trainer.stopping import StopRequest

Trainer = Callable[..., tuple[int, str, str]]
SETS = tuple(word for text in (*OVERRIDES, "data.mirror=0.5") for word in ("--set", text))


def make(data: Path, run: Path, *more: str) -> int:
    words = ["--config", str(CONFIG), "--data", str(data), "--run", str(run), *map(str, SETS), *more]
    return four_layers.main(words)


def rows_of(run: Path) -> list[dict[str, object]]:
    """Without times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "elapsed_s"} for row in rows]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "state.pt", weights_only=True)
    return {**state["weights"], **{f"v {name}": value for name, value in state["velocities"].items()}}


@pytest.mark.parametrize(("px", "channels"), [(24, 1), (32, 3), (27, 3), (8, 1)])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_net_is_four_plain_layers(px: int, channels: int, activation: str) -> None:
    """In float64, and pooled behind the activation as the paper has it."""
    config = ModelConfig(image_px=224, in_channels=channels, classes=7, activation=activation)  # type: ignore[arg-type]
    object.__setattr__(config, "image_px", px)  # AlexNet itself has no room for so small an image
    net = four_layers.FourLayerNet(config, seed=3)
    assert sum(parameter.numel() for parameter in net.parameters()) == count_four_layers(config)
    again = four_layers.FourLayerNet(config, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert not torch.equal(net.conv1.weight, four_layers.FourLayerNet(config, 4).conv1.weight)
    ratio = net.conv2.weight.flatten()[:9] / net.conv3.weight.flatten()[:9]
    assert ratio.std() > 0.1, "each layer has draws of its own"
    net.double()
    act = {"relu": nn.ReLU, "tanh": nn.Tanh}[activation]
    layers = [
        part for conv in (net.conv1, net.conv2, net.conv3) for part in (conv, act(), nn.MaxPool2d(3, 2, ceil_mode=True))
    ]
    plain = nn.Sequential(*layers, nn.Flatten(), net.fc4)
    images = torch.randn(5, channels, px, px, dtype=torch.float64)
    torch.testing.assert_close(net(images), plain(images), rtol=0, atol=1e-12)
    assert (
        float(net.conv3.weight.detach().std()) == pytest.approx((1 / (32 * 25)) ** 0.5, rel=0.02)
        and not net.fc4.bias.any()
    )


def test_an_image_too_small_is_refused_before_anything() -> None:
    assert [last_side(px) for px in (7, 8)] == [0, 1]
    base = load_config(CONFIG)
    object.__setattr__(base.model, "image_px", 7)
    with pytest.raises(RecipeError, match=r"model\.image_px = 7: figure-1's net of four layers needs 8 px or more"):
        make_experiment("figure-1", base)


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 epochs of 3 steps, to its end."""
    run = tmp_path_factory.mktemp("four") / "run"
    assert make(tiny_data, run) == 0
    return run


def test_a_run_looks_at_its_training_error(whole: Path, tiny_data: Path) -> None:
    rows = rows_of(whole)
    assert [(row["step"], row["epoch"]) for row in rows] == [(step, step / 3) for step in range(1, 7)]
    assert {(row["kind"], row["split"], row["num_samples"]) for row in rows} == {("evaluation", "train", 24)}
    assert rows[-1]["loss"] < rows[0]["loss"]  # type: ignore[operator]
    result = json.loads((whole / "result.json").read_text())
    assert (result["exit_reason"], result["step"], result["top1"]) == ("finished", 6, rows[-1]["top1"])
    assert "mirror = 0.5" in (whole / "config.toml").read_text() and not (whole / ".lock").exists()
    before = {path: path.read_bytes() for path in whole.iterdir()}
    assert make(tiny_data, whole) == 0
    assert {path: path.read_bytes() for path in whole.iterdir()} == before


@pytest.mark.parametrize("after", range(6))
def test_stopped_anywhere_and_gone_on_with(
    after: int, whole: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request to stop at any step is saved; the same command then makes the same bits."""
    update, made = four_layers._Work.update, []

    def counted(work: four_layers._Work, *batch: torch.Tensor) -> float:
        made.append(1)
        if len(made) == after + 1:
            signal.raise_signal(signal.SIGTERM)
        return update(work, *batch)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(four_layers._Work, "update", counted)
        assert make(tiny_data, run) == (3 if after < 5 else 0)
    assert json.loads((run / "result.json").read_text())["step"] == after + 1
    assert make(tiny_data, run) == 0
    assert rows_of(run) == rows_of(whole)
    ours, theirs = weights_of(run), weights_of(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_cannot_go_on_is_one_line(
    whole: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert make(tiny_data, run, "--set", "optimizer.learning_rate=1e30") == 2
    assert "the loss is" in (said := capsys.readouterr().err) and said.count("\n") == 1
    run.mkdir(exist_ok=True)
    (run / "state.pt").write_bytes((whole / "state.pt").read_bytes()[:1000])
    assert make(tiny_data, run) == 2
    assert "state.pt is damaged" in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_the_experiment_finds_the_epochs(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: Trainer
) -> None:
    """Every run is of four layers, and its row counts that net's parameters and its own looks."""
    train_here(monkeypatch)
    words = tiny_words("figure-1", tiny_data, tmp_path / "out", "--variants", "tanh-same", seeds=1)
    assert trainer(*words)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["relu-same", "tanh-same"]
    config = load_config(tmp_path / "out" / "recipes" / "tanh-same.toml")
    assert config.model.activation == "tanh" and "mirror = 0.0" in to_toml(config)
    for row in rows:
        assert row["parameters"] == count_four_layers(config.model) and row["num_samples"] == 24
        assert row["split"] == "train" and row["top5_error"] is None
        looks = rows_of(tmp_path / "out" / "runs" / row["variant"] / "seed-0")
        assert len(looks) == 6 and row["top1_error"] == pytest.approx(1 - looks[-1]["top1"])  # type: ignore[operator]
    assert "Training error" in (tmp_path / "out" / "report.html").read_text()


def test_a_stop_that_comes_first_makes_no_step(whole: Path, tiny_data: Path, tmp_path: Path) -> None:
    stop = StopRequest()
    stop.note(signal.SIGTERM)
    run = four_layers.Run(load_config(whole / "config.toml"), tiny_data, tmp_path, "cpu")
    assert not run.train(stop) and run.step == 0


def test_a_data_set_at_an_address_is_fetched(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the run itself, as by ``train``: on a cluster it is made on another node than the experiment."""
    asked: list[str] = []

    def stage(source: Path) -> Path:
        asked.append(str(source))
        return tiny_data

    monkeypatch.setattr(four_layers, "stage", stage)
    assert make(Path("s3://bucket/data"), tmp_path / "run", "--set", "train.epochs=1") == 0
    assert asked == ["s3:/bucket/data"]
