"""Plans of runs: memory counted by hand, crossings against the ledger, and nothing started or written."""

import dataclasses

import pytest
import torch

from tests.helpers.loader_data_set import make_data_set
from tests.helpers.synthetic_run import ROOT, digits_config, ledger_of, make_run
from trainer.__main__ import main
from trainer.config import load_config
from trainer.model.alexnet import AlexNet
from trainer.model.layers import DropoutDraws
from trainer.parallel import launch
from trainer.planning import dry_run
from trainer.planning.describe import to_dict
from trainer.planning.dry_run import EchoLink, plan_run, print_plan

pytestmark = pytest.mark.numeric

# What autograd keeps of one 28 px digit on one tower of configs/digits.toml, elements of 4 bytes.
KEPT = {
    "image, conv1's input": 28 * 28,
    "conv1 after ReLU, the normalization's input": 8 * 28 * 28,
    "normalized, pool1's input": 8 * 28 * 28,
    "pool1's indices, int64": 2 * 8 * 13 * 13,
    "pool1, conv2's input": 8 * 13 * 13,
    "conv2 after ReLU": 16 * 13 * 13,
    "normalized, pool2's input": 16 * 13 * 13,
    "pool2's indices, int64": 2 * 16 * 6 * 6,
    "both towers' pool2": 2 * 16 * 6 * 6,
    "conv3": 24 * 6 * 6,
    "conv4": 24 * 6 * 6,
    "conv5": 16 * 6 * 6,
    "pool5's indices, int64": 2 * 16 * 2 * 2,
    "both towers' pool5": 2 * 16 * 2 * 2,
    "fc6 after ReLU, and its mask": 2 * 128,
    "both towers' fc6": 2 * 128,
    "fc7 after ReLU, and its mask": 2 * 128,
    "both towers' fc7": 2 * 128,
    "log softmax, and the label in int64": 10 + 2,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry") / "data"
    return make_data_set(folder, encoding="png", channels=1, size=(32, 32), train=150, val=4, shard_size=80)


def test_memory_of_a_tower_by_hand():
    config = digits_config()
    net = dry_run._lone_tower(config, EchoLink("a"))
    one, two, five = (dry_run._kept_bytes(config, net, count) for count in (1, 2, 5))
    assert two - one == 4 * sum(KEPT.values())
    assert five == one + 4 * (two - one)


def test_plan_of_two_processes(data):
    config = digits_config()  # batch 64
    plan = plan_run(config, data, processes=2, measure=False)
    assert (plan.steps_per_epoch, plan.steps, plan.done) == (2, 40, 0)
    counts = to_dict(config.model)
    assert [row.parameters for row in plan.memory] == [4 * counts["parameters_a"], 4 * counts["parameters_b"]]
    assert 0 <= plan.memory[0].kept - 64 * 4 * sum(KEPT.values()) < 100  # the loss itself is kept once a batch
    assert plan.memory[0].batches == 3 * 64 * 4 * 28 * 28
    assert plan.memory[0].total == 3 * plan.memory[0].parameters + plan.memory[0].kept + plan.memory[0].batches
    assert plan.needed_bytes == sum(row.total for row in plan.memory)  # the processes share the machine's memory
    assert plan.step_s is None and plan.remaining_s is None


def test_plan_of_two_pairs_and_of_pieces(data):
    """Each process takes its share; pieces halve what the forward keeps, and leave the rest."""
    config = digits_config()
    pair, pairs = (plan_run(config, data, processes=2, replicas=number, measure=False) for number in (1, 2))
    assert pairs.images == config.train.batch_size // 2 and pairs.steps == pair.steps
    for row, whole in zip(pairs.crossings, pair.crossings, strict=True):
        assert row.num_bytes == (whole.num_bytes if row.name == "control" else whole.num_bytes // 2)
    assert pairs.needed_bytes == 2 * sum(row.total for row in pairs.memory)  # on one machine
    pieces = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=2))
    half = plan_run(pieces, data, processes=2, measure=False)
    for row, whole, share in zip(half.memory, pair.memory, pairs.memory, strict=True):
        assert (row.kept, row.batches) == (share.kept, whole.batches)
        assert row.kept < whole.kept


