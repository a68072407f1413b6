"""``data.last_batch = "partial"``: an epoch's last, smaller batch is trained too, by the mean over its own rows."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.loader.batches import TrainingLoader
from tests.helpers.loader_data_set import make_data_set
from tests.helpers.training_commands import CONFIG, run
from trainer.config import load_config
from trainer.errors import RecipeError
from trainer.model.alexnet import AlexNet
from trainer.model.layers import DropoutDraws
from trainer.parallel.crossing import make_net
from trainer.training.checkpoint import checkpoints, folder_of
from trainer.training.optimizer import PaperSGD, Rates
from trainer.training.step import ForwardBackward

NUM_TRAIN, BATCH = 40, 16  # so 16, 16 and 8
OVERRIDES = (
    "data.last_batch=partial",
    f"train.batch_size={BATCH}",
    "train.epochs=2",
    "train.checkpoint_every_steps=1",
    "train.keep_checkpoints=9",
    "model.dropout=0.5",
    "optimizer.milestones=[0.5, 1.5]",  # in mid-epoch: before the third and the sixth step
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("partial") / "data"
    return make_data_set(folder, encoding="png", channels=1, size=(32, 32), train=NUM_TRAIN, val=5)


def train(data: Path, folder: Path, *more: object) -> Path:
    words = [word for text in OVERRIDES for word in ("--set", text)]
    run("trainer", "train", "--config", CONFIG, "--data", data, "--run", folder, *words, *more)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path) -> Path:
    return train(data, data.parent / "run")


def steps(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "step"]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    files = {tower: folder_of(folder, step) / f"tower-{tower}.safetensors" for tower in "ab"}
    return {f"{tower}.{name}": tensor for tower, path in files.items() for name, tensor in load_file(path).items()}


def test_its_gradient_is_that_of_its_images_alone(data: Path) -> None:
    """Bit for bit what a loss over these eight rows and no others has, dropout masks included."""
    config = load_config(CONFIG, OVERRIDES)
    loader = TrainingLoader(data, config.data, batch_size=BATCH, seed=config.train.seed)
    batches = [loader.next() for _ in range(3)]
    assert [len(batch.keys) for batch in batches] == [16, 16, 8]
    ours, alone = (AlexNet(config.model, seed=1) for _ in range(2))
    images, labels = batches[2].images.contiguous(memory_format=torch.channels_last), batches[2].labels
    found = ForwardBackward(ours, config.train, mesh=None)(images, labels, 2)
    loss = alone.loss(images, labels, DropoutDraws(config.train.seed, 2))
    loss.backward()
    assert found == loss.item()
    for (name, mine), theirs in zip(ours.named_parameters(), alone.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None and bool(mine.grad.any()), name
        assert torch.equal(mine.grad, theirs.grad), name


def test_a_run_by_hand(data: Path, whole: Path) -> None:
    """Six steps of a run: these batches, dropout masks of the step, and from each step on the rates of its epoch."""
    config = load_config(CONFIG, OVERRIDES)
    loader = TrainingLoader(data, config.data, batch_size=BATCH, seed=config.train.seed)
    net = make_net(config, None)
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for step in range(6):
        batch = loader.next()
        optimizer.zero_grad()
        images = batch.images.contiguous(memory_format=torch.channels_last)
        net.loss(images, batch.labels, DropoutDraws(config.train.seed, step)).backward()
        factor = [1, 1, 0.2, 0.2, 0.2, 0.04][step]
        optimizer.set_rates(Rates(0.01 * factor, 0.02 * factor))
        optimizer.step()
    torch.set_num_threads(threads)
    found = weights(whole, 6)
    for kind, tensors in (
        ("", dict(net.named_parameters())),
        ("velocity/", {name: optimizer.velocity(parameter) for name, parameter in net.named_parameters()}),
    ):
        for tower, named in net.split_towers(tensors).items():
            for name, tensor in named.items():
                ours = found[f"{tower}.{kind}{name}"]
                assert (ours - tensor).norm() <= 1e-4 * tensor.norm(), (tower, kind, name)


def test_a_run_takes_it_in_every_epoch(whole: Path) -> None:
    rows = steps(whole)
    assert [(row["step"], row["epoch"]) for row in rows] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1)]
    assert json.loads((whole / "result.json").read_text())["epoch"] == 2


@pytest.mark.parametrize("step", [2, 3])
def test_resumed_equals_undisturbed(data: Path, whole: Path, tmp_path: Path, step: int) -> None:
    """Going on before it and after it gives the same bits."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for found in checkpoints(folder):
        if found > folder_of(folder, step):
            shutil.rmtree(found)
    train(data, folder, "--resume", "auto")
    ours, theirs = weights(folder, 6), weights(whole, 6)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert [row["loss"] for row in steps(folder)] == [row["loss"] for row in steps(whole)]


@pytest.mark.slow
def test_two_processes_take_it_too(data: Path, whole: Path, tmp_path: Path) -> None:
    """Losses as in one; and going on with a partial batch leaves the ledger that of a whole one."""
    pair = train(data, tmp_path / "pair", "--processes", 2)
    for ours, theirs in zip(steps(pair), steps(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    expected = json.loads((pair / "result.json").read_text())["ledger"]
    for found in checkpoints(pair):
        if found > folder_of(pair, 2):
            shutil.rmtree(found)
    train(data, pair, "--processes", 2, "--resume", "auto")
    assert json.loads((pair / "result.json").read_text())["ledger"] == expected


def test_it_is_refused_where_a_batch_is_divided(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.accumulate is 2: expected 1 with data\.last_batch = partial"):
        load_config(CONFIG, [*OVERRIDES, "train.accumulate=2"])
    with pytest.raises(RecipeError, match=r"last_batch is 'partial': expected 'drop' with data\.decode = 'sharded'"):
        load_config(CONFIG, [*OVERRIDES, "data.decode=sharded"])
    words = [word for text in OVERRIDES for word in ("--set", text)]
    more = ("--processes", 2, "--replicas", 2)
    done = run("trainer", "train", "--config", CONFIG, "--data", data, "--run", tmp_path / "r", *words, *more, code=2)
    assert done.stderr == "error: data.last_batch is 'partial': expected 'drop' with 2 replicas\n"
