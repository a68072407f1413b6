"""Names in /tmp are anybody's: what a stranger left under one of ours is neither believed nor written to.

Strangers' files are made by another user where the tests run as root, which they do in CI's container.
"""

import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster import local
from cluster.errors import ClusterError
from twotower import locks, private
from twotower.untrusted import open_regular, read_regular

NOBODY = 65534
ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="making another user's files needs root")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder as /tmp is one."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def make_open(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def make_theirs(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY, NOBODY)


def make_link(folder: Path) -> None:
    folder.with_name("target").mkdir(mode=0o755)
    folder.symlink_to("target")


PLANTED = [
    pytest.param(make_theirs, f"belongs to user {NOBODY}", marks=needs_root),
    pytest.param(make_link, "is a link"),
    pytest.param(lambda folder: folder.touch(), "is not a folder"),
    pytest.param(lambda folder: folder.symlink_to("nowhere"), "is a link"),
    pytest.param(lambda folder: os.mkfifo(folder), "is not a folder"),
]


@pytest.mark.parametrize(("plant", "why"), PLANTED)
def test_a_folder_that_was_there_first(place: Path, plant: Callable[[Path], None], why: str) -> None:
    """`cluster up --local` neither writes into it nor changes its mode."""
    folder = place / "twotower-0"
    plant(folder)
    before = [(path.name, path.lstat().st_mode) for path in sorted(place.iterdir())]
    with pytest.raises(ClusterError, match=f"{why}.*--folder DIR"):
        local.up(local.LocalOptions(folder))
    assert [(path.name, path.lstat().st_mode) for path in sorted(place.iterdir())] == before


def test_our_own_folder_of_another_umask_is_taken(place: Path) -> None:
    make_open(place / "ours")
    private.make_folder(place / "ours")
    assert stat.S_IMODE((place / "ours").stat().st_mode) == 0o700


def test_a_place_where_anybody_may_exchange_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """World-writable without the sticky bit: what we make there, another may rename and replace."""
    tmp_path.chmod(0o777)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(private.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(private.NotPrivateError, match="has mode 0777"), private.fresh_folder("x"):
        pass
    assert not list(tmp_path.iterdir())


def test_the_runtime_folder_is_preferred_where_it_is_ours(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the folder for temporary files; ``su`` and ``sudo`` leave us another user's."""
    monkeypatch.setattr(private.tempfile, "tempdir", str(place))
    ours, others = place / "run", place / "open"
    ours.mkdir(mode=0o700)
    make_open(others)
    for given, parent in ((str(ours), ours), (str(others), place), ("relative", place), (f"{place}/no", place)):
        monkeypatch.setenv("XDG_RUNTIME_DIR", given)
        with private.fresh_folder("x") as folder:
            assert folder.parent == parent and stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert not folder.exists()


def record_of(process: "subprocess.Popen[bytes]") -> local.LocalCluster:
    node = local.LocalNode(process.pid, local._start_time(process.pid), head=True)
    return local.LocalCluster("http://127.0.0.1:1", "127.0.0.1:2", (node,))


@contextlib.contextmanager
def somebody(*words: str):
    """A process of this user that `down` must not end."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", *words], start_new_session=True) as it:
        try:
            yield it
        finally:
            it.kill()


def write_theirs(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)


def link_to_copy(path: Path) -> None:
    path.rename(path.with_name("copy"))
    path.symlink_to("copy")


SPOILED = [
    pytest.param(write_theirs, f"belongs to user {NOBODY}", marks=needs_root),
    pytest.param(lambda path: os.chown(path.parent, NOBODY, NOBODY), f"belongs to user {NOBODY}", marks=needs_root),
    pytest.param(lambda path: path.chmod(0o666), "mode 0666"),
    pytest.param(lambda path: path.parent.chmod(0o777), "mode 0777"),
    pytest.param(link_to_copy, "is a link"),
    pytest.param(lambda path: os.link(path, path.with_name("second")), "second name"),
    pytest.param(lambda path: path.write_text("[" * 100_000), "nested too deeply"),
    pytest.param(lambda path: path.write_text('{"address": 5}'), "damaged"),
    pytest.param(lambda path: path.write_bytes(b"\0" * (2 << 20)), "expected a small record"),
]


@pytest.mark.parametrize(("spoil", "why"), SPOILED)
def test_a_record_that_is_not_ours_ends_no_process(tmp_path: Path, spoil: Callable[[Path], None], why: str) -> None:
    """It names a process by its true number, start time and command."""
    folder = tmp_path / "c"
    folder.mkdir(mode=0o700)
    with somebody(local.PROGRAM) as process:
        local.save(folder, record_of(process))
        assert local.load(folder) is not None, "as long as it is ours, it is believed"
        spoil(folder / local.RECORD)
        with pytest.raises(ClusterError, match=why):
            local.down(folder)
        assert process.poll() is None


def test_a_record_that_names_another_program_ends_no_process(tmp_path: Path) -> None:
    """Number and start time are right, the command is not a node's; nor is process 1, nor ourselves."""
    tmp_path.chmod(0o700)
    with somebody() as process:
        local.save(tmp_path, record_of(process))
        assert local.down(tmp_path) is None
        local.stop_node(record_of(process).nodes[0], kill=True)
        assert process.poll() is None
    for pid in (0, 1, -1, os.getpid()):
        local.stop_node(local.LocalNode(pid, local._start_time(pid), head=True), kill=True)
    assert local.session_members(0) == local.session_members(1) == []


def test_a_node_of_ours_is_ended(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with somebody(local.PROGRAM) as process:
        local.save(tmp_path, record_of(process))
        assert asdict(local.load(tmp_path)) == asdict(record_of(process))
        local.down(tmp_path)
        assert process.wait(30) == -signal.SIGTERM


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    """A run or data set that came from elsewhere may hold ``.lock -> ~/.bashrc``: nothing there is changed or made."""
    precious, lock = tmp_path / "precious", tmp_path / ".lock"
    precious.write_text("mine")
    for target in (precious, tmp_path / "new"):
        lock.symlink_to(target)
        with pytest.raises(OSError, match="link"):
            locks.hold(lock)
        assert not locks.is_held(lock)
        lock.unlink()
    assert precious.read_text() == "mine" and not (tmp_path / "new").exists()


def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    assert not locks.is_held(tmp_path / ".lock")
    with pytest.raises(OSError, match="not a file"):
        locks.hold(tmp_path / ".lock")


def test_a_file_that_is_a_link_is_not_followed_where_that_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link") == read_regular(tmp_path / "file", follow=False) == b"12345"
    with pytest.raises(OSError, match="is a link"), open_regular(tmp_path / "link", follow=False):
        pass
