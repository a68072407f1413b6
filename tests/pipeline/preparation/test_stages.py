"""prepare stopped at each of its stages: one line, no process left, and the same command ends with the same bytes."""

import contextlib
import shutil
import signal
import subprocess
import uuid
from pathlib import Path

import pytest

from pipeline.preparation.machine import LONGEST_NAME, SOCKET_BYTES
from tests.helpers.frozen import hold, release
from tests.helpers.preparing import run, start, tree
from tests.pipeline.test_signals import assert_stopped, wait_for

pytestmark = pytest.mark.slow

Arguments = tuple[object, ...]
STAGES = [
    ("listed", signal.SIGTERM),
    ("ray-starting", signal.SIGHUP),
    ("tar-half@train-000002", signal.SIGTERM),  # held is a worker, so the driver is in Ray's wait
    ("record-renamed@train-000002", signal.SIGHUP),
    ("driver-shard-done", signal.SIGINT),
    ("statistics", signal.SIGTERM),
    ("manifest-renamed", signal.SIGINT),
    ("summary", signal.SIGHUP),
]


def processes_of(mark: str) -> list[int]:
    """Processes that have this in their environment, whatever their session and their parent."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has just ended
    return found


def stop_at(
    point: str, number: signal.Signals, tmp_path: Path, *words: object, extra: dict[str, str] | None = None
) -> None:
    """Runs until ``point``, sends the signal there, and sees that nothing is left."""
    marker, mark = tmp_path / "held", uuid.uuid4().hex
    process = start(*words, fault=f"hold-{point}:{marker}", extra={"MARK": mark, **(extra or {})})
    wait_for(marker.exists, process)
    assert process.pid in processes_of(mark)
    process.send_signal(number)
    assert_stopped(process, number)
    assert processes_of(mark) == []


@pytest.mark.parametrize(("point", "number"), STAGES)
def test_prepare_is_stopped_at_any_stage_and_continued(
    arguments: Arguments, undisturbed: Path, tmp_path: Path, point: str, number: signal.Signals
) -> None:
    words = (*arguments, "--workers", 2, "--output", tmp_path / "data")
    stop_at(point, number, tmp_path, *words)
    run(*words)
    assert tree(tmp_path / "data") == tree(undisturbed)


@pytest.mark.parametrize(("number", "answers"), [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGHUP, True)])
def test_prepare_is_stopped_while_ray_starts(
    arguments: Arguments, undisturbed: Path, tmp_path: Path, number: signal.Signals, answers: bool
) -> None:
    """Ray is in C code that waits for its first server, whether that answers after all or never (in 120 s)."""
    mark = uuid.uuid4().hex
    words = (*arguments, "--workers", 2, "--output", tmp_path / "data")
    process = start(*words, extra={"MARK": mark})
    server = hold_server(process, mark)
    process.send_signal(number)
    if answers:
        release(server)
    assert_stopped(process, number)
    assert processes_of(mark) == []
    if answers:
        run(*words)
        assert tree(tmp_path / "data") == tree(undisturbed)


def is_gcs(pid: int) -> bool:
    try:
        return b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_ray_that_never_answers_is_one_line(arguments: Arguments, tmp_path: Path) -> None:
    """Its first server is stopped as soon as it is there: Ray then waits in C code that keeps Python's lock."""
    mark, extra = uuid.uuid4().hex, {"TWOTOWER_RAY_START_S": "5"}
    process = start(*arguments, "--workers", 1, "--output", tmp_path / "data", extra={"MARK": mark} | extra)
    with contextlib.suppress(EndedError):  # a machine so slow that there was no server within that time: as good
        hold_server(process, mark)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.splitlines() == [
        "error: Ray does not start on this machine: no answer within 5 s; set TWOTOWER_RAY_START_S to wait longer"
        " (seconds)"
    ]
    assert processes_of(mark) == []


class EndedError(Exception):
    """A process has ended whose server was waited for."""


def hold_server(process: subprocess.Popen[str], mark: str) -> list[int]:
    """Stops Ray's first server as soon as it is there."""

    def find() -> list[int]:
        if process.poll() is not None:
            raise EndedError
        return list(filter(is_gcs, processes_of(mark)))

    return hold(find, "Ray's first server")


def test_publishing_is_stopped_and_continued(arguments: Arguments, undisturbed: Path, tmp_path: Path) -> None:
    url, extra = f"file://{tmp_path}/store/data", {"TWOTOWER_CACHE": str(tmp_path / "cache")}
    words = (*arguments, "--workers", 2, "--output", url)
    stop_at("publishing", signal.SIGTERM, tmp_path, *words, extra=extra)
    process = start(*words, extra=extra)
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 0
    assert tree(tmp_path / "store" / "data") == tree(undisturbed)


def test_the_longest_folder_for_sockets_that_is_accepted_works(arguments: Arguments, tmp_path: Path) -> None:
    folder = Path("/tmp") / uuid.uuid4().hex[: SOCKET_BYTES - len(LONGEST_NAME) - len("/tmp/")]
    folder.mkdir()
    try:
        process = start(*arguments, "--workers", 1, "--output", tmp_path / "data", extra={"TMPDIR": str(folder)})
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)
