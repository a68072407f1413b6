"""How an operation's cost grows: what is measured for ``scale.py``, and how.

An :class:`Operation` measures itself at one size. Every measurement is a process of its own, so that neither caches nor
memory that was freed stand in the next one; ``--tree`` makes that process import the packages of another checkout, so
the same rows tell what was before a change.
"""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

LIMIT_S = 240.0  # of one measurement


@dataclasses.dataclass(frozen=True)
class Operation:
    """One row of the table.

    Attributes:
        name: what is done.
        grows: what its size counts, such as ``replicas``.
        unit: of the figure, such as ``ms a step``.
        sizes: three or more, ascending.
        measure: the figure at a size; gets an empty folder, and prepares what it needs in it.
        most: the greatest exponent that is meant; 1 for what is linear in its own work, 0 for what must not grow.
        before: what was measured before, in words; empty where ``--tree`` tells.
    """

    name: str
    grows: str
    unit: str
    sizes: Sequence[int]
    measure: Callable[[Path, int], float]
    most: float = 1.0
    before: str = ""


def fit_exponent(sizes: Sequence[int], figures: Sequence[float]) -> float:
    """The exponent k of ``figure ~ size ** k``: least squares over the logarithms; nan where a figure is not positive.

    A constant part beside what grows makes it smaller: the sizes are chosen so that what grows is most of it.
    """
    if len(figures) < 2 or min(figures) <= 0:
        return math.nan
    xs, ys = [math.log(size) for size in sizes], [math.log(figure) for figure in figures]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def fastest_ms(work: Callable[[], Any], *, rounds: int = 5, warm_up: int = 1) -> float:
    """The least time of some rounds, ms: what the work takes where nothing disturbs it."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return 1000 * min(times)


def peak_mib(work: Callable[[], Any]) -> float:
    """Memory that the work takes at most beyond what this process holds before it, MiB; of this process alone."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = _status_kib("VmRSS")
    work()
    return max(0.01, (_status_kib("VmHWM") - before) / 1024)


def _status_kib(field: str) -> int:
    """A field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise LookupError(field)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Sends what is printed to stderr: stdout is for the figure alone."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def measure_apart(script: Path, operation: Operation, size: int, work: Path, tree: Path) -> float | str:
    """One measurement in a process of its own; a sentence where there is none.

    Args:
        script: has ``--one NAME --size N --work DIR --tree DIR``, and prints a JSON number.
        operation: what to measure.
        size: at which size.
        work: an empty folder.
        tree: the checkout whose packages are measured.
    """
    words = [sys.executable, str(script), "--one", operation.name, "--size", str(size)]
    words += ["--work", str(work), "--tree", str(tree)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"more than {LIMIT_S:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        return f"failed: {lines[-1][:200]}"
    return float(json.loads(done.stdout))


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table: an operation a line, its figures beside its sizes, and the exponent."""
    lines = ["| operation | grows with | at | figures | exponent | before |", "|---|---|---|---|---|---|"]
    for row in rows:
        sizes = ", ".join(f"{size:,}" for size in row["sizes"])
        figures = ", ".join(figure if isinstance(figure, str) else f"{figure:,.3g}" for figure in row["figures"])
        exponent = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
        over = " (more than meant)" if row["over"] else ""
        cells = (row["name"], row["grows"], sizes, f"{figures} {row['unit']}", exponent + over, row["before"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
