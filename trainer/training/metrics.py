"""What a run writes about itself: environment.json, metrics.jsonl, epochs.csv, loggers, and progress for people."""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.config import Config
from trainer.training.history import Past, read_past
from trainer.training.loggers import Loggers
from trainer.training.rows import NAME
from twotower import verbosity, version
from twotower.addresses import masked_words
from twotower.words import one_line

PLAIN_LINE_EVERY_S = 5.0
WRITE_EVERY_S = 1.0  # of the steps' rows; a run that is killed repeats these steps anyway
MOST_WAITING = 32  # rows: 2 ms of work, which a GPU's step hides; a second of its steps at once would make it wait


def describe_environment(argv: list[str]) -> dict[str, Any]:
    """Commit, versions and machine, so that a figure can be traced."""
    import torch  # takes a second, which what only refuses an option need not wait for

    from trainer.model import kernels

    return {
        "command": " ".join(masked_words(argv)),
        "commit": version.find_commit() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "kernels": kernels.describe("cuda" if torch.cuda.is_available() else "cpu"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


class MetricsLog:
    """Appends to ``metrics.jsonl``, ``epochs.csv`` and the loggers; a resumed run drops the lines it will repeat.

    Args:
        run: run folder.
        config: its recipe.
        from_step: finished steps at the start; later lines are dropped.
        past: what the run was up to then, if that was read already.
    """

    def __init__(self, run: Path, config: Config, from_step: int, past: Past | None = None) -> None:
        past = past or read_past(run, from_step)
        path = run / NAME
        if path.exists():
            _cut(path, past.kept_bytes)
        self._file = path.open("a", encoding="utf-8")
        self._epochs = past.epochs
        self._loggers = Loggers(run, config, from_step + 1)
        self._rows: list[tuple[float, dict[str, Any]]] = []

    def write(self, row: dict[str, Any]) -> None:
        """Takes one row; its ``kind`` is ``step``, ``evaluation`` or ``ledger``. Readers see it a second later, or two.

        Many rows one after the other cost a fifth of as many rows between steps that have emptied the caches.
        """
        now = time.time()
        self._rows.append((now, row))
        if now - self._rows[0][0] >= WRITE_EVERY_S or len(self._rows) == MOST_WAITING:
            self._write_out()

    def _write_out(self) -> None:
        """Makes all rows so far visible to readers."""
        for at_s, row in self._rows:
            self._file.write(json.dumps(row) + "\n")
            self._epochs.add(row)
            self._loggers.add(row, at_s)
        self._rows.clear()
        self._file.flush()
        self._loggers.flush()

    def flush(self) -> None:
        """Makes what was written visible to readers."""
        self._write_out()
        self._epochs.write()

    def close(self, exit_reason: str) -> None:
        """Flushes and closes; the loggers are told how the run ended."""
        self._write_out()
        self._file.close()
        self._epochs.write()
        self._loggers.close(exit_reason)


def _cut(path: Path, size_bytes: int) -> None:
    """Shortens the file in place; what is kept ends in a whole line."""
    with path.open("r+b") as file:
        file.truncate(size_bytes)
        if size_bytes and file.seek(size_bytes - 1) >= 0 and file.read(1) != b"\n":
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


class TrainingProgress:
    """A bar on a terminal, one plain line every few seconds elsewhere, nothing where ``quiet``."""

    def __init__(self, total_steps: int, *, done: int, quiet: bool) -> None:
        console = Console(file=sys.stdout)
        quiet = quiet or verbosity.is_quiet()
        self._quiet, self._total, self._last = quiet, total_steps, time.monotonic()
        self._done_before, self._begin = done, self._last
        self._bar: Progress | None = None
        if not quiet and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("training", total=total_steps, completed=done)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, row: dict[str, Any]) -> None:
        """Shows a step row of metrics.jsonl."""
        if self._quiet or (not self._bar and time.monotonic() - self._last < PLAIN_LINE_EVERY_S):
            return
        text = f"epoch {row['epoch'] + 1}  loss {row['loss']:.4f}  {row['images_per_s']:.0f} images/s"
        if self._bar:
            self._bar.update(self._task, completed=row["step"], description=text)
        else:
            self._last = time.monotonic()
            print(f"step {row['step']}/{self._total}  {text}  {self._left(row['step'])} left", flush=True)

    def _left(self, step: int) -> str:
        """Time left at the pace so far, evaluations and checkpoints included."""
        left_s = (time.monotonic() - self._begin) / (step - self._done_before) * (self._total - step)
        return (
            f"{left_s:.0f} s"
            if left_s < 120
            else f"{left_s / 60:.0f} min"
            if left_s < 7200
            else f"{left_s / 3600:.1f} h"
        )

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        if self._bar:
            self._bar.console.print(one_line(text), highlight=False, markup=False, emoji=False)
        elif not self._quiet:
            print(one_line(text), flush=True)
