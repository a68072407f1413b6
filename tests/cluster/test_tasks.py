"""Commands as Ray tasks, as far as no cluster is needed; the rest is in test_faults.py."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.training import tasks
from tests.helpers.strangers import strangers_port


def test_a_cluster_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"name": "x", "command": ["true"], "log": "x"}) + "\n"))
    try:
        assert tasks.main(["--address", "127.0.0.1:1", "--stop-file", str(tmp_path / "stop")]) == 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no Ray cluster answers: ")


@pytest.mark.parametrize("address", ["auto", "local", "ray://head"])
def test_an_address_without_a_port_is_rays_to_find(address: str) -> None:
    tasks.check_address(address)


@pytest.mark.skipif(os.getuid() != 0, reason="another user can only be played by root")
def test_another_users_program_at_the_address_is_refused() -> None:
    """Ray would send it the token."""
    with strangers_port() as port:
        for address in (f"127.0.0.1:{port}", f"ray://localhost:{port}"):
            with pytest.raises(ClusterError, match=r"another user of this machine \(uid 65534\)"):
                tasks.check_address(address)


def test_a_command_is_asked_to_end_by_a_file(tmp_path: Path) -> None:
    """It says so itself and ends with its own status."""
    stop, log = tmp_path / "stop", tmp_path / "log"
    program = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(3)))\n"
        f"pathlib.Path({str(stop)!r}).touch()\n"
        "while True: time.sleep(0.01)\n"
    )
    assert tasks._run_once(["python", "-c", program], str(log), str(stop)) == 3
    assert log.read_text() == "saved\n"
