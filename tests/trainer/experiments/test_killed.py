"""An experiment that is killed in the middle of a run, and given again, ends with the same rows."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.experiments import tiny_words
from tests.helpers.frozen import POLL_S, hold
from tests.helpers.training_commands import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAMES = ("results.jsonl", "results.csv", "summary.json", "table.md")


def start(words: list[object]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "trainer", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def hold_in_second_run(folder: Path, experiment: "subprocess.Popen[bytes]") -> None:
    """Stops the experiment in its second run, however soon that ends, and waits for a checkpoint of that."""
    run = folder / "runs" / "no-dropout" / "seed-0"

    def find() -> list[int]:
        assert experiment.poll() is None, experiment.communicate()
        return [experiment.pid] if trainers_of(run) else []

    hold(find, "its second training")
    while not list(run.glob("checkpoints/step-*")):
        assert trainers_of(run), "a training without a checkpoint"
        time.sleep(POLL_S)


def trainers_of(folder: Path) -> list[int]:
    """Processes that train in a folder, or below it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:4] == [b"-m", b"trainer", b"train"] and any(word.startswith(os.fsencode(folder)) for word in words):
            found.append(int(path.parent.name))
    return found


def test_killed_in_the_middle_and_given_again(tiny_data: Path, tmp_path: Path) -> None:
    """SIGKILL leaves no training behind, and the next start needs no look at what was there."""
    more = ("--variants", "no-dropout", "--set", "train.epochs=12")
    words = {name: tiny_words("ablations", tiny_data, tmp_path / name, *more, seeds=1) for name in ("whole", "killed")}
    whole = start(words["whole"])
    said = whole.communicate(timeout=600)[0]
    assert whole.returncode == 0, said
    experiment = start(words["killed"])
    hold_in_second_run(tmp_path / "killed", experiment)
    experiment.kill()
    experiment.wait()
    deadline = time.monotonic() + 300
    while trainers_of(tmp_path / "killed" / "runs"):
        assert time.monotonic() < deadline, "a training goes on although its experiment was killed"
        time.sleep(POLL_S)
    again = start(words["killed"])
    said = again.communicate(timeout=600)[0]
    assert again.returncode == 0 and b"runs 1/2 are done already" in said, said
    for name in NAMES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
