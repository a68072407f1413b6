"""An elastic run saves before Ray Train gives it another number of pairs, so that not one step is lost.

While all workers are well, Ray Train V2 looks every `elastic_resize_monitor_interval_s` whether the cluster now holds
another number of them (`make_decision_for_running_worker_group` in ray/train/v2/_internal/execution/scaling_policy/
elastic.py; it learns of a new node within 20 s more). It then ends all workers without a word and starts anew.
"""

import time
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState

from cluster.pair import ENDED, RESIZE

SAVE_S = 120.0  # to finish a step and save; after that the run goes on from its checkpoint before
POLL_S = 0.2


class SaveBeforeResize(ControllerCallback):
    """Ray Train's controller waits here until the towers have saved.

    Args:
        folder: the job's folder, see `PairSettings`.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Called at every change of state; only the one before a resize of living workers concerns us."""
        if isinstance(current_state, ResizingState):
            ask_to_save(self._folder, SAVE_S)


def ask_to_save(folder: Path, timeout_s: float) -> bool:
    """Ask the pairs to save and end, and wait for it; whether they did in time."""
    ended, resize = folder / ENDED, folder / RESIZE
    ended.unlink(missing_ok=True)
    resize.touch()
    deadline = time.monotonic() + timeout_s
    while not ended.exists() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    resize.unlink()
    return ended.exists()
