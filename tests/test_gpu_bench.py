"""``benchmarks/gpu.py`` where there is no GPU: its clock, its refusal, and every part of it once at tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def test_what_begins_too_late_or_lacks_a_package_is_left_out_by_name(bench: Any, capsys: Any) -> None:
    import gpu_budget

    now = [0.0]
    parts = [part for part in bench.PARTS if part != "compile"]
    budget = gpu_budget.Budget(10.0 + gpu_budget.TAKES_S["two"], parts, clock=lambda: now[0])

    def measure() -> int:
        now[0] += 12.0
        return 1

    def fail() -> int:
        raise ValueError("too small\nby far")

    budget.run("loader: jpeg", measure)  # there are no shards
    budget.run("two: nccl", fail)
    budget.run("step: 128", measure)
    budget.run("compile: 128", measure)  # not asked for
    budget.run("two: gloo", fail)  # would end too late
    budget.run("step: 256", measure)
    budget.run("ceilings", measure)
    assert budget.results == {"step: 128": 1, "step: 256": 1, "ceilings": 1} and budget.seconds["step: 256"] == 12.0
    assert budget.left_out == {
        "loader: jpeg": "there are no shards",
        "two: nccl": "failed: ValueError: too small",
        "two: gloo": "it takes about 30 s, and 12 of 40 s are over",
    }
    assert budget.failed and "left out: two: gloo: it takes about" in capsys.readouterr().out
    assert not gpu_budget.has("no_such_package") and not gpu_budget.has("no.such") and gpu_budget.has("torch")


def test_without_a_gpu_it_says_so(bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert bench.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --device cuda:0: torch sees no GPU here; --device cpu --smoke")
    for words, named in ((["--device", "cpu"], "--smoke"), (["--parts", "step,nets"], "nets: expected some of data")):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
        with pytest.raises(SystemExit, match="2"):
            bench.main()
        assert named in capsys.readouterr().err


@pytest.mark.slow
def test_every_part_runs(bench: Any, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--smoke", "--seconds", "0.1", "--rounds", "1"]
    found = subprocess.run([*command, "--results", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["left_out"] == {"two: nccl": "NCCL needs a GPU"}
    assert {name.partition(":")[0] for name in result["parts"]} == set(bench.PARTS)
    table = path.with_suffix(".md").read_text()
    for text in ("| step, batch |", "torch.compile", "bare DALI", "end to end", "gloo", "registers", "Ceilings"):
        assert text in table
