"""Notices a peer that is gone while the GPU waits for it, and sees to it that this process ends.

Over gloo the host waits for every message, and a peer that is gone is an exception there. Over NCCL the GPU waits, in a
kernel that spins for ever, and the host hangs in the next thing that it wants of the GPU. PyTorch's own watchdog would
end the process after its timeout by SIGABRT, with a page of C++ and no word about the run. So a thread here tells the
peers twice a second, over gloo, that this process lives and how many messages it has started:

- a peer that died closes its connection: at once;
- one that is stopped tells nothing, and one whose host hangs starts no more messages: after ``train.peer_timeout_s``;
- what NCCL itself reports (a broken network) comes from its group.

Then NCCL's communicators are aborted, which ends the spinning kernels, so the host comes out of its wait, meets the
:class:`trainer.errors.PeerError` at its next message and ends as it does over gloo. An abort may hang, too: whoever has
not come out after ``END_S`` is ended from here, with the same line and status.
"""

import dataclasses
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from trainer import stopping
from trainer.errors import LostError, PeerError
from twotower.terminal import print_error

WORKING, DONE, FAILED = 0, 1, 2  # what a beat says of its sender
BEAT_S = 0.5
REPORT_S = 5.0  # for the store, which may be gone; longer than mesh.REPORT_WAIT_S
ABORT_S = 3.0
END_S = 5.0  # for the host to end by itself; all together less than launch.GRACE_S
FAILED_GRACE_S = 3.0  # what made a peer fail usually ends this process, too, and it knows better why
CLOSE_S = 10.0
TAG = 77  # nothing else is sent in the group of beats


class Failures(Protocol):
    """:class:`trainer.parallel.mesh.FailureStore`."""

    def lost(self, text: str, *, vague: bool = False) -> PeerError:
        """What to raise where another process is gone; only the first loss counts."""

    def keep(self, error: PeerError) -> PeerError:
        """The same for what cannot be reported."""

    on_loss: Callable[[PeerError], None] | None


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the watch asks of its process.

    Attributes:
        started: messages that this process has started so far: with its pair's other tower, with its replicas.
        where: the message that it is at, for errors.
        fault: what NCCL reports; empty while all is well.
        abort: ends the communicators, and with them what the GPU waits for.
    """

    started: Callable[[], tuple[int, int]]
    where: Callable[[], str]
    fault: Callable[[], str] = lambda: ""
    abort: Callable[[], None] = lambda: None


@dataclasses.dataclass
class Lag:
    """How long a peer has been behind, and has not moved, while this process waits for what it has not started."""

    seen: int = -1
    since: float = 0.0

    def seconds(self, mine: int, theirs: int, now: float) -> float:
        """Seconds behind; ``mine``, ``theirs``: messages started."""
        if theirs >= mine or theirs != self.seen:
            self.seen, self.since = theirs, now
        return now - self.since


class PeerWatch:
    """The thread of one process; :meth:`start` it once everything is connected.

    Args:
        group: a gloo group of these processes, for nothing else.
        peers: rank to (what messages call it, which of the two counts is shared with it).
        failures: where a loss is reported and kept.
        facts: of this process.
        timeout: after which a silent peer is lost; may be changed.
    """

    def __init__(
        self,
        group: Any,
        peers: Mapping[int, tuple[str, int]],
        failures: Failures,
        facts: Facts,
        *,
        timeout: datetime.timedelta,
    ) -> None:
        self._group, self._peers, self._failures, self._facts = group, dict(peers), failures, facts
        self.timeout = timeout
        self._state, self._ending = WORKING, threading.Event()
        self._lags = {rank: Lag() for rank in peers}
        self._thread = threading.Thread(target=self._run, name="peer watch", daemon=True)
        failures.on_loss = self._on_loss

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self, *, failed: bool = False) -> None:
        """Tells the peers that this process ends, well or not, and leaves the watch; never waits long."""
        self._state = FAILED if failed else DONE
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(ABORT_S if failed else CLOSE_S)

    def _run(self) -> None:
        while self._peers:
            self._ending.wait(BEAT_S)
            state = self._state
            lost = self._exchange(state) or self._own_fault()
            if state != WORKING:
                return
            if lost:
                self._lose(*lost)
                return

    def _exchange(self, state: int) -> tuple[int, str] | None:
        """One beat to and from every peer; the rank of the first that is lost, and how that looks."""
        mine = torch.tensor([state, *self._facts.started()], dtype=torch.int64)
        arrivals = {rank: torch.zeros_like(mine) for rank in self._peers}
        works: dict[int, list[Any]] = {}
        for begin in (True, False):  # all are sent to before one is waited for
            for rank, arrival in arrivals.items():
                try:
                    if begin:
                        works[rank] = [self._group.send([mine], rank, TAG), self._group.recv([arrival], rank, TAG)]
                    for work in () if begin else works[rank]:
                        work.wait(self.timeout)
                except RuntimeError as error:
                    return rank, (str(error).splitlines() or ["no answer"])[0][:160]
        problems = ((rank, self._judge(rank, arrival.tolist())) for rank, arrival in arrivals.items())
        return next(((rank, problem) for rank, problem in problems if problem), None)

    def _judge(self, rank: int, beat: list[int]) -> str:
        """What is wrong with a peer by its beat; one that ends well is not asked any more."""
        state, *started = beat
        if state == DONE:
            del self._peers[rank]
            return ""
        if state != WORKING:
            self._ending.wait(FAILED_GRACE_S)
            return "it has failed"
        count = self._peers[rank][1]
        behind_s = self._lags[rank].seconds(self._facts.started()[count], started[count], time.monotonic())
        limit_s = self.timeout.total_seconds()
        return f"its host has not come to it for {limit_s:g} s" if behind_s > limit_s else ""

    def _own_fault(self) -> tuple[int, str] | None:
        """What NCCL reports, blamed on the first peer."""
        fault = self._facts.fault()
        return (next(iter(self._peers)), f"NCCL reports {fault}") if fault and self._peers else None

    def _lose(self, rank: int, reason: str) -> None:
        """A peer is lost, unless this process ends just now."""
        if self._ending.is_set():
            return
        who, count = self._peers[rank]
        text = f"{who} is lost at {self._facts.where()}: {reason}"
        if not run_for(REPORT_S, lambda: self._failures.lost(text, vague=count == 1)):
            self._failures.keep(LostError(text))  # the store is gone, too

    def _on_loss(self, error: PeerError) -> None:
        """Wakes a host that hangs in the GPU, and ends the process where that does not help."""
        threading.Thread(target=self._end_in_time, args=(error,), name="peer lost", daemon=True).start()
        run_for(ABORT_S, self._facts.abort)

    def _end_in_time(self, error: PeerError) -> None:
        if not self._ending.wait(ABORT_S + END_S):
            end_process(error)


def end_process(error: PeerError) -> None:
    """Ends this process from another thread, with the line and the status that the command line would give it."""
    print_error(error)
    sys.stdout.flush()
    os._exit(error.status)


def run_for(seconds: float, work: Callable[[], object]) -> bool:
    """Does something that may hang; whether it has come back in time. It goes on in its thread where it has not."""

    def quietly() -> None:
        try:
            work()
        except (RuntimeError, ValueError, AssertionError):  # the groups are half gone: what counts is that it returned
            return

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        stopping.leave_abruptly()  # ending as usual might wait for it
    return not thread.is_alive()
