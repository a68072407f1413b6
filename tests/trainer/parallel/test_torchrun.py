"""``torchrun --max-restarts`` gives the same command again, also with ``--overwrite``: the run goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.training_commands import ROOT
from tests.trainer.training.test_runs import child_with
from twotower.listeners import free_ports

WORDS = "--max-restarts 1 -m -- trainer train --config configs/digits.toml --overwrite"
ENDLESS = "--set train.epochs=5000 --set optimizer.milestones=[] --set train.evaluate_every_epochs=0"


@pytest.mark.slow
def test_a_restart_by_torchrun_goes_on_and_wipes_nothing(digits, tmp_path):
    """Tower a is killed once there is a checkpoint; the run has no end that could come first."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    words += ["--master-port", str(free_ports(1)[0]), *WORDS.split(), *ENDLESS.split()]
    with (
        log.open("w") as output,
        subprocess.Popen(
            [*words, "--data", str(digits), "--run", str(run)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            wait(lambda: list(run.glob("checkpoints/step-*")), process, log)
            os.kill(child_with(process.pid, "RANK=0"), signal.SIGKILL)
            wait(lambda: re.search(r"from step [1-9]", log.read_text()), process, log)
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            assert rows[0]["step"] == 1, "what was there before the restart is kept"
        finally:
            process.terminate()


def wait(true, process, log: Path) -> None:
    """Wait for a condition while the process lives."""
    deadline = time.monotonic() + 300
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
