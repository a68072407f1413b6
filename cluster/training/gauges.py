"""A run's metrics on Ray's Prometheus endpoint, read from the metrics.jsonl that the trainer writes anyway."""

import json
from pathlib import Path

TAIL_BYTES = 8192


def latest_step(path: Path) -> dict[str, float] | None:
    """The last whole step record of a metrics.jsonl, or None if there is none yet."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]  # what follows the last newline may be half a line
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # the first line of the tail may be cut
            continue
        if record.get("kind") == "step":
            return dict(record)
    return None


class RunGauges:
    """Gauges of one run, all named twotower_...: images_per_s, step_time_s, data_wait_share, queue_ready_share, step.

    Args:
        run: the trainer's run folder.
    """

    def __init__(self, run: Path) -> None:
        from ray.util.metrics import Gauge

        self._path = run / "metrics.jsonl"
        tags = {"run": run.name, "stage": "train"}
        names = {
            "images_per_s": "training rate, images/s",
            "step_time_s": "wall time between two updates, s",
            "data_wait_share": "share of a step spent waiting for pictures; near 1: the queue is empty",
            "queue_ready_share": "share of batches that were ready when asked for, 0..1",
            "step": "finished updates",
        }
        self._gauges = {}
        for name, text in names.items():
            gauge = Gauge(f"twotower_{name}", description=text, tag_keys=("run", "stage"))
            gauge.set_default_tags(tags)
            self._gauges[name] = gauge
        self._last: tuple[float, float] | None = None

    def update(self) -> None:
        """Publish the last step."""
        import time

        record = latest_step(self._path)
        if record is None:
            return
        for name in ("images_per_s", "data_wait_share", "queue_ready_share", "step"):
            if name in record:
                self._gauges[name].set(record[name])
        now = time.monotonic()
        if self._last and record["step"] > self._last[0]:
            self._gauges["step_time_s"].set((now - self._last[1]) / (record["step"] - self._last[0]))
        if self._last is None or record["step"] > self._last[0]:
            self._last = (record["step"], now)
