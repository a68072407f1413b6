"""A Ray dashboard played on loopback: it knows jobs, results and logs, and counts who asks for what."""

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

OURS = "exec python -m cluster.jobs.entry -- python -m trainer train --run /r"


def job(number: int, status: str, *, node: str | None = "node-0", **more: object) -> dict[str, object]:
    """A record of the Jobs API; a larger number is a newer job."""
    times = {"start_time": 1000 * number, "end_time": 1000 * number + 500}
    return (
        {"submission_id": f"job-{number:04d}", "status": status, "entrypoint": OURS, "driver_node_id": node}
        | times
        | more
    )


class FakeDashboard:
    """What it knows, and what it was asked.

    Attributes:
        address: where it listens.
        jobs: records.
        files: by name: result files and logs.
        silent: nodes that do not answer until `release` is set.
        calls: requests by path; those for files as ``FILE NAME``.
        release: lets the silent ones end.
    """

    def __init__(self) -> None:
        self.address = ""
        self.jobs: list[dict[str, object]] = []
        self.files: dict[str, bytes] = {}
        self.silent: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.release = threading.Event()

    def answer(self, path: str, query: dict[str, str]) -> bytes | None:
        """The body for a request; None: there is no such thing."""
        if path == "/api/jobs/":
            return json.dumps(self.jobs).encode()
        if path.startswith("/api/jobs/"):
            found = [each for each in self.jobs if each["submission_id"] == path.rpartition("/")[2]]
            return json.dumps(found[0]).encode() if found else None
        if query.get("node_id") in self.silent:
            self.release.wait(60)
        return self.files.get(query.get("filename", ""))


@contextlib.contextmanager
def fake_dashboard() -> Iterator[FakeDashboard]:
    """Serves one until the end of the block."""
    board = FakeDashboard()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            board.calls[f"file {query['filename']}" if "filename" in query else url.path] += 1
            body = board.answer(url.path, query)
            with contextlib.suppress(OSError):  # whoever asked may be tired of waiting
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    board.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield board
    finally:
        board.release.set()
        server.shutdown()
        server.server_close()
