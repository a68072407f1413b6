"""The clock of ``gpu.py``: what is measured, what is left out, and why."""

import importlib.util
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

# Seconds that a case takes on an H100 with 16 cores, about: what would end too late does not begin.
TAKES_S = {"data": 30, "step": 15, "compile": 45, "loop": 30, "loader": 25, "end_to_end": 20, "kernels": 15, "two": 30}
NEEDS = {"loader": "nvidia.dali", "end_to_end": "nvidia.dali", "data": "simplejpeg"}


class Budget:
    """What has been measured, and the clock that stops adding to it.

    Args:
        limit_s: all of it; a case that would not be ready by then does not begin.
        parts: those that are asked for.
    """

    def __init__(self, limit_s: float, parts: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._parts, self._clock, self._begin = limit_s, parts, clock, clock()
        self.results: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def elapsed_s(self) -> float:
        """Since the start."""
        return self._clock() - self._begin

    def why_not(self, part: str) -> str:
        """Why a part is not measured now; empty where it is."""
        takes_s = TAKES_S.get(part, 0)
        if self.elapsed_s() + takes_s >= self._limit_s:
            return f"it takes about {takes_s} s, and {self.elapsed_s():.0f} of {self._limit_s:g} s are over"
        if part in NEEDS and not has(NEEDS[part]):
            return f"{NEEDS[part]} is not installed"
        if part in ("loader", "end_to_end") and "data" not in self.results:
            return "there are no shards"
        return ""

    def run(self, name: str, measure: Callable[[], Any]) -> None:
        """Measures ``PART`` or ``PART: CASE``, if it can be; what fails is told, and the rest goes on."""
        part = name.partition(":")[0]
        if part not in self._parts:
            return
        if why := self.why_not(part):
            self.leave_out(name, why)
            return
        begin = self.elapsed_s()
        print(f"[{begin:5.0f} s] {name}", flush=True)
        try:
            self.results[name] = measure()
        except (Exception, SystemExit) as error:  # one part must not cost the others
            traceback.print_exc()
            self.leave_out(name, f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        self.seconds[name] = self.elapsed_s() - begin

    def leave_out(self, name: str, why: str) -> None:
        """Notes and tells what is not measured."""
        self.left_out[name] = why
        print(f"left out: {name}: {why}", flush=True)

    @property
    def failed(self) -> bool:
        """Whether something went wrong."""
        return any(why.startswith("failed") for why in self.left_out.values())


def has(module: str) -> bool:
    """Whether a package is there; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
