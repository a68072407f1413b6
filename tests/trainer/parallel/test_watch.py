"""A peer that is gone while the host waits for the GPU: noticed, said once, and this process ends."""

import datetime
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from trainer.errors import LostError, PeerError, RunError
from trainer.parallel import watch
from trainer.parallel.failures import FailureStore
from trainer.parallel.watch import Facts, Lag, PeerWatch, run_for

LONG = datetime.timedelta(seconds=100)
PATIENCE_S = 30.0  # for what must come; a test that waits so long has failed


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short beats and graces, loopback, and nothing here ends the process of all tests."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(watch, "end_process", lambda error: None)
    for name, seconds in (("BEAT_S", 0.01), ("FAILED_GRACE_S", 0.01), ("CLOSE_S", PATIENCE_S), ("ABORT_S", 5.0)):
        monkeypatch.setattr(watch, name, seconds)


class Process:
    """One of two, as a thread: its group, its failures, its watch, and a GPU that hangs until it is aborted."""

    def __init__(self, rank: int, group: Any, failures: FailureStore, timeout: datetime.timedelta, fault: str) -> None:
        self.failures, self.started, self.fault, self.awake = failures, 0, fault, threading.Event()
        facts = Facts(lambda: (self.started, 0), lambda: "conv3 forward", lambda: self.fault, self.awake.set)
        peers = {1 - rank: (f"tower {'ba'[rank]} (rank {1 - rank})", 0)}
        self.watch = PeerWatch(group, peers, failures, facts, timeout=timeout)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Process]]]:
    """Two processes that see each other."""
    made: list[Process] = []

    def make(timeout: datetime.timedelta = LONG, fault: str = "") -> list[Process]:
        store, groups = dist.HashStore(), {}

        def join(rank: int) -> None:
            groups[rank] = dist.ProcessGroupGloo(dist.PrefixStore("beats", store), rank, 2, LONG)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        made.extend(Process(rank, groups[rank], FailureStore(store), timeout, fault * (rank == 0)) for rank in (0, 1))
        return made

    yield make
    monkeypatch.setattr(watch, "ABORT_S", 0.02)
    for process in made:
        process.watch.stop(failed=True)


def test_both_end_well_and_nobody_is_missed(pair: Any) -> None:
    first, second = pair()
    first.watch.start()
    second.watch.start()
    ends = [threading.Thread(target=process.watch.stop) for process in (first, second)]
    for end in ends:
        end.start()
        end.join()  # one after the other: the second is not lost to the first
    assert first.failures.known is None and second.failures.known is None


def test_a_connection_that_closes_ends_the_wait_for_the_gpu(pair: Any) -> None:
    """What a killed process leaves: nothing but that."""
    first, second = pair()
    first.watch.start()
    del second.watch._group
    assert first.awake.wait(PATIENCE_S), "aborted"
    known = first.failures.known
    assert isinstance(known, LostError) and str(known).startswith("tower b (rank 1) is lost at conv3 forward: ")
    with pytest.raises(LostError, match="conv3 forward"):
        first.failures.check()


def test_a_peer_that_says_nothing_is_lost_after_the_timeout(pair: Any) -> None:
    """As one that is stopped: its connection stays."""
    first, second = pair(timeout=datetime.timedelta(seconds=0.1))
    first.watch.start()
    assert first.awake.wait(PATIENCE_S) and isinstance(first.failures.known, LostError)
    assert second.failures.known is None


def test_a_host_that_hangs_is_lost_though_its_thread_tells_that_it_lives(pair: Any) -> None:
    first, second = pair()
    first.watch.start()
    second.watch.start()
    first.started, second.started = 7, 6
    first.watch.timeout = datetime.timedelta(seconds=0.2)
    assert first.awake.wait(PATIENCE_S)
    assert "its host has not come to it for 0.2 s" in str(first.failures.known)


def test_what_nccl_reports_is_a_loss(pair: Any) -> None:
    first, second = pair(fault="remote error")
    second.watch.start()
    first.watch.start()
    assert first.awake.wait(PATIENCE_S)
    assert str(first.failures.known).endswith("is lost at conv3 forward: NCCL reports remote error")


def test_a_peer_that_failed_is_named_with_its_own_reason(pair: Any) -> None:
    first, second = pair()
    first.watch.start()
    second.watch.start()
    second.failures.ended(1, RunError("no space"))
    second.watch.stop(failed=True)
    assert first.awake.wait(PATIENCE_S)
    assert type(first.failures.known) is PeerError and str(first.failures.known) == "rank 1 ended: RunError: no space"


def test_a_process_that_fails_itself_blames_nobody(pair: Any) -> None:
    """Both see a loss that is not finite; the slower one is not told that the other is gone."""
    first, second = pair()
    first.watch.start()
    first.watch._ending.set()
    second.watch.start()
    second.watch.stop(failed=True)
    first.watch._thread.join(PATIENCE_S)
    assert first.failures.known is None and not first.awake.is_set()


def test_a_host_that_does_not_come_out_is_ended(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An abort may hang, too; the line and the status are those of the command."""
    ended: list[PeerError] = []
    done = threading.Event()
    monkeypatch.setattr(watch, "end_process", lambda error: (ended.append(error), done.set()))
    monkeypatch.setattr(watch, "END_S", 0.0)
    monkeypatch.setattr(watch, "ABORT_S", 0.05)
    monkeypatch.setattr(watch.stopping, "leave_abruptly", lambda: None)
    first, _ = pair()
    hanging = threading.Event()
    first.failures.on_loss = first.watch._on_loss
    first.watch._facts = Facts(lambda: (0, 0), lambda: "fc6", abort=lambda: hanging.wait(PATIENCE_S))
    assert str(first.failures.lost("tower b is lost")) == "tower b is lost", "the main thread gets its error meanwhile"
    assert done.wait(PATIENCE_S) and ended == [first.failures.known] and ended[0].status == 4
    hanging.set()


def test_only_the_first_loss_counts(pair: Any) -> None:
    first, _ = pair()
    assert str(first.failures.lost("one")) == str(first.failures.lost("two")) == "one"


def test_lag_counts_only_while_a_peer_stands_still_behind() -> None:
    lag = Lag()
    assert lag.seconds(mine=3, theirs=3, now=10.0) == 0.0
    assert lag.seconds(mine=9, theirs=3, now=14.0) == 4.0
    assert lag.seconds(mine=9, theirs=4, now=15.0) == 0.0, "it moves"
    assert lag.seconds(mine=9, theirs=4, now=16.5) == 1.5
    assert lag.seconds(mine=9, theirs=12, now=99.0) == 0.0, "it is ahead"


def test_what_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[bool] = []
    monkeypatch.setattr(watch.stopping, "leave_abruptly", lambda: left.append(True))
    hanging = threading.Event()

    def refuse() -> None:
        raise RuntimeError("aborted")

    assert run_for(PATIENCE_S, refuse) and not left
    assert not run_for(0.01, lambda: hanging.wait(PATIENCE_S)) and left
    hanging.set()
