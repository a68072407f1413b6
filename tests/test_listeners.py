"""Ports of this machine: which are free, and whose the others are."""

import os
import socket
from pathlib import Path

import pytest

from twotower import listeners


def test_a_socket_is_found_though_another_file_is_closed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dashboard closes connections all the time."""
    first, closed, last = sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    readlink = os.readlink

    def look(path: Path) -> str:
        if path.name == str(closed.fileno()):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return readlink(path)

    monkeypatch.setattr(os, "readlink", look)
    wanted = {str(os.fstat(one.fileno()).st_ino) for one in (first, last)}
    assert wanted <= listeners.inodes_of(os.getpid())
    for one in sockets:
        one.close()
    assert listeners.inodes_of(2**22 + 1) == set()


@pytest.mark.parametrize(("lent", "own"), [("32768 60999", True), ("1024 65535", False), ("", False)])
def test_free_ports_are_those_that_the_kernel_lends_to_nobody(
    lent: str, own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it lends them all, or does not say, any will do."""
    (tmp_path / "range").write_text(lent)
    monkeypatch.setattr(listeners, "LENT_PORTS", tmp_path / "range")
    found = listeners.free_ports(5)
    assert len(set(found)) == 5 and (not own or set(found) <= set(listeners.OUR_PORTS))


def test_a_port_that_is_taken_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "range").write_text("32768 60999")
    monkeypatch.setattr(listeners, "LENT_PORTS", tmp_path / "range")
    free = listeners.free_ports(3)
    monkeypatch.setattr(listeners, "OUR_PORTS", sorted(free))
    with socket.create_server(("127.0.0.1", free[0])):
        assert sorted(listeners.free_ports(2)) == sorted(free[1:])
