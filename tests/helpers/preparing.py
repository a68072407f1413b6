"""Real ``prepare`` processes for tests."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.__main__ import main
from pipeline.preparation import faults, prepare
from pipeline.preparation.plan import Request, ShardPlan
from pipeline.preparation.shard import ShardJob, ShardTask, build_shard

ROOT = Path(__file__).resolve().parents[2]
KEEP = ("--resize", "none", "--encoding", "png")  # no torch in the workers, so they start quickly


def command(*arguments: object) -> list[str]:
    """The command line of a pipeline command."""
    return [sys.executable, "-m", "pipeline", *map(str, arguments)]


def environment(fault: str = "") -> dict[str, str]:
    """The environment for it; ``fault`` as pipeline.preparation.faults describes."""
    kept = {name: value for name, value in os.environ.items() if name not in (faults.VARIABLE, "RAY_ADDRESS")}
    return kept | ({faults.VARIABLE: fault} if fault else {})


def run(*arguments: object, fault: str = "", expect: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs a pipeline command to its end and checks its exit code."""
    done = subprocess.run(
        command(*arguments),
        env=environment(fault) | ({} if cwd == ROOT else {"PYTHONPATH": str(ROOT)}),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == expect, f"exit {done.returncode} instead of {expect}\n{done.stdout}\n{done.stderr}"
    return done


def start(*arguments: object, fault: str = "", extra: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Starts a pipeline command in its own process group."""
    return subprocess.Popen(
        command(*arguments),
        env=environment(fault) | dict(extra or {}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=listen_to_signals,
    )


def listen_to_signals() -> None:
    """A test run in the background of a shell, or under nohup, ignores some, and so would its children."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file of a data set, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make_images(folder: Path, count: int = 60, side: int = 24) -> Path:
    """Class folders of small PNGs, each an image of its own."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("ant", "bee", "cat")[number % 3] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3)).astype(np.uint8)).save(path)
    return folder


def prepare_here(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs ``prepare`` in this process, its shards one after another without Ray; returns the exit code."""
    monkeypatch.setattr(prepare, "_build", _build_here)
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["pipeline", "prepare", *map(str, arguments)])
        return main()


def _build_here(request: Request, missing: list[ShardPlan], recorded: object = None) -> tuple[float, float]:
    job = ShardJob(
        output=request.options.output.absolute(),
        source=request.source,
        image=request.image,
        class_names=tuple(record.name for record in request.listing.classes),
        fail_on_error=request.options.on_error == "fail",
    )
    for shard in missing:
        items = request.listing.splits[shard.split].items(shard.rows)
        build_shard(job, ShardTask(shard.name, shard.split, shard.start, items))
    return 0.0, 0.0
