"""Slow tests of the loader: two towers killed at any step and continued, and memory over many epochs."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.loader.batches import TrainingLoader
from pipeline.loader.config import LoaderConfig
from tests.helpers.loader_data_set import make_data_set

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
# A tower: writes what it got, then its state, one line per step; begins after the last whole line of the file given.
TOWER = """
import json, pathlib, sys
from pipeline.loader.config import LoaderConfig
from pipeline.loader.batches import TrainingLoader
data, log, prefetch, steps = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
lines = log.read_text().splitlines() if log.exists() else []
state = json.loads(lines[-1])["state"] if lines else None
config = LoaderConfig(crop_px=24, color="deviation", threads=1, prefetch=prefetch)
loader = TrainingLoader(pathlib.Path(data), config, batch_size=7, seed=11, state=state)
with log.open("a") as file:
    for step in range(len(lines), steps):
        batch = loader.next()
        row = {"keys": batch.keys, "draws": batch.draws.tolist(), "fingerprint": batch.fingerprint}
        row["pixels"] = float(batch.images.double().abs().sum())
        file.write(json.dumps({**row, "state": loader.state()}) + "\\n")
        file.flush()
        print(step, flush=True)
"""


def start(data: Path, log: Path, prefetch: int, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TOWER, str(data), str(log), str(prefetch), str(steps)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def rows(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_two_towers_killed_at_several_steps_get_the_undisturbed_sequence(tmp_path: Path) -> None:
    data = make_data_set(tmp_path / "data", train=45, size=(32, 32))  # 6 batches an epoch, one dropped
    steps, cuts = 20, (1, 6, 13)
    undisturbed = start(data, tmp_path / "whole.jsonl", 2, steps)
    undisturbed.communicate(timeout=200)
    for tower, prefetch in (("a", 1), ("b", 4)):
        log = tmp_path / f"{tower}.jsonl"
        for cut in (*cuts, steps):
            process = start(data, log, prefetch, steps)
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) == cut - 1:
                    process.send_signal(signal.SIGKILL)
                    break
            process.wait(200)
            text = log.read_text()
            log.write_text(text[: text.rfind("\n") + 1])  # a line that the kill tore is as good as not written
    expected = rows(tmp_path / "whole.jsonl")
    assert len(expected) == steps
    assert rows(tmp_path / "a.jsonl") == rows(tmp_path / "b.jsonl") == expected


def anonymous_mb() -> float:
    """Memory of this process that no file stands behind."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_memory_is_flat_over_many_epochs(tmp_path: Path) -> None:
    data = make_data_set(tmp_path, train=320, size=(128, 128), shard_size=40)
    config = LoaderConfig(crop_px=112, color="deviation", threads=2)
    loader = TrainingLoader(data, config, batch_size=16, seed=1)
    found = []
    for _ in range(32):
        for _ in range(loader.steps_per_epoch):
            loader.next()
            loader.state()
        found.append(anonymous_mb())
    # Allocators wander by 20 MB; 600 batches of 2.4 MB pass between the two, so a leak of 3 % of them would show.
    assert max(found[-3:]) - max(found[:3]) < 40, found
