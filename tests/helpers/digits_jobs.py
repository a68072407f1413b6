"""The real commands on the digits, directly and as jobs, and what they leave."""

import hashlib
import subprocess
import sys
from pathlib import Path

from tests.helpers.local_cluster import ROOT

PREPARE = ("-m", "pipeline", "prepare", "--source", "digits", "--resize", "32")
SMALL = ("--set", "train.epochs=12", "--set", "train.batch_size=64", "--set", "train.checkpoint_every_steps=10")
STEPS = 12 * 22


def prepare_directly(output: Path, *options: str) -> Path:
    """The data set of a run without a cluster of ours."""
    command = [
        sys.executable,
        *PREPARE,
        "--workers",
        "2",
        "--output",
        str(output),
        *(options or ("--shard-size", "128")),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return output


def train_command(data: Path, run: Path, *options: str) -> tuple[str, ...]:
    """A run of 264 steps."""
    recipe = ("--config", "configs/digits.toml", *SMALL)
    return ("python", "-m", "trainer", "train", *recipe, "--data", str(data), "--run", str(run), *options)


def train_directly(data: Path, run: Path, *options: str) -> Path:
    """The run of two processes per pair, without Ray."""
    command = [sys.executable, *train_command(data, run)[1:], "--processes", "2", *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    return run


def final_weights(run: Path) -> dict[str, str]:
    """sha256 of the last checkpoint's weights, by file."""
    folder = run / "checkpoints" / f"step-{STEPS:08d}"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def manifest(folder: Path) -> str:
    """sha256 of a data set's manifest, which holds those of all its files."""
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
