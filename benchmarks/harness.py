"""What all benchmark scripts share: options, machine and versions, rounds in turns, medians, and the results file.

Importing this makes the repository's packages importable, from wherever a script is started.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CORES = len(os.sched_getaffinity(0))
sys.path.insert(0, str(ROOT))

T = TypeVar("T")


def make_parser(text: str | None, *, work: str = "", rounds: int = 0) -> argparse.ArgumentParser:
    """The options that every script has.

    Args:
        text: the script's docstring.
        work: what the folder ``--work`` holds; empty: the script needs none.
        rounds: default of ``--rounds``; 0: the script has none.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if work:
        parser.add_argument("--work", type=Path, required=True, metavar="DIR", help=f"folder for {work}")
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds, metavar="N", help=f"of every case ({rounds})")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    return parser


def take_turns(
    cases: Mapping[str, Callable[[], T]], rounds: int, *, warm_up: int = 0, show: Callable[[T], str] | None = None
) -> dict[str, list[T]]:
    """Runs every case once a round; every other round goes backwards, so that no case always comes after the same one.

    Args:
        cases: by name; each call is one measurement.
        rounds: that count.
        warm_up: rounds before them that do not.
        show: how a measurement is printed while they go on.
    """
    found: dict[str, list[T]] = {name: [] for name in cases}
    for number in range(-warm_up, rounds):
        for name in list(cases) if number % 2 == 0 else reversed(cases):
            row = cases[name]()
            if number >= 0:
                found[name].append(row)
                print(f"round {number + 1}: {name}: {show(row) if show else row}", flush=True)
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, range and every single measurement."""
    row = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return row | {"n": len(values), "all": list(values)}


def ratio(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """The ratios within rounds: a round is one state of the machine, and machines drift."""
    return spread([a / b for a, b in zip(values, reference, strict=True)])


def describe_machine(*packages: str) -> dict[str, Any]:
    """Where, when, with what and how this is measured; call it before, for it tells the load that was there already."""
    with Path("/proc/cpuinfo").open() as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "processor": models[0] if models else platform.processor() or "unknown",
        "cores": CORES,
        "load_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def write_results(folder: Path, machine: Mapping[str, Any], result: Mapping[str, Any], suffix: str = "") -> Path:
    """Writes ``DATE_MACHINE_NAME.json``, whole or not at all; NAME is the script's."""
    path = folder / f"{machine['date'][:10]}_cpu{machine['cores']}_{Path(sys.argv[0]).stem}{suffix}.json"
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps({**machine, **result}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    print(f"results: {path}", flush=True)
    return path


def run_in_processes(arguments: Sequence[object], *, pair: bool, environment: Mapping[str, str]) -> list[Any]:
    """Runs this script with ``arguments`` in a process of its own, or in both towers of a pair; the JSON they print."""
    from trainer.parallel.launch import tower_environment
    from twotower.meeting import meeting_place

    command = [sys.executable, sys.argv[0], *map(str, arguments)]
    with meeting_place() as meeting:
        environments = [tower_environment(rank, meeting) for rank in (0, 1)] if pair else [{**os.environ}]
        children = [
            subprocess.Popen(command, env={**own, **environment}, stdout=subprocess.PIPE, text=True)
            for own in environments
        ]
        outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        sys.exit(f"error: {' '.join(command)} failed")
    return [json.loads(output) for output in outputs]
