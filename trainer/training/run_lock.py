"""One writer of a run folder: ``RUN/.lock``, held by the process that the user started, and by the towers it starts.

Two things keep it. The kernel's lock (``twotower.locks``) ends with its last holder, however that ends, also where an
NFS server keeps it. Where a file system has no locks, or keeps them on each host for itself, the record in the file
decides: its holder touches the file every ``BEAT_S``, and whoever finds a record of another host watches whether it is
still touched. No clock is compared with another one. Readers of a run never lock.
"""

import contextlib
import dataclasses
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import RunError
from twotower import locks
from twotower.typed import build
from twotower.untrusted import open_regular, parse_json, read_regular
from twotower.verbosity import remark
from twotower.words import one_line

LOCK_NAME = ".lock"
MOST_BYTES = 4096
BEAT_S = 5.0
WATCH_S = 20.0  # four beats
PATIENCE_S = 45.0  # less than the default of train.start_timeout_s, in which the other ranks wait for rank 0
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who trains in a folder.

    Attributes:
        host: name of the machine.
        boot: which start of which kernel; machines of one name differ in it.
        pid: process there.
        since: UTC time of its start.
    """

    host: str
    boot: str
    pid: int
    since: str

    @property
    def is_here(self) -> bool:
        """Whether the kernel that answers us is the holder's."""
        return self.boot == _boot()

    def __str__(self) -> str:
        return one_line(f"process {self.pid} on {self.host}, since {self.since}")


def _myself() -> Holder:
    return Holder(platform.node(), _boot(), os.getpid(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:  # another system than Linux
        return platform.node()


def read_holder(run: Path) -> Holder | None:
    """Who holds a run folder, or held it and was killed; None where nobody does or did."""
    try:
        return build(Holder, parse_json(read_regular(run / LOCK_NAME, MOST_BYTES, follow=False)))
    except (OSError, ValueError):
        return None


def refuse_held(run: Path, *, patience_s: float = 0) -> None:
    """Refuses a run folder that another process writes; looks only, and leaves nothing behind.

    Args:
        run: the run folder, or where it will be.
        patience_s: how long to wait, s. A process that torchrun or Ray has started waits a little: it may follow one
            that was killed on another node, whose lock an NFS server has yet to give up.

    Raises:
        RunError: it is held; says by whom.
    """
    end = time.monotonic() + patience_s
    while locks.is_held(run / LOCK_NAME):
        if time.monotonic() >= end:
            raise _held(run)
        time.sleep(min(1.0, PATIENCE_S / 10))


def _held(run: Path) -> RunError:
    holder = read_holder(run)
    same = holder is not None and (holder.host, holder.boot) == (platform.node(), _boot())
    if holder is not None and same and not Path(f"/proc/{holder.pid}").exists():
        return RunError(f"{run} is in use: {holder}, has ended, and its towers still save; try again in a moment")
    who = holder or "another process"
    return RunError(f"{run} is in use by {who}: wait for it, stop it, or give another --run folder")


@contextlib.contextmanager
def hold_run(run: Path) -> Iterator[int]:
    """Holds a run folder, which is made if it is not there, and removed again if it is then empty.

    Yields:
        The lock's handle; processes that inherit it hold the lock, too.

    Raises:
        RunError: another process holds it, or the folder cannot be written.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = _take(run)
    except OSError as error:
        _remove_empty(made)
        raise RunError(f"--run {run} cannot be written: {error.strerror or error}") from None
    ended = threading.Event()
    threading.Thread(target=_beat, args=(handle, ended), name="lock", daemon=True).start()
    try:
        yield handle
    finally:
        ended.set()
        if _is_same(handle, run / LOCK_NAME):
            with contextlib.suppress(OSError):
                (run / LOCK_NAME).unlink()
        os.close(handle)
        _remove_empty(made)


def _take(run: Path) -> int:
    """Takes the lock and puts our name into it."""
    path, without = run / LOCK_NAME, False
    try:
        handle = locks.hold(path)
    except OSError as error:
        if not locks.has_no_locks(error):
            raise
        handle, without = locks.make(path), True
    if handle is None:
        raise _held(run)
    before = read_holder(run)
    if before is not None and (without or not before.is_here) and _is_touched(path, before):
        os.close(handle)
        raise _held(run)
    if before is not None:
        remark(f"note: {run} was left by {before}, which no longer runs; going on")
    text = json.dumps(dataclasses.asdict(_myself())).encode()
    os.ftruncate(handle, 0)
    os.pwrite(handle, text, 0)
    os.fsync(handle)
    return handle


def _is_touched(path: Path, holder: Holder) -> bool:
    """Watches for ``WATCH_S`` whether a holder whose kernel we cannot ask is alive."""
    remark(f"note: {path.parent} was left by {holder}; watching for {WATCH_S:g} s whether it still runs")
    first, end = _touched(path), time.monotonic() + WATCH_S
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCH_S / 10))
        if _touched(path) != first:
            return True
    return False


def _touched(path: Path) -> int:
    """Time of the last beat; the file is opened anew, which makes NFS ask the server."""
    try:
        with open_regular(path, follow=False) as handle:
            return os.fstat(handle).st_mtime_ns
    except OSError:
        return 0


def _beat(handle: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(handle)


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _remove_empty(folders: list[Path]) -> None:
    """Removes folders that this start made, the innermost first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
