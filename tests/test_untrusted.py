"""Files that a stranger may have made are read to an end that we set, or refused in one line."""

import errno
import json
import os
from pathlib import Path

import pytest

from twotower.untrusted import parse_json, read_regular


def test_a_regular_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 1000)
    assert read_regular(path, 1000) == b"x" * 1000
    with pytest.raises(OSError) as caught:
        read_regular(path, 999)
    assert caught.value.errno == errno.EFBIG and caught.value.strerror == "is larger than 999 bytes"
    path.write_bytes(b"")
    assert read_regular(path, 0) == b""


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to a device"])
def test_what_is_no_file_is_neither_read_nor_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = path if kind == "link to a device" else Path("/dev/zero")
        if kind == "link to a device":
            path.symlink_to("/dev/zero")
    with pytest.raises(OSError) as caught:
        read_regular(path)
    assert caught.value.strerror == "is no regular file"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        ("[NaN]", "NaN: no number is infinite or NaN in JSON"),
        ("[-Infinity]", "-Infinity: no number"),
        ("[1e999]", "1e999: no number"),
        ("9" * 100_000, "Exceeds the limit"),
        ("{", "Expecting"),
        (b"\xff", "can't decode byte"),
        ("", "Expecting value"),
    ],
)
def test_json_that_nobody_meant_is_one_line(text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_json_that_is_meant() -> None:
    value = {"a": [1, -2.5, 1e300, None, True, "é"], "b": {"a": {}}}
    assert parse_json(json.dumps(value)) == value == parse_json(json.dumps(value).encode())
    assert parse_json("[Infinity]", nan=True) == [float("inf")]


def test_a_name_that_stands_twice_among_many_is_found_at_once() -> None:
    names = [str(number) for number in range(200_000)]
    with pytest.raises(ValueError, match="'199999' stands there twice"):
        parse_json("{" + ", ".join(f'"{name}": 0' for name in [*names, names[-1]]) + "}")
