"""An elastic run saves before Ray Train gives it another number of pairs, so that not one step is lost.

While all workers are well, Ray Train V2 looks every `elastic_resize_monitor_interval_s` whether the cluster now holds
another number of them (`make_decision_for_running_worker_group` in ray/train/v2/_internal/execution/scaling_policy/
elastic.py; it learns of a new node within 20 s more). It then ends all workers without a word and starts anew.
"""

from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState

from cluster.training.pair import ask_to_save

SAVE_S = 120.0  # to finish a step and save; after that the run goes on from its checkpoint before


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