def test_crossings_are_those_of_the_ledger(data):
    config = digits_config()
    expected = {(row["name"], row["phase"], row["direction"]): row["bytes"] for row in ledger_of(config)}
    expected = {("control" if name.startswith("flags") else name, *rest): n for (name, *rest), n in expected.items()}
    plan = plan_run(config, data, processes=2, measure=False)
    assert {(row.name, row.phase, row.direction): row.num_bytes for row in plan.crossings} == expected
    half = load_config(ROOT / "configs" / "digits.toml", ["train.batch_size=64", 'train.precision="bf16"'])
    narrow = plan_run(half, data, processes=2, measure=False).crossings
    for row in narrow:
        share = 1 if row.name == "control" else 2
        assert share * row.num_bytes == expected[row.name, row.phase, row.direction]
    only_loss = load_config(ROOT / "configs" / "digits.toml", ['model.crossings=["fc8"]'])
    rows = plan_run(only_loss, data, processes=2, measure=False).crossings
    assert [(row.name, row.direction) for row in rows[:2]] == [("fc8", "b->a"), ("fc8", "a->b")]


def test_a_tower_beside_its_echo_is_that_tower(data):
    config = digits_config()
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)).double()
    alone = dry_run._lone_tower(config, EchoLink("a")).double()
    loss = alone.loss(images, torch.tensor([1, 2]), DropoutDraws(0, 0))
    loss.backward()
    twins = AlexNet(config.model).double()
    for parts in twins.split_towers(twins.state_dict()).values():
        for name, part in parts.items():
            part.copy_(alone.state_dict()[name])
    twins.drop6.towers = twins.drop7.towers = ("a", "a")  # the same dropout masks
    assert twins.loss(images, torch.tensor([1, 2]), DropoutDraws(0, 0)).item() == pytest.approx(loss.item(), rel=1e-12)
    assert all(parameter.grad is not None for parameter in alone.parameters())


def test_measured_step_and_time_left(data, tmp_path):
    config = digits_config()
    run = make_run(tmp_path / "run", config, steps=30)
    plan = plan_run(config, data, run=run)
    assert plan.done == 30
    assert plan.step_s > 0
    assert plan.remaining_s == pytest.approx(10 * plan.step_s)
    assert "both towers in this process" in plan.measured
    assert plan.crossings == ()


def test_a_busy_machine_is_said(monkeypatch):
    monkeypatch.setattr(dry_run.os, "getloadavg", lambda: (999.0, 0.0, 0.0))
    assert "the machine is busy (load 999.0 on" in dry_run._busy()
    monkeypatch.setattr(dry_run.os, "getloadavg", lambda: (0.0, 999.0, 999.0))
    assert dry_run._busy() == ""


def test_what_does_not_fit_is_not_tried(data, monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "_available_bytes", lambda device: 1000)
    monkeypatch.setattr(dry_run, "_measure", lambda plan: pytest.fail("tried"))
    print_plan(plan_run(digits_config(), data))
    text = capsys.readouterr().out
    assert "does NOT fit" in text
    assert "not measured: it does not fit into memory" in text


def test_command_starts_nothing_and_writes_nothing(data, tmp_path, monkeypatch, capsys):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(launch.subprocess, "Popen", refuse)
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    words = ["train", "--config", str(ROOT / "configs" / "digits.toml"), "--data", str(data), "--run", "run"]
    monkeypatch.setattr("sys.argv", ["trainer", *words, "--processes", "2", "--device", "cpu", "--dry-run"])
    assert main() == 0
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    text = capsys.readouterr().out
    assert "20 epochs of 4 steps: 80 steps" in text
    assert "two processes, one per tower, cpu, fp32, batch 32" in text
    assert "images/s" in text
    assert "426,032" in text  # bytes of a step, as in the result.json of a run with this recipe
