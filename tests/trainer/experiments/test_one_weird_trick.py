"""``experiment one-weird-trick``: rows, what goes on, what is not equal, refusals; processes in a slow test."""

import csv
import functools
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.tiny_run import other_images
from tests.helpers.training_commands import CONFIG
from trainer.config import Config, from_toml, to_toml
from trainer.errors import RunError
from trainer.experiments.one_weird_trick import command
from trainer.experiments.one_weird_trick.found import WORLDS, Traffic, read_speed
from trainer.experiments.one_weird_trick.page import megabytes
from trainer.experiments.one_weird_trick.traffic import towers_formula, workers_formula
from trainer.experiments.one_weird_trick.worker import DTYPES, Job, speed_cases, train
from trainer.parallel.weird_trick import worker_share
from trainer.stopping import Stopped

Trainer = Callable[..., tuple[int, str, str]]


def words(data: Path, output: Path, *more: object) -> list[object]:
    fixed = ("--set", "train.batch_size=8", "--seeds", 1)
    return ["experiment", "one-weird-trick", "--config", CONFIG, "--data", data, "--output", output, *fixed, *more]


@functools.cache
def one_process(config: str, batch_size: int, dtype: str) -> dict[str, Any]:
    """What one process does, once for all tests: the images are always the same."""
    images, labels = IMAGES[0]
    return train(None, from_toml(config), images, labels, batch_size=batch_size, dtype=DTYPES[dtype])


IMAGES: list[tuple[Tensor, Tensor]] = []  # those that the command read first


def stand_in(job: Job, images: Tensor, labels: Tensor, world: int) -> list[Any]:
    """What processes would find that do exactly what one process does."""
    if job.kind == "speed":
        rates = {case.name: [100.0 + 10 * n for n in range(job.rounds)] for case in speed_cases(job.cpus)}
        return [rates] * world
    config = from_toml(job.one_tower)
    sent = {each.name: each.in_ledger(job.batch_size) for each in workers_formula(config.model, world)}
    parts: list[dict[str, Any]] = [{} for _ in range(world)]
    for name in DTYPES:
        serial = one_process(job.one_tower, job.batch_size, name)
        for rank, part in enumerate(parts):
            shares = {what: worker_share(serial[what], "ab"[rank % 2]) for what in ("gradients", "weights")}
            part[name] = {"losses": serial["losses"], "sent": sent, **shares}
    return parts


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """From now on nothing is started; the starts that there would have been: kind and processes."""
    found: list[tuple[str, int]] = []

    def start(_scratch: Path, job: Job, images: Tensor, labels: Tensor, world: int) -> list[Any]:
        found.append((job.kind, world))
        return stand_in(job, images, labels, world)

    def read(plan: command.Plan, count: int) -> tuple[Tensor, Tensor]:
        if not IMAGES:
            IMAGES.append(read_images(plan, count))
        return IMAGES[0]

    def serial(_mesh: None, config: Config, *_: Tensor, batch_size: int, dtype: torch.dtype) -> dict[str, Any]:
        return one_process(to_toml(config), batch_size, str(dtype).removeprefix("torch."))

    def formula(plan: command.Plan) -> list[Traffic]:
        towers, one_tower = (config.model for config in plan.layouts.recipes.values())
        return [
            Traffic("this net", world, tuple(towers_formula(towers, world)), tuple(workers_formula(one_tower, world)))
            for world in WORLDS.values()
        ]

    read_images = command.read_images
    for name, function in (("_start", start), ("read_images", read), ("train", serial), ("_traffic", formula)):
        monkeypatch.setattr(command, name, function)
    monkeypatch.setattr(command, "UPDATES", 2)
    return found


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_row_a_comparison_and_given_again_it_starts_nothing(
    tiny_data: Path, trainer: Trainer, started: list[tuple[str, int]], tmp_path: Path
) -> None:
    output = tmp_path / "trick"
    status, _, err = trainer(*words(tiny_data, output))
    assert (status, err) == (0, "")
    assert started == [("equality", 2), ("equality", 4), ("speed", 2)]
    rows = rows_of(output)
    assert [(row["variant"], row["seed"], row["status"]) for row in rows] == [
        ("two-workers", 0, "ok"),
        ("two-by-two", 0, "ok"),
    ]
    assert all(row[f"{what}_float64"] < 1e-14 for row in rows for what in ("loss", "gradients", "weights"))
    files = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    assert trainer(*words(tiny_data, output))[0] == 0 and len(started) == 3
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == files
    assert trainer(*words(tiny_data, output, "--seeds", 2))[0] == 0
    assert started[3:] == [("equality", 2), ("equality", 4)], "only what is missing"
    check_results(output)


