"""Thousands of inputs that nobody meant: no traceback, crash or loop, and nothing written beside their own folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import fuzzing
from tests.helpers.fuzzing import Target, fuzz, make_input

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inputs_that_nobody_meant() -> None:
    """In a process of its own: its forks must not inherit the threads of other tests."""
    words = [sys.executable, "-m", "tests.fuzz", "--seed", "1", "--count", "5000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def misbehave(folder: Path, kind: int) -> None:
    """What the harness is for: each kind of input in another way."""
    if kind == 1:
        raise ValueError("allowed")
    if kind == 2:
        raise KeyError("a bug")
    if kind == 3:
        os.abort()
    if kind == 4:
        bytearray(64 * 2**30)


def test_the_harness_sees_bugs_crashes_and_memory(tmp_path: Path) -> None:
    target = Target("harness", lambda rng, outside: rng.randrange(5), misbehave, (ValueError,))
    found = {finding.number: finding.what for finding in fuzz(target, tmp_path, seed=0, count=20)}
    kinds = [make_input(target, 0, number, tmp_path) for number in range(20)]
    said = {2: "KeyError: 'a bug'", 3: "died of SIGABRT", 4: "MemoryError"}
    assert {number for number, kind in enumerate(kinds) if kind in said} == found.keys() and set(kinds) == set(range(5))
    assert all(found[number].startswith(said[kinds[number]]) for number in found)


def test_the_harness_sees_what_is_written_outside_and_what_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path, name: str) -> None:
        (folder.parent / name).write_text("")

    for name in ("new", "outside/new", "outside/precious"):
        target = Target("writer", lambda rng, outside, name=name: name, write, ())  # type: ignore[misc]
        (finding,) = fuzz(target, tmp_path / name.replace("/", "-"), seed=0, count=1)
        assert "written outside" in finding.what
    monkeypatch.setattr(fuzzing, "LIMIT_S", 0.01)
    target = Target("loop", lambda rng, outside: 0, lambda folder, made: signal.pause(), ())
    (finding,) = fuzz(target, tmp_path / "loop", seed=0, count=1)
    assert finding.what.startswith("no end within")
