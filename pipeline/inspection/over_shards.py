"""Work on every shard of a data set, on all cores of this machine.

Processes, not threads: walking headers and reading JSON is Python's own work. What they share is sent to each of them
once, not with every shard: a manifest of thousands of shards is long.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

from twotower.processes import die_with

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")

SMALL_BYTES = 256 << 20  # done sooner than processes start
_task: list[Any] = []  # of a process of the pool: the work, and what is shared


def over_shards(
    work: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item], *, size_bytes: int
) -> Iterator[Result]:
    """``work(shared, item)`` for every item, in their order.

    Args:
        work: a function of a module.
        shared: its first argument, the same for all.
        items: what there is to do, a shard each.
        size_bytes: of all that will be read; where it is little, this process does it alone.
    """
    processes = min(len(os.sched_getaffinity(0)), len(items))
    if processes < 2 or size_bytes < SMALL_BYTES:
        for item in items:
            yield work(shared, item)
        return
    context = get_context("spawn")  # a fork would copy the locks of threads that it does not have
    pool = ProcessPoolExecutor(processes, context, _begin, (work, shared, os.getpid()))
    try:
        yield from pool.map(_do, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any, Any], Any], shared: Any, parent: int) -> None:
    """Once in every process of the pool, which ends with the one that started it, however that ends."""
    if not die_with(parent, signal.SIGKILL):
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it says what Ctrl-C does
    _task[:] = [work, shared]


def _do(item: Any) -> Any:
    work, shared = _task
    return work(shared, item)
