"""Whole runs through the command line, on the real digits: one process, two processes, interrupted, refused."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.small_disk import small_disk
from tests.helpers.training_commands import CONFIG, DOUBLE, ROOT, command, environment, run, train_words
from trainer.__main__ import main
from trainer.model import kernels
from trainer.parallel.launch import tower_environment
from trainer.training.checkpoint import checkpoints, folder_of
from twotower import listeners
from twotower.meeting import meeting_place

STEPS = 1437 // 128
ROUND_PIXELS = (  # whatever makes floats of them rounds nothing; conv1 is scaled for them, and must not run away
    "data.mean=none",
    'data.normalize="none"',
    "model.init_std=[0.0022, 0.12, 0.1, 0.1, 0.1, 0.12, 0.12, 0.1]",
    'optimizer.layer_overrides=[{layer="conv1", epoch=0, learning_rate=0, bias_learning_rate=0}]',
)
ENDLESS = ("train.epochs=100000", "train.evaluate_every_epochs=0")  # it is ended before, however late we look
EXACT = 1e-12  # of runs in float64 that add in another order: 2^-53 times about a hundred roundings a step, and room
FIRST_LOSS = 1e-5  # of fp32: eight layers, sums of up to 288 products, a random walk: 8 sqrt(288) 2^-24 = 8e-6


@pytest.fixture(scope="module")
def pair(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, one process per tower."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    run(*train_words(digits, folder, "--processes", 2))
    return folder


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of one kind."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def weights(folder: Path, step: int = STEPS) -> dict[str, Any]:
    """Every tensor of a checkpoint, velocities included."""
    return {
        f"{tower}.{name}": tensor
        for tower in "ab"
        for name, tensor in load_file(folder_of(folder, step) / f"tower-{tower}.safetensors").items()
    }


def assert_same(found: Path, expected: Path, step: int = STEPS) -> None:
    """Bit for bit: weights and velocities."""
    ours, theirs = weights(found, step), weights(expected, step)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert bool((ours[name] == tensor).all()), name


def assert_equal_runs(found: Path, expected: Path, after: int = 0) -> None:
    """Both in float64: losses and gradient norms of all steps from ``after``, weights and velocities of the last."""
    ours, theirs = (rows(folder, "step") for folder in (found, expected))
    assert len(ours) == len(theirs) == STEPS
    for own, other in list(zip(ours, theirs, strict=True))[after:]:
        assert own["loss"] == pytest.approx(other["loss"], rel=EXACT)
        assert own["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=EXACT)
    tensors, wanted = weights(found), weights(expected)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.dtype == torch.float64 and tensor.norm() > 0, name
        assert float((tensors[name] - tensor).norm()) <= EXACT * float(tensor.norm()), name


def test_a_run_leaves_everything(serial: Path) -> None:
    """Config, environment, metrics, TensorBoard, checkpoints, result."""
    result = json.loads((serial / "result.json").read_text())
    assert (result["exit_reason"], result["step"], result["num_samples"]) == ("finished", STEPS, 360)
    assert [row["step"] for row in rows(serial, "step")] == list(range(1, STEPS + 1))
    assert {"loss", "learning_rate", "images_per_s", "data_wait_share", "queue_ready_share", "gradient_norm"} <= rows(
        serial, "step"
    )[0].keys()
    assert rows(serial, "evaluation")[-1]["top1"] == result["top1"]
    assert [path.name for path in checkpoints(serial)] == ["step-00000004", "step-00000008", "step-00000011"]
    assert list((serial / "tensorboard").glob("events*"))
    assert {"commit", "torch", "cores", "command", "kernels"} <= json.loads(
        (serial / "environment.json").read_text()
    ).keys()


@pytest.mark.numeric
def test_two_processes_equal_one(exact_serial: Path, digits: Path, tmp_path: Path) -> None:
    """float64: losses, gradient norms, weights and velocities of a whole run.

    One process convolves both towers together: the same sums in another order. In fp32, rounding moves a unit across
    the kink of ReLU sooner or later, on some processors within four steps, and the runs part.
    """
    run(*train_words(digits, tmp_path / "run", "--processes", 2, program=DOUBLE))
    assert_equal_runs(tmp_path / "run", exact_serial)


@pytest.mark.numeric
def test_the_first_loss_of_two_processes_is_that_of_one(serial: Path, pair: Path) -> None:
    """fp32 as users run it. The first loss only: it has no kinks, and no update lies behind it."""
    ours, theirs = (rows(folder, "step")[0]["loss"] for folder in (pair, serial))
    assert ours == pytest.approx(theirs, rel=FIRST_LOSS)


def test_result_holds_the_ledger(pair: Path) -> None:
    """Four crossings there and back, one of them one way, and one control message; nothing else."""
    ledger = json.loads((pair / "result.json").read_text())["ledger"]
    crossings = {(r["name"], r["phase"], r["direction"]): r["bytes"] for r in ledger if r["kind"] == "crossing"}
    assert len(crossings) == 2 * (2 + 2 + 2 + 1)
    assert ("fc8", "forward", "a->b") not in crossings
    assert crossings["fc7", "forward", "a->b"] == crossings["fc7", "backward", "b->a"]
    assert sum(r["bytes"] for r in ledger if r["kind"] == "control") == 48
    assert {r["kind"] for r in ledger} == {"crossing", "control"}


@pytest.mark.slow
@pytest.mark.numeric
def test_crossings_in_half_precision(digits: Path, pair: Path, tmp_path: Path) -> None:
    """Half the bytes on every crossing, nothing else changed; the first loss is that of full precision, nearly.

    fp16 rounds by 2^-11 at most, at four crossings. Later losses part: rounding moves units across the kink of ReLU.
    """
    folder = tmp_path / "run"
    run(*train_words(digits, folder, "--processes", 2, "--profile", 2, overrides=("train.comm_dtype=fp16",)))
    full, half = (json.loads((path / "result.json").read_text())["ledger"] for path in (pair, folder))
    for before, after in zip(full, half, strict=True):
        assert after["bytes"] == before["bytes"] // (2 if before["kind"] == "crossing" else 1), before
    losses = [[row["loss"] for row in rows(path, "step")] for path in (pair, folder)]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=4 * 2**-11)
    assert losses[1] != losses[0]
    for tower in "ab":  # and --profile has recorded both
        events = json.loads((folder / "profile" / f"trace-{tower}.json").read_text())["traceEvents"]
        assert {"aten::conv2d", "ConvolutionBackward0"} <= {event["name"] for event in events}, tower
        assert "aten::" in (folder / "profile" / f"operators-{tower}.txt").read_text()


@pytest.mark.numeric
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_equals_undisturbed(digits: Path, serial: Path, pair: Path, tmp_path: Path, processes: int) -> None:
    """Going on from step 4, as after a kill, gives the same bits; metrics have no gap and no double."""
    undisturbed = serial if processes == 1 else pair
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    for step in (8, 11):
        shutil.rmtree(folder_of(folder, step))
    run(*train_words(digits, folder, "--processes", processes, "--resume", "auto"))
    assert_same(folder, undisturbed)
    losses = [(row["step"], row["loss"]) for row in rows(folder, "step")]
    assert losses == [(row["step"], row["loss"]) for row in rows(undisturbed, "step")]


@pytest.mark.slow
def test_the_digits_recipe_learns(digits: Path, tmp_path: Path) -> None:
    """What make demo promises: at least 0.97 of the 360 held-out digits, in two processes."""
    run("trainer", "train", "--config", CONFIG, "--data", digits, "--run", tmp_path / "run", "--processes", 2)
    result = json.loads(run("trainer", "evaluate", "--run", tmp_path / "run", "--data", digits, "--json").stdout)
    assert result["num_samples"] == 360
    assert result["top1"] >= 0.97


@pytest.mark.numeric
@pytest.mark.slow
def test_split_feeding_trains_the_same_net(digits: Path, pair: Path, tmp_path: Path) -> None:
    """Each tower decodes half: the pixels are in the ledger as input, no crossing; training is the same bits."""
    for name, feed in (("full", ()), ("run", ("data.decode=sharded",))):
        run(*train_words(digits, tmp_path / name, "--processes", 2, overrides=(*ROUND_PIXELS, *feed)))
    assert_same(tmp_path / "run", tmp_path / "full")
    ledger = json.loads((tmp_path / "run" / "result.json").read_text())["ledger"]
    pixels = {row["direction"]: row["bytes"] for row in ledger if row["kind"] == "input"}
    assert pixels == {"a->b": 64 * 28 * 28, "b->a": 64 * 28 * 28}
    crossings = [row for row in ledger if row["kind"] == "crossing"]
    assert crossings == [
        row for row in json.loads((pair / "result.json").read_text())["ledger"] if row["kind"] == "crossing"
    ]


@pytest.mark.slow
def test_a_skip_list_leaves_samples_out(digits: Path, tmp_path: Path) -> None:
    """Thirty images less: an epoch of one step less."""
    keys = [line.split()[-1] for line in (digits / "train" / "train-000000.idx").read_text().splitlines()[1:31]]
    (tmp_path / "skip.txt").write_text("".join(key.split(".")[0] + "\n" for key in keys))
    run(*train_words(digits, tmp_path / "run", "--processes", 2, "--skip-list", tmp_path / "skip.txt"))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["step"] == (1437 - 30) // 128 < STEPS


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(digits: Path, serial: Path, tmp_path: Path) -> None:
    """One flipped bit in the newest: said aloud, the one before is used, the end is the same."""
    folder = tmp_path / "run"
    shutil.copytree(serial, folder)
    shutil.rmtree(folder_of(folder, 11))
    path = folder_of(folder, 8) / "tower-b.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = run(*train_words(digits, folder, "--resume", "auto"))
    assert "tower-b.safetensors is damaged" in done.stderr
    assert "from step 4" in done.stdout
    assert_same(folder, serial)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_stops_cleanly(digits: Path, tmp_path: Path, processes: int) -> None:
    """Room for some checkpoints only: one line, exit code 2, the last complete checkpoint is there and evaluates."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        words = train_words(
            digits, disk / "run", "--processes", processes, overrides=("train.checkpoint_every_steps=1",)
        )
        done = run(*words, code=2)
        assert "error:" in done.stderr
        assert "No space left" in done.stderr
        assert "Traceback" not in done.stderr
        assert checkpoints(disk / "run")
        run("trainer", "evaluate", "--run", disk / "run", "--data", digits)


