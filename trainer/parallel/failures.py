"""Where processes tell each other why a run fails: who is lost, or what ended one of them."""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from trainer.errors import LostError, PeerError
from twotower.words import one_line

ENDED = " ended: "
MOST_FAILURE = 2000  # characters of a failure's text
REPORT_WAIT_S = 3.0  # how long one who lost somebody listens whether another knows better who it was


class FailureStore:
    """Where the first process that fails says why, so that those who then lose it can tell the cause.

    Args:
        store: the store that all processes found each other in; it may be gone by then.

    Attributes:
        on_loss: called with the first loss that :meth:`lost` finds, once; set by :mod:`trainer.parallel.watch`.
        known: that loss, where somebody is called with it; from then on every message of this process ends with it.
    """

    def __init__(self, store: Any) -> None:
        self._store = dist.PrefixStore("twotower", store)
        self._lock = threading.Lock()
        self.known: PeerError | None = None
        self.on_loss: Callable[[PeerError], None] | None = None

    def check(self) -> None:
        """Raises what is known: what an aborted message has brought is not to be used.

        Raises:
            PeerError: a process is lost.
        """
        if self.known is not None:
            raise self.known

    def report(self, text: str) -> str:
        """Reports a failure; returns the first that anybody reported."""
        text = one_line(text)[:MOST_FAILURE]
        try:
            return _as_text(self._store.compare_set("failure", "", text))
        except RuntimeError:
            return text

    def lost(self, text: str, *, vague: bool = False) -> PeerError:
        """What to raise where another process is gone.

        Args:
            text: how that looks from here; it is reported, unless somebody was first.
            vague: it does not say which process; better wait whether somebody knows.
        """
        first = self._wait() if vague else None
        if first is None:
            first = self.report(text)
        return self.keep((PeerError if ENDED in first else LostError)(first))

    def keep(self, error: PeerError) -> PeerError:
        """The first loss that this process knows of, from whichever thread; over gloo each message has its own."""
        if self.on_loss is None:
            return error
        with self._lock:
            is_first = self.known is None
            self.known = self.known or error
        if is_first:
            self.on_loss(error)
        return self.known

    def ended(self, rank: int, error: Exception) -> None:
        """Reports that this process ends because of an error of its own."""
        self.report(f"rank {rank}{ENDED}{type(error).__name__}: {error}")

    def _wait(self) -> str | None:
        """The first failure reported; None after ``REPORT_WAIT_S`` without one."""
        deadline = time.monotonic() + REPORT_WAIT_S
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                if self._store.check(["failure"]):
                    return _as_text(self._store.get("failure"))
                time.sleep(0.05)
        return None


def _as_text(found: bytes) -> str:
    """A failure as a message may show it, whoever has written it into the store."""
    return one_line(found[: 4 * MOST_FAILURE].decode(errors="backslashreplace"))[:MOST_FAILURE]
