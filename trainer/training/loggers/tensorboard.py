"""TensorBoard: ``train.loggers = ["tensorboard"]``, the default. Event files in ``RUN/tensorboard``, row by row.

torch's ``SummaryWriter`` takes a queue, a second thread and an event for every single value, 0.4 ms of processor time a
step; here all values of a row are one event, written where they arise.
"""

import os
import platform
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.config import Config
from trainer.training.loggers import scalars_of

IN_BACKGROUND = False  # it writes a local file, which costs less than a queue


def open_logger(run: Path, config: Config, from_step: int) -> "TensorBoardWriter":
    """Begins a new event file of the run."""
    return TensorBoardWriter(run / "tensorboard", from_step)


class TensorBoardWriter:
    """Writes ``events.out.tfevents.*`` in a folder.

    Args:
        folder: is made if it is not there.
        from_step: the first step that will be written; TensorBoard drops what older files in the folder have of it and
            of later ones.
    """

    def __init__(self, folder: Path, from_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        self._file = path.open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=from_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, row: dict[str, Any], at_s: float | None = None) -> None:
        """Writes every float of a row of metrics.jsonl as the scalar ``KIND/NAME``, of a tower ``KIND/NAME_TOWER``.

        Args:
            row: of one step.
            at_s: when it was, in seconds of ``time.time``; None for now.
        """
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars_of(row).items()]
        if values:
            self._write(Event(step=row["step"], summary=Summary(value=values)), at_s)

    def flush(self) -> None:
        """Makes what was written visible to readers."""
        self._file.flush()

    def close(self, exit_reason: str = "finished") -> None:
        """Flushes and closes, however the run ended."""
        self._file.close()

    def _write(self, event: Any, at_s: float | None = None) -> None:
        event.wall_time = time.time() if at_s is None else at_s
        self._records.write(event.SerializeToString())
