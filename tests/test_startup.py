"""What only looks at its options answers at once: none of it imports torch, DALI, Ray or matplotlib."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "nvidia.dali", "ray", "matplotlib", "scipy", "sklearn", "simplejpeg", "tensorboard")
PROGRAM = """
import runpy, sys
package, *arguments = sys.argv[1:]
sys.argv = [package, *arguments]
status = 0
try:
    runpy.run_module(package, run_name="__main__")
except SystemExit as end:
    status = end.code
print("STATUS", status, *(name for name in {heavy!r} if name in sys.modules))
"""
NOWHERE = "/nowhere"
RECIPE = "configs/digits.toml"
COMMANDS = [
    # (command line, exit status, what it says)
    ("trainer --help", 0, "commands"),
    ("trainer train --help", 0, "--data"),
    ("trainer bench --help", 0, "--synthetic"),
    ("trainer trian", 2, "unknown command 'trian': did you mean train?"),
    ("trainer train --epochs 3", 2, "--set train.epochs=3"),
    ("trainer describe --config configs/paper.toml", 0, "60,965,224"),
    (f"trainer describe --config {RECIPE} --set model.clases=3", 2, "did you mean model.classes?"),
    (f"trainer train --config {RECIPE} --set train.epoch=3 --data {NOWHERE} --run {NOWHERE}", 2, "train.epochs"),
    (f"trainer train --config {RECIPE} --data {NOWHERE} --run {NOWHERE}", 2, "no data set folder"),
    (f"trainer train --config {RECIPE} --replicas 2 --data {NOWHERE} --run {NOWHERE}", 2, "add --processes 2"),
    (f"trainer train --config configs/half.toml --processes 2 --data {NOWHERE} --run {NOWHERE}", 2, "one process"),
    (f"trainer evaluate --run {NOWHERE} --data {NOWHERE}", 2, "no run at"),
    (f"trainer predict a.jpg --run {NOWHERE}", 2, "no run at"),
    (f"trainer export --run {NOWHERE} --output x.onnx", 2, "no run at"),
    ("trainer bench", 2, "--data"),
    ("pipeline --help", 0, "prepare"),
    ("pipeline prepare --help", 0, "--source"),
    (f"pipeline prepare --source digits --quality 101 --output {NOWHERE}", 2, "1 to 100"),
    ("pipeline prepare --source imagnet --output x", 2, "imagnet"),
    (f"pipeline verify {NOWHERE}", 2, "no data set"),
    ("pipeline reindex --help", 0, "reindex"),
    ("pipeline prepare --sorce digits", 2, "--source"),
    ("pipeline prepare --source folder --output x", 2, "--input"),
    ("pipeline prepare --source cifar10 --input s3://bucket --output x", 2, "cifar10"),
]  # of the cluster: tests/cluster/test_commands.py


@pytest.mark.parametrize(("command", "status", "said"), COMMANDS, ids=[command for command, _, _ in COMMANDS])
def test_answers_without_heavy_imports(command: str, status: int, said: str) -> None:
    """Exit status, the line, and what has been imported by then."""
    words = [sys.executable, "-c", PROGRAM.format(heavy=HEAVY), *command.split()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert said in done.stdout + done.stderr, done.stderr
    assert done.stdout.splitlines()[-1] == f"STATUS {status}", done.stderr
