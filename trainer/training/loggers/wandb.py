"""Weights & Biases: ``train.loggers = ["wandb"]``, extra ``wandb``.

Its own variables hold: ``WANDB_PROJECT``, ``WANDB_ENTITY``, and ``WANDB_MODE=offline``, which keeps everything in
``RUN/loggers/wandb`` until ``wandb sync`` sends it. Sent are the recipe, the rows of metrics.jsonl, and what wandb
itself says of the machine; neither code nor the terminal's text.
"""

import os
import secrets
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.errors import TrainerError
from trainer.training.loggers import FOLDER, flat_recipe, note, recall, scalars_of

IN_BACKGROUND = True


def open_logger(run: Path, config: Config, from_step: int) -> "WandbLogger":
    """Begins a run there, or goes on with this run's.

    Raises:
        TrainerError: nobody is logged in: wandb would ask on the terminal.
        Exception: wandb's own.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported
    import wandb

    noted = recall(run, "wandb")
    offline = os.environ.get("WANDB_MODE", "online") != "online"
    if not offline and not wandb.login(prompt=False):
        raise TrainerError("nobody is logged in: run wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline")
    settings = wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True)
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "twotower"),
        name=run.resolve().name,
        id=noted.get("id") or secrets.token_hex(8),
        resume="allow",
        dir=str(folder),
        config=flat_recipe(config),
        settings=settings,
    )
    note(run, "wandb", {"id": opened.id, "project": opened.project})
    return WandbLogger(opened)


class WandbLogger:
    """Adds rows to an open run of wandb, which sends them from a process of its own.

    A resumed run repeats the steps after its checkpoint; wandb drops what it has of them, and they are the same.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def add(self, row: dict[str, Any], at_s: float) -> None:
        """Logs the row's numbers at its step."""
        values = scalars_of(row)
        if values:  # a row without numbers is of no curve
            self._run.log(values | {"time": at_s}, step=row["step"])

    def flush(self) -> None:
        """Does nothing: wandb sends by itself."""

    def close(self, exit_reason: str) -> None:
        """Waits until everything is sent."""
        self._run.finish(exit_code=1 if exit_reason == "failed" else 0)