@pytest.mark.numeric
@pytest.mark.slow
def test_pair_goes_on_from_a_serial_checkpoint(digits: Path, exact_serial: Path, tmp_path: Path) -> None:
    """The same checkpoint serves one process and two; float64, see :func:`test_two_processes_equal_one`."""
    folder = tmp_path / "run"
    shutil.copytree(exact_serial, folder)
    for step in (8, 11):
        shutil.rmtree(folder_of(folder, step))
    run(*train_words(digits, folder, "--processes", 2, "--resume", "auto", program=DOUBLE))
    assert_equal_runs(folder, exact_serial, after=4)  # without velocities it would be off at once


@pytest.mark.numeric
def test_evaluate_agrees_with_the_run(digits: Path, serial: Path) -> None:
    """evaluate reads the checkpoint again and finds what training found, on every held-out image."""
    result = json.loads(run("trainer", "evaluate", "--run", serial, "--data", digits, "--json").stdout)
    assert result["num_samples"] == 360
    assert result["top1"] == json.loads((serial / "result.json").read_text())["top1"]
    assert result["num_correct_top1"] <= result["num_correct_top5"] <= 360


@pytest.mark.slow
def test_torchrun_runs_the_same_command(digits: Path, pair: Path, tmp_path: Path) -> None:
    """torchrun starts the two processes instead of us."""
    words = train_words(digits, tmp_path / "run")
    done = subprocess.run(
        command(
            "torch.distributed.run",
            "--nproc-per-node",
            2,
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            listeners.free_ports(1)[0],  # torchrun wants a number
            "-m",
            "--",  # or torchrun takes --run for an option of its own
            *words,
        ),
        env=environment() | {"GLOO_SOCKET_IFNAME": "lo"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", pair)


def wait_for_steps(folder: Path, process: subprocess.Popen[str], steps: int) -> None:
    """Waits for that many checkpoints: training is under way."""
    deadline = time.monotonic() + 120
    while len(checkpoints(folder)) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint within two minutes"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_and_stops(digits: Path, tmp_path: Path, processes: int, number: signal.Signals) -> None:
    """SIGTERM and Ctrl-C: the step is finished, a complete checkpoint is there, result.json says why."""
    folder = tmp_path / "run"
    words = train_words(digits, folder, "--processes", processes, overrides=ENDLESS)
    process = subprocess.Popen(
        command(*words), env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(folder, process, 1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 3, output + errors
    result = json.loads((folder / "result.json").read_text())
    assert result["exit_reason"] == "stopped"
    assert number.name in result["reason"] or "another process" in result["reason"]
    assert checkpoints(folder)[-1] == folder_of(folder, result["step"])


def test_a_killed_tower_ends_the_run(digits: Path, tmp_path: Path) -> None:
    """SIGKILL of one tower: the other one says which tower, where and when, and nobody waits."""
    folder = tmp_path / "run"
    words = train_words(digits, folder, "--processes", 2, overrides=ENDLESS)
    process = subprocess.Popen(
        command(*words), env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(folder, process, 1)
    os.kill(child_with(process.pid, "RANK=1"), signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL, output + errors
    assert "tower b (rank 1) was ended by SIGKILL" in errors
    assert "tower b (rank 1) is lost at" in errors
    assert json.loads((folder / "result.json").read_text())["exit_reason"] == "failed"
    assert checkpoints(folder)


def child_with(parent: int, variable: str) -> int:
    """The child process of ``parent`` that has a variable in its environment."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with contextlib.suppress(OSError):  # another child, such as git, that ended while we looked
            if variable.encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    raise AssertionError(f"process {parent} has no child with {variable}")


@pytest.mark.slow
def test_not_finite_stops_before_the_update(digits: Path, tmp_path: Path) -> None:
    """The net explodes: both towers stop, step and keys are named, the last checkpoint stays finite."""
    overrides = ("optimizer.learning_rate=1e6", "optimizer.bias_learning_rate=1e6", "train.checkpoint_every_steps=1")
    done = run(*train_words(digits, tmp_path / "run", "--processes", 2, overrides=overrides), code=2)
    assert "not finite" in done.stderr
    assert "batch keys train" in done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["exit_reason"] == "failed"
    assert checkpoints(tmp_path / "run")[-1] == folder_of(tmp_path / "run", result["step"])
    assert all(bool(tensor.isfinite().all()) for tensor in weights(tmp_path / "run", result["step"]).values())


@pytest.mark.slow
@pytest.mark.numeric
def test_towers_with_different_kernels_do_not_start(digits: Path, tmp_path: Path) -> None:
    """One has a C++ compiler, the other has not, or was told to do without: their roundings would differ."""
    if kernels.load() is None:
        pytest.skip("no C++ compiler here")
    words = command(*train_words(digits, tmp_path / "run"))
    start = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with meeting_place() as meeting:
        towers = [
            subprocess.Popen(words, env=environment() | tower_environment(rank, meeting) | switch, **start)
            for rank, switch in enumerate(({}, {"TWOTOWER_KERNELS": "off"}))
        ]
        everything_said = [tower.communicate(timeout=200)[1] for tower in towers]
    for tower, said in zip(towers, everything_said, strict=True):
        assert tower.returncode == 2
        assert (
            "different values of kernels (see TWOTOWER_KERNELS in docs/commands.md): rank 0 C++, rank 1 torch" in said
        )


def test_what_a_user_gets_wrong(
    digits: Path,
    serial: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, exit code 2, nothing touched."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("keep me")
    cases = [
        (train_words(tmp_path / "none", tmp_path / "run"), "no data set folder at"),
        (train_words(digits, other), "holds something that is not a run"),
        (train_words(digits, serial), "--resume auto"),
        (train_words(digits, serial, "--resume", "auto", overrides=("train.seed=3",)), "seed = 0"),
        (train_words(digits, tmp_path / "run", overrides=("model.classes=12",)), "model.classes = 12"),
        (train_words(digits, tmp_path / "run", overrides=("model.image_px=40",)), "--resize 40"),
        (train_words(digits, tmp_path / "run", overrides=("train.batch_size=5000",)), "only 1,437 training images"),
        (["trainer", "evaluate", "--run", tmp_path / "none", "--data", digits], "no run at"),
        (
            ["trainer", "train", "--config", tmp_path / "x.toml", "--data", digits, "--run", tmp_path / "r"],
            "no recipe at",
        ),
        (
            ["trainer", "train", "--config", CONFIG, "--data", digits, "--run", tmp_path / "r", "--device", "cuda"],
            "no GPU",
        ),
    ]
    for words, message in cases[: -1 if torch.cuda.is_available() else None]:
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        assert main() == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert message in lines[0]
    assert [path.name for path in other.iterdir()] == ["precious.txt"]
    assert not (tmp_path / "run").exists()


def test_a_damaged_data_set_leaves_no_run_behind(digits: Path, tmp_path: Path) -> None:
    """The same command works once the data set is repaired."""
    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(digits, data)
    os.truncate(next(data.glob("val/*.tar")), 512)
    said = run(*train_words(data, folder, "--processes", 1), code=2).stderr
    assert "512 bytes" in said and not folder.exists()
