"""Rows of ``scale.py``: the cluster's commands, against a dashboard that is played here."""

import contextlib
import io
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from growth import Operation, fastest_ms

CALL_S = 0.075  # that Ray's dashboard took for one call where 601 took 45 s
WRAPPED = "exec python -m cluster.jobs.entry -- python -m trainer train --run /r"


class Dashboard:
    """Jobs of which nine of ten have succeeded, and the others failed or are running.

    Attributes:
        address: where it listens.
        calls: so many.
    """

    def __init__(self, jobs: int) -> None:
        self.address, self.calls = "", 0
        states = ["SUCCEEDED"] * 18 + ["FAILED", "RUNNING"]
        self._jobs = [
            {
                "submission_id": f"job-{number}",
                "status": states[number % 20],
                "entrypoint": WRAPPED,
                "driver_node_id": f"node-{number % 8}",
                "driver_exit_code": {"SUCCEEDED": 0, "FAILED": 3}.get(states[number % 20]),
                "start_time": 1000 * number,
            }
            for number in range(jobs)
        ]

    def body(self, path: str) -> bytes:
        """The answer to a request."""
        self.calls += 1
        if path.startswith("/api/jobs"):
            return json.dumps(self._jobs).encode()
        time.sleep(CALL_S)
        if "job-result" in path:
            return json.dumps({"outcome": "succeeded", "exit_code": 0}).encode()
        return b"prepared 239 / 1,797 images, 48 images/s, 33 s left\n"


@contextlib.contextmanager
def serving(jobs: int) -> Iterator[Dashboard]:
    """A dashboard on loopback."""
    board = Dashboard(jobs)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = board.body(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    board.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield board
    finally:
        server.shutdown()
        server.server_close()


def _status(address: str) -> None:
    from cluster.__main__ import main

    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ["RAY_AUTH_TOKEN_PATH"] = "/nonexistent/token"  # no token of this machine's user goes anywhere
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["status", "--json", "--address", address]) == 0


def status_calls(work: Path, jobs: int) -> float:
    """Requests of one `cluster status`."""
    with serving(jobs) as board:
        _status(board.address)
        return board.calls


def status_s(work: Path, jobs: int) -> float:
    """Time of one `cluster status`, where a call to a node takes as long as it did."""
    with serving(jobs) as board:
        return fastest_ms(lambda: _status(board.address), rounds=1, warm_up=0) / 1000


OPERATIONS = [
    Operation("cluster status, calls", "jobs", "calls", (30, 100, 300), status_calls, before="601 calls at 300"),
    Operation("cluster status, time", "jobs", "s", (30, 100, 300), status_s, before="45 s at 300"),
]
