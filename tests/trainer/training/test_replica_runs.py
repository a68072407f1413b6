"""Whole runs of two pairs of towers through the command line: equal to one pair, interrupted, killed, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.helpers.training_commands import DOUBLE, ROOT, command, environment, run, train_words
from tests.trainer.training.test_runs import (
    ENDLESS,
    FIRST_LOSS,
    ROUND_PIXELS,
    STEPS,
    assert_equal_runs,
    assert_same,
    child_with,
    rows,
    wait_for_steps,
    weights,
)
from trainer.__main__ import main
from trainer.training.checkpoint import checkpoints, folder_of
from twotower import listeners

FOUR = ("--processes", 2, "--replicas", 2)
LONG = (*ENDLESS, "train.peer_timeout_s=30")


@pytest.fixture(scope="module")
def four(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two pairs."""
    folder = tmp_path_factory.mktemp("four") / "run"
    run(*train_words(digits, folder, *FOUR))
    return folder


@pytest.fixture(scope="module")
def exact_four(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float64."""
    folder = tmp_path_factory.mktemp("exact-four") / "run"
    run(*train_words(digits, folder, *FOUR, program=DOUBLE))
    return folder


def cut(folder: Path, new: Path, step: int) -> Path:
    """A copy of a run as a kill after a checkpoint leaves it."""
    shutil.copytree(folder, new)
    for found in checkpoints(new):
        if found > folder_of(new, step):
            shutil.rmtree(found)
    return new


@pytest.mark.numeric
@pytest.mark.slow
def test_two_pairs_equal_one_process(exact_serial: Path, exact_four: Path) -> None:
    """float64: losses, gradient norms, weights and velocities of a whole run."""
    assert_equal_runs(exact_four, exact_serial)


@pytest.mark.numeric
@pytest.mark.slow
def test_a_run_of_two_pairs(serial: Path, four: Path) -> None:
    """fp32: the first loss, see test_training; one set of metrics; the sums are in the ledger."""
    first, expected = (rows(folder, "step")[0]["loss"] for folder in (four, serial))
    assert first == pytest.approx(expected, rel=FIRST_LOSS)
    assert [row["step"] for row in rows(four, "step")] == list(range(1, STEPS + 1))
    result = json.loads((four / "result.json").read_text())
    assert (result["exit_reason"], result["processes"], result["num_samples"]) == ("finished", 4, 360)
    assert {row["kind"] for row in result["ledger"]} == {"crossing", "control", "replica"}
    (sums,) = [row for row in result["ledger"] if row["kind"] == "replica"]
    of_tower_a = [t for name, t in weights(four).items() if name.startswith("a.") and "velocity" not in name]
    assert sums["bytes"] == sum(tensor.nbytes for tensor in of_tower_a)


@pytest.mark.numeric
@pytest.mark.slow
def test_resumed_equals_undisturbed(digits: Path, four: Path, tmp_path: Path) -> None:
    """Four processes go on from step 4 and end with the same bits."""
    folder = cut(four, tmp_path / "run", 4)
    run(*train_words(digits, folder, *FOUR, "--resume", "auto"))
    assert_same(folder, four)
    assert [row["loss"] for row in rows(folder, "step")] == [row["loss"] for row in rows(four, "step")]


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("back", [False, True])
def test_other_numbers_of_processes_go_on(
    digits: Path, exact_serial: Path, exact_four: Path, tmp_path: Path, back: bool
) -> None:
    """One process goes on where four were, and four where one was: the same images, masks and run, in float64."""
    begun, processes = (exact_serial, FOUR) if back else (exact_four, ())
    folder = cut(begun, tmp_path / "run", 4)
    run(*train_words(digits, folder, *processes, "--resume", "auto", program=DOUBLE))
    assert_equal_runs(folder, begun, after=4)


@pytest.mark.numeric
@pytest.mark.slow
def test_split_feeding_with_replicas(digits: Path, tmp_path: Path) -> None:
    """Every process decodes a quarter of the batch; the images are the same, so training is the same bits."""
    for name, feed in (("full", ()), ("run", ("data.decode=sharded",))):
        run(*train_words(digits, tmp_path / name, *FOUR, overrides=(*ROUND_PIXELS, *feed)))
    assert_same(tmp_path / "run", tmp_path / "full")


@pytest.mark.slow
def test_torchrun_starts_two_pairs(digits: Path, four: Path, tmp_path: Path) -> None:
    """A world of four under torchrun is two pairs; a world of three is refused."""
    for processes, code in ((4, 0), (3, 1)):
        launcher = ["torch.distributed.run", "--nproc-per-node", processes, "--master-addr", "127.0.0.1"]
        words = train_words(digits, tmp_path / f"run-{processes}")
        done = subprocess.run(
            command(*launcher, "--master-port", listeners.free_ports(1)[0], "-m", "--", *words),
            env=environment() | {"GLOO_SOCKET_IFNAME": "lo"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == code, done.stderr
    assert "3 processes were started: two towers need 2" in done.stderr
    assert not (tmp_path / "run-3").exists()
    assert_same(tmp_path / "run-4", four)


def start(digits: Path, folder: Path) -> subprocess.Popen[str]:
    """A long run of two pairs, once it has saved its first checkpoint."""
    words = train_words(digits, folder, *FOUR, overrides=LONG)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(*words), env=environment(), cwd=ROOT, **pipes)  # type: ignore[call-overload]
    wait_for_steps(folder, process, 1)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 3])
def test_a_killed_rank_ends_all(digits: Path, tmp_path: Path, rank: int) -> None:
    """SIGKILL of one of four: every other one ends by itself and names it."""
    process = start(digits, tmp_path / "run")
    os.kill(child_with(process.pid, f"RANK={rank}"), signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL, output + errors
    assert f"tower {'ab'[rank % 2]} (rank {rank}) was ended by SIGKILL" in errors
    said = [line for line in errors.splitlines() if f"(rank {rank}) is lost at" in line]
    assert len(said) == 3, errors
    assert json.loads((tmp_path / "run" / "result.json").read_text())["exit_reason"] == "failed"
    assert checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_an_undecodable_image_is_named_to_all(digits: Path, tmp_path: Path) -> None:
    """Its name and exit code 2, from every process; nobody is called lost.

    Each process decodes one image at a time: DALI's CPU decoder may end the process where it refuses an image while
    others of the batch are being decoded (``trainer.parallel.launch.DAMAGE``).
    """
    data = Path(shutil.copytree(digits, tmp_path / "data"))
    tar = sorted((data / "train").glob("*.tar"))[0]
    with tarfile.open(tar) as archive:
        images = [member for member in archive if member.name.endswith(".png")]
    content = bytearray(tar.read_bytes())
    for image in images:
        content[image.offset_data + 16 : image.offset_data + image.size] = bytes(image.size - 16)
    tar.write_bytes(content)
    done = run(*train_words(data, tmp_path / "run", *FOUR, overrides=("train.batch_size=2",)), code=2)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 4 and all("cannot decode train/train-000000.tar: image train-" in line for line in said), said
    assert "lost" not in done.stderr
    assert "image train-" in json.loads((tmp_path / "run" / "result.json").read_text())["reason"]


@pytest.mark.slow
def test_a_signal_saves_and_stops(digits: Path, tmp_path: Path) -> None:
    """SIGTERM to one process of four only: all finish the step, one complete checkpoint, result.json says why."""
    folder = tmp_path / "run"
    process = start(digits, folder)
    os.kill(child_with(process.pid, "RANK=3"), signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 3, output + errors
    result = json.loads((folder / "result.json").read_text())
    assert (result["exit_reason"], result["reason"]) == ("stopped", "asked to by another process")
    assert checkpoints(folder)[-1] == folder_of(folder, result["step"])


def test_what_cannot_be_shared_is_refused(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2, nothing written."""
    post_ops = '[["relu", "batch_norm", "maxpool"], ["relu", "maxpool"], ["relu"], ["relu"], ["relu", "maxpool"]]'
    batch_norm = (f"model.post_ops={post_ops}",)
    cases = [
        (("--replicas", 2), (), "add --processes 2"),
        (("--processes", 2, "--replicas", 3), (), "cannot be divided among 3 replicas"),
        (FOUR, ("train.accumulate=128",), "use a multiple of 256"),
        ((), ("train.accumulate=3",), "train.accumulate is 3: expected a divisor"),
        (FOUR, batch_norm, "use one replica"),
        ((), (*batch_norm, "train.accumulate=2"), "use one replica"),
    ]
    for options, overrides, message in cases:
        words = train_words(digits, tmp_path / "run", *options, overrides=overrides)
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        assert main() == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert line.startswith("error: ")
        assert message in line
    assert not (tmp_path / "run").exists()
