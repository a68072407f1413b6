"""Runs the project's commands as a user does: real processes, exit codes, output."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "digits.toml"
DOUBLE = "tests.helpers.double"  # the trainer in float64
SMALL = ("train.epochs=1", "train.batch_size=128", "train.checkpoint_every_steps=4", "train.keep_checkpoints=9")


def command(*words: object) -> list[str]:
    """``python -m words...``"""
    return [sys.executable, "-m", *map(str, words)]


def environment() -> dict[str, str]:
    """One thread a process, or as many as the environment says (``make test-isa``)."""
    return {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT)}


def run(*words: object, code: int = 0, timeout_s: float = 400) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end and checks its exit code."""
    done = subprocess.run(
        command(*words), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
    return done


def train_words(
    data: Path, folder: Path, *more: object, overrides: tuple[str, ...] = (), program: str = "trainer"
) -> list[object]:
    """``trainer train`` on a small piece of work: 11 steps, checkpoints at 4, 8 and 11; or another ``program``'s."""
    words: list[object] = [program, "train", "--config", CONFIG, "--data", data, "--run", folder]
    for override in (*SMALL, *overrides):
        words += ["--set", override]
    return words + list(more)


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """``python -m trainer words...`` in this process; returns the exit code."""
    from trainer.__main__ import main

    monkeypatch.setattr(sys, "argv", ["trainer", *map(str, words)])
    try:
        return main()
    except SystemExit as end:
        return int(end.code or 0)
