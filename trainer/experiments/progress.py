"""Progress over a whole experiment: a plain line every few seconds, and one for every run that ends."""

import json
import time
from collections.abc import Sequence
from typing import Any

from trainer.experiments.folder import RunTask
from trainer.experiments.rows import OK
from twotower import verbosity

LINE_EVERY_S = 10.0
TAIL_BYTES = 4096


class ExperimentProgress:
    """Counts runs that ended; tells of those in work by what they write.

    Args:
        tasks: all runs of the experiment.
        missing: those that are to be made now.
    """

    def __init__(self, tasks: Sequence[RunTask], missing: Sequence[RunTask]) -> None:
        self._total, self._done = len(tasks), len(tasks) - len(missing)
        self._to_do, self._ended = len(missing), 0
        self._begin = self._last = time.monotonic()
        if self._done:
            verbosity.remark(f"runs {self._done}/{self._total} are done already", stdout=True)

    def tick(self, running: Sequence[RunTask]) -> None:
        """Tells, when it is time to, which runs are in work and how far they are."""
        now = time.monotonic()
        if now - self._last < LINE_EVERY_S or verbosity.is_quiet():
            return
        self._last = now
        steps = [(task, step) for task in running if (step := newest_step(task))]
        shown = ", ".join(f"{task.variant} seed {task.seed} at step {step:,}" for task, step in steps[:3])
        print(f"runs {self._done}/{self._total}  {shown or 'starting'}{self._left()}", flush=True)

    def ended(self, task: RunTask, row: dict[str, Any]) -> None:
        """Tells how a run ended."""
        self._done += 1
        self._ended += 1
        self._last = time.monotonic()
        said = f"top-1 error {100 * row['top1_error']:.2f} %" if row["status"] == OK else f"failed: {row['reason']}"
        verbosity.remark(
            f"runs {self._done}/{self._total}  {task.variant} seed {task.seed}: {said}{self._left()}", stdout=True
        )

    def _left(self) -> str:
        """Time left at the pace so far, once a run has ended."""
        if not self._ended or self._ended == self._to_do:
            return ""
        left_s = (time.monotonic() - self._begin) / self._ended * (self._to_do - self._ended)
        return f"  {left_s / 60:.0f} min left" if left_s < 7200 else f"  {left_s / 3600:.1f} h left"


def newest_step(task: RunTask) -> int:
    """The newest step that a run has written; 0 for none."""
    try:
        with (task.run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