def check_results(output: Path) -> None:
    """Page, tables and bytes agree, and the page asks for nothing outside itself."""
    text, table = (output / "report.html").read_text(), (output / "table.md").read_text()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
    assert "<script" not in text and text.count("<svg") >= 1
    with (output / "bytes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {int(row["batch_size"]) for row in rows} == {32, 64, 128, 256, 512, 1024, 2048, 4096}
    assert {(row["layout"], row["processes"]) for row in rows} == {
        (layout, world) for layout in ("two towers", "one weird trick") for world in "24"
    }
    net = rows[0]["net"]
    sums = [
        sum(int(row["bytes_leaving"]) for row in rows if key(row) == (net, "2", layout, "4096"))
        for layout in ("two towers", "one weird trick")
    ]
    for each in sums:
        shown = megabytes(each)
        assert f"{shown} |\n" in table and f">{shown}</td></tr>" in text
    assert "2 x 2 processes | float64" in table and "1.93 times" in table and "Scheme (a)" in text


def key(row: Mapping[str, str]) -> tuple[str, ...]:
    return row["net"], row["processes"], row["layout"], row["batch_size"]


def test_what_is_not_one_process_is_told(
    tiny_data: Path,
    trainer: Trainer,
    started: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One number of the last rank of 2 x 2, or other bytes, seed by seed; the last two are no number, and right."""
    kinds = ["weights", "losses", "gradients", "sent"]

    def start(_scratch: Path, job: Job, images: Tensor, labels: Tensor, world: int) -> list[Any]:
        parts, seed = stand_in(job, images, labels, world), from_toml(job.one_tower).train.seed
        if job.kind == "equality" and world == 4 and seed <= len(kinds):
            spoil(parts, [*kinds, "nan"][seed])
        return parts

    monkeypatch.setattr(command, "_start", start)
    assert trainer(*words(tiny_data, tmp_path / "trick", "--seeds", len(kinds)))[0] == 3, "unequal, nothing failed"
    status, _, err = trainer(*words(tiny_data, tmp_path / "trick", "--seeds", len(kinds) + 2))
    assert status == 3 and err.count("\n") == len(kinds) + 2
    assert "error: 2 x 2 processes, seed 4: a loss, gradient or weight is not finite" in err
    for seed in range(len(kinds)):
        assert f"error: 2 x 2 processes, seed {seed} is not one process" in err
    assert (tmp_path / "trick" / "report.html").read_text().count("not what one process does") == len(kinds)
    summary = json.loads((tmp_path / "trick" / "summary.json").read_text())
    assert summary["comparisons"] - summary["equal"] == len(kinds) + 1 and summary["failed"] == [["two-by-two", 4]]


def spoil(parts: list[dict[str, Any]], what: str) -> None:
    """Changes what one process found, a little."""
    last = parts[2] if what == "losses" else parts[3]
    if what == "sent":
        parts[0]["float32"]["sent"] = parts[0]["float32"]["sent"] | {"fc6": 1}
    elif what == "losses":
        last["float64"]["losses"] = [loss + 1e-3 for loss in last["float64"]["losses"]]
    else:
        name = "weights" if what == "nan" else what
        changed = {key: tensor.clone() for key, tensor in last["float64"][name].items()}
        greatest = float(changed["fc7.weight"].abs().max())
        changed["fc7.weight"][1, 1] += float("nan") if what == "nan" else 2e-5 * greatest
        last["float64"][name] = changed


def test_a_start_that_fails_is_a_row_with_its_reason_and_is_tried_again(
    tiny_data: Path,
    trainer: Trainer,
    started: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "trick"

    def fail(_scratch: Path, job: Job, images: Tensor, labels: Tensor, world: int) -> list[Any]:
        if world == 4 or job.kind == "speed":
            raise RunError("a process ended with status 137: see above")
        return stand_in(job, images, labels, world)

    with monkeypatch.context() as patch:
        patch.setattr(command, "_start", fail)
        status, _, err = trainer(*words(tiny_data, output))
    assert status == 3 and "error: the timing failed" in err and "the same command tries again" in err
    assert [row["status"] for row in rows_of(output)] == ["ok", "failed"]
    text = (output / "report.html").read_text()
    assert "status 137" in text and "Speed on this machine" not in text
    assert trainer(*words(tiny_data, output))[0] == 0
    assert started == [("equality", 4), ("speed", 2)] and [row["status"] for row in rows_of(output)] == ["ok", "ok"]


def test_stopped_it_goes_on_where_it_was(
    tiny_data: Path,
    trainer: Trainer,
    started: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The processes end, nothing of the folder is held, and the comparison that was done is not made again."""

    def stop(_scratch: Path, job: Job, images: Tensor, labels: Tensor, world: int) -> list[Any]:
        if world == 4:
            raise Stopped(signal.SIGTERM)
        return stand_in(job, images, labels, world)

    output = tmp_path / "trick"
    with monkeypatch.context() as patch:
        patch.setattr(command, "_start", stop)
        status, _, err = trainer(*words(tiny_data, output))
    assert status == 128 + signal.SIGTERM and err.startswith("stopped by SIGTERM") and err.count("\n") == 1
    assert len(rows_of(output)) == 1 and not (output / ".lock").exists()
    assert trainer(*words(tiny_data, output))[0] == 0 and started == [("equality", 4), ("speed", 2)]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--parallel", 2), "--parallel: one-weird-trick trains no runs"),
        (("--processes", 2), "--processes: one-weird-trick trains no runs"),
        (("--variants", "a"), "--variants: one-weird-trick trains no runs"),
        (("--address", "auto"), "--address: one-weird-trick trains no runs"),
        (("--set", "model.towers=1"), "expected model.towers = 2"),
        (("--set", 'model.crossings=["fc8"]'), "as in configs/paper.toml (here 2 and fc8)"),
        (("--set", "train.batch_size=7"), "train.batch_size = 7 cannot be divided among 2"),
        (("--set", 'model.post_ops=[["batch_norm"],["relu"],["relu"],["relu"],["relu"]]'), "post_ops has batch_norm"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_written(
    tiny_data: Path, trainer: Trainer, tmp_path: Path, more: tuple[object, ...], said: str
) -> None:
    status, out, err = trainer(*words(tiny_data, tmp_path / "trick", *more))
    assert status == 2 and err.count("\n") == 1 and said in err and not out
    assert not (tmp_path / "trick").exists()


def test_its_folder_is_its_own(
    tiny_data: Path, trainer: Trainer, started: list[tuple[str, int]], tmp_path: Path
) -> None:
    output = tmp_path / "trick"
    assert trainer(*words(tiny_data, output))[0] == 0
    other = ["experiment", "views", *words(tiny_data, output)[2:]]
    assert "holds experiment one-weird-trick" in trainer(*other)[2]
    assert "another data set" in trainer(*words(other_images(tiny_data, tmp_path / "other"), output))[2]
    assert "another recipe" in trainer(*words(tiny_data, output, "--set", "optimizer.momentum=0.5"))[2]


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    tiny_data: Path, trainer: Trainer, tmp_path: Path
) -> None:
    status, out, _ = trainer(*words(tiny_data, tmp_path / "trick", "--dry-run"))
    assert status == 0 and "2 comparisons (1 seed, on 2 and on 2 x 2 processes" in out and "hours at" in out
    assert "GiB in TMPDIR" in out and not (tmp_path / "trick").exists()


def test_differences_are_relative_to_the_greatest_number() -> None:
    expected = torch.tensor([0.0, -4.0])
    assert command.relative_difference(torch.tensor([0.5, -4.0]), expected) == 0.125
    assert command.relative_difference(torch.zeros(2), torch.zeros(2)) == 0
    assert command.relative_difference(torch.ones(2), torch.zeros(2)) == 1
    with pytest.raises(RunError, match="not finite"):
        command.relative_difference(torch.tensor([float("nan"), -4.0]), expected)


def test_half_and_all_of_the_cores_are_timed_once_each() -> None:
    """With one core there is no half."""
    assert [(case.processes, case.threads) for case in speed_cases(8)] == 2 * [(1, 4), (1, 8), (2, 4)]
    assert [(case.processes, case.threads) for case in speed_cases(1)] == 2 * [(1, 1), (2, 1)]


@pytest.mark.slow
def test_real_processes_equal_one(
    tiny_data: Path, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two, and two by two, over gloo, to the page; bytes of the paper's net beside the recipe's."""
    monkeypatch.setattr(command, "ROUNDS", 2)
    monkeypatch.setattr(command, "SLOT_S", 0.01)
    status, _, err = trainer(*words(tiny_data, tmp_path / "trick"))
    assert status == 0, err
    rows = rows_of(tmp_path / "trick")
    assert [row["variant"] for row in rows] == list(WORLDS)
    assert all(row[f"{what}_float64"] < 1e-12 for row in rows for what in ("loss", "gradients", "weights"))
    speed = read_speed(tmp_path / "trick" / "speed.json")
    assert speed and all(len(rates) == 2 and min(rates) > 0 for rates in speed.rates.values())
    assert {case.name for case in speed_cases(speed.cpus)} == set(speed.rates)
    summary = json.loads((tmp_path / "trick" / "summary.json").read_text())
    assert 90 < summary["crossover_batch"]["the paper's net, 2 processes"] < 92
    check_results(tmp_path / "trick")
