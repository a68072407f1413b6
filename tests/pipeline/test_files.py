"""Paths and URLs under one set of names; what is in a folder, and of which kind."""

import os
import socket
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, SourceError, require
from pipeline.files import Entry, UrlPath, parse_path, read_range, relative_to, scan


def test_a_url_is_told_from_a_path_and_both_give_what_is_below() -> None:
    assert parse_path("/a/b/") == Path("/a/b")
    assert parse_path("s3://a/b/") == UrlPath("s3://a/b")
    for root in ("/", "/a", "a", "s3://a"):
        assert relative_to(parse_path(root) / "b" / "c.tar", parse_path(root)).parts == ("b", "c.tar")


def test_every_kind_of_entry_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"123")
    (tmp_path / "folder").mkdir()
    (tmp_path / ".hidden").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, target in (
        ("to file", "file"),
        ("to folder", "folder"),
        ("to pipe", "pipe"),
        ("to nothing", "x"),
        ("to itself", "to itself"),
        ("through a file", "file/x"),
        ("to a long name", "x" * 300),
        ("to null", "/dev/null"),
    ):
        (tmp_path / name).symlink_to(tmp_path / target)
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        listener.bind("socket")
    assert set(scan(tmp_path)) == {
        Entry(".hidden", "file", 0),
        Entry("file", "file", 3),
        Entry("to file", "file", 3, linked=True),
        Entry("folder", "directory", 0),
        Entry("to folder", "directory", 0, linked=True),
        Entry("pipe", "pipe", 0),
        Entry("to pipe", "pipe", 0),
        Entry("socket", "socket", 0),
        Entry("to null", "device", 0),
        *(Entry(name, "link", 0) for name in ("to nothing", "to itself", "through a file", "to a long name")),
    }
    assert set(scan(UrlPath(f"file://{tmp_path}"))) == set(scan(tmp_path))
    with pytest.raises(SourceError, match="cannot be listed: No such file"):
        list(scan(tmp_path / "none"))


def test_a_range_is_whole_or_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_range(tmp_path / "file", 3, 4) == b"3456"
    with pytest.raises(SourceError, match="ended at byte 10; it is shorter"):
        read_range(tmp_path / "file", 8, 4)
    with pytest.raises(SourceError, match="is gone"):
        read_range(tmp_path / "none", 0, 1)


def test_a_refused_value_is_named_with_what_was_expected() -> None:
    require(True, "--limit", 1, "1 or more")
    with pytest.raises(ConfigError, match=r"^--limit 0: expected 1 or more$"):
        require(False, "--limit", 0, "1 or more")
    with pytest.raises(KeyError, match=r"data\.mmap is 'yes': expected true or false"):
        require(False, "data.mmap", "yes", "true or false", KeyError)
