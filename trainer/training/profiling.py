"""``train --profile N``: what N steps spend their time on, as a trace to look at and a table to read."""

from pathlib import Path

import torch
from torch import profiler

from twotower.verbosity import say_written

SKIPPED, WARM_UP = 3, 2  # steps: the first ones pay for allocations and kernel choices
ROWS = 40
FOLDER = "profile"


class StepProfiler:
    """Records some steps of this process.

    Writes, into ``RUN/profile/``: ``trace-NAME.json`` (open it at ui.perfetto.dev or chrome://tracing) and
    ``operators-NAME.txt`` (operators by their own time); on a GPU also ``memory-NAME.pickle``, the history of its
    allocations (open it at pytorch.org/memory_viz).

    Args:
        run: run folder.
        name: of this process: its towers, ``a``, ``b`` or ``ab``; with several pairs their number, too.
        steps: steps to record, after ``SKIPPED`` + ``WARM_UP`` others; 0 records nothing.
        device: ``cpu`` or ``cuda:N``.
    """

    def __init__(self, run: Path, name: str, *, steps: int, device: str = "cpu") -> None:
        self._folder, self._name = run / FOLDER, name
        self._on_gpu = device.startswith("cuda")
        self._profiler: profiler.profile | None = None
        if not steps:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        activities = [profiler.ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        schedule = profiler.schedule(wait=SKIPPED, warmup=WARM_UP, active=steps, repeat=1)
        self._profiler = profiler.profile(
            activities=activities, schedule=schedule, on_trace_ready=self._write, profile_memory=True
        )
        self._profiler.start()

    def step(self) -> None:
        """A step has ended."""
        if self._profiler:
            self._profiler.step()

    def close(self) -> None:
        """Ends a recording that the run was too short for: what there is of it is written."""
        if self._profiler:
            self._profiler.stop()

    def _write(self, recorded: profiler.profile) -> None:
        recorded.export_chrome_trace(str(self._folder / f"trace-{self._name}.json"))
        by = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=by, row_limit=ROWS)
        (self._folder / f"operators-{self._name}.txt").write_text(table + "\n", encoding="utf-8")
        say_written(f"{self._folder}/trace-{self._name}.json and operators-{self._name}.txt")
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-{self._name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
