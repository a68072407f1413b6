"""The HTTP interface of a Ray cluster (jobs, nodes, log files), and the token that it asks for.

Ray's own JobSubmissionClient only sends jobs (submission.py). It is used for nothing else, because

- importing it takes 0.45 s of processor time; all of `python -m cluster status` takes 0.13 s (2 cores, Ray 2.60),
- its requests have no time limit, and they go through http_proxy, which never helps on the way to a loopback address,
- it has logs as text only: the server answers 500 if a job has written a byte that is no UTF-8,
- it knows neither nodes nor log files, and a job's true exit code is in a file beside its log (entry.py).

The token itself is never printed or logged.
"""

import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import requests

from cluster.errors import ClusterError, last_line
from twotower.verbosity import log

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TIMEOUT_S = 20.0
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")


class ServerError(ClusterError):
    """The cluster answered with an error; `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Unreachable(ClusterError):
    """Nothing answers at the address."""


def dashboard_address(address: str | None) -> str:
    """The dashboard's URL: `address`, else RAY_API_SERVER_ADDRESS, else port 8265 of this machine.

    Raises:
        ClusterError: the address is neither http(s)://HOST:PORT nor HOST:PORT.
    """
    text = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    url = urlparse(text if "://" in text else f"http://{text}")
    try:
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port is not None
    except ValueError:
        good = False
    if not good:
        raise ClusterError(f"address {text!r}: expected the dashboard as http://HOST:PORT, such as {DEFAULT_ADDRESS}")
    return f"{url.scheme}://{url.netloc}"


def is_loopback(address: str) -> bool:
    """Whether the dashboard's URL points to this machine."""
    return urlparse(address).hostname in ("127.0.0.1", "localhost", "::1")


class Client:
    """Calls to one cluster. Every failure is one line.

    Args:
        address: the dashboard, http(s)://HOST:PORT, see `dashboard_address`.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._session = requests.Session()
        self._session.trust_env = False  # no proxies, and no password from ~/.netrc in place of the token
        self.headers: dict[str, str] = {}
        if token := read_token():
            self.headers["Authorization"] = f"Bearer {token}"
        self._session.headers.update(self.headers)

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        """One HTTP call.

        Raises:
            Unreachable: no answer.
            ClusterError: the token is missing or wrong.
            ServerError: the server reports another error.
        """
        options.setdefault("timeout", TIMEOUT_S)
        try:
            answer = self._session.request(method, self.address + path, **options)
        except requests.RequestException as error:
            why = "no answer in time" if isinstance(error, requests.Timeout) else "nothing answers there"
            fix = "start one with `python -m cluster up --local`, or give --address"
            raise Unreachable(f"no Ray cluster at {self.address} ({why}); {fix}") from error
        log.debug("%s %s: %d", method, answer.url, answer.status_code)
        if answer.status_code == 401:
            raise ClusterError(
                f"{self.address} asks for a token and there is none in {token_path()}; copy the cluster's token file "
                "there (mode 0600), or set RAY_AUTH_TOKEN_PATH"
            )
        if answer.status_code == 403:
            raise ClusterError(
                f"{self.address} refuses the token in {token_path()}; it belongs to another cluster: copy the right one"
            )
        if answer.status_code >= 400:
            raise ServerError(answer.status_code, f"{self.address}{path}: {last_line(answer.text)}")
        return answer

    def read(self, path: str, **options: Any) -> Any:
        """The JSON that a GET gives.

        Raises:
            ClusterError: see `call`; or the answer is not JSON, so it is no Ray that answers.
        """
        try:
            return self.call("GET", path, **options).json()
        except ValueError:
            raise self._no_ray() from None

    def _no_ray(self) -> ClusterError:
        return ClusterError(f"{self.address} is not a Ray dashboard (another program answers there); mind the port")

    def version(self) -> str:
        """The cluster's Ray version.

        Raises:
            ClusterError: see `read`.
        """
        record = self.read("/api/version")
        if not isinstance(record, dict) or "ray_version" not in record:
            raise self._no_ray()
        return str(record["ray_version"])

    def nodes(self) -> list[dict[str, Any]]:
        """The summary of every node that the cluster has or had."""
        return list(self.read("/nodes", params={"view": "summary"})["data"]["summary"])

    def jobs(self) -> list[dict[str, Any]]:
        """All submitted jobs, oldest first."""
        jobs = [job for job in self.read("/api/jobs/") if job.get("submission_id")]
        return sorted(jobs, key=lambda job: job.get("start_time") or 0)

    def job(self, job_id: str) -> dict[str, Any]:
        """One job's record as the Jobs API has it.

        Raises:
            ClusterError: there is no such job.
        """
        try:
            return dict(self.read(f"/api/jobs/{job_id}"))
        except ServerError as error:
            if error.status == 404:
                raise ClusterError(f"no job {job_id!r} on {self.address}; see `python -m cluster status`") from None
            raise

    def stop(self, job_id: str) -> None:
        """Ask a job to end: SIGTERM now, SIGKILL after the cluster's RAY_JOB_STOP_WAIT_TIME_S."""
        self.call("POST", f"/api/jobs/{job_id}/stop")

    def log(self, job_id: str, node_id: str | None, lines: int = -1) -> bytes:
        """What a job has written so far, byte for byte.

        Args:
            job_id: the job.
            node_id: where it runs, `driver_node_id` of its record; None: it never came to a node, Ray has a message.
            lines: only so many of the last lines; -1: all.

        Raises:
            ServerError: there is no such file.
        """
        if node_id is None:
            return str(self.read(f"/api/jobs/{job_id}/logs").get("logs", "")).encode()
        return self._log_file(node_id, _log_name(job_id), lines)

    def follow_log(self, job_id: str, node_id: str) -> Iterator[bytes]:
        """A job's log from its first byte on, as it grows; ends when the connection does."""
        query: dict[str, Any] = {"node_id": node_id, "filename": _log_name(job_id), "lines": -1, "interval": 0.5}
        with self.call("GET", "/api/v0/logs/stream", params=query, stream=True, timeout=(TIMEOUT_S, None)) as answer:
            yield from answer.iter_content(chunk_size=None)

    def result(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """The result that entry.py wrote for a job, or None if it could not write one."""
        if not job.get("driver_node_id"):
            return None
        try:
            # entry.py writes it under this name into the folder of the job's log.
            record = json.loads(self._log_file(job["driver_node_id"], f"job-result-{job['submission_id']}.json"))
        except (ServerError, json.JSONDecodeError):
            return None
        return record if isinstance(record, dict) else None

    def _log_file(self, node_id: str, name: str, lines: int = -1) -> bytes:
        query: dict[str, Any] = {"node_id": node_id, "filename": name, "lines": lines}
        return self.call("GET", "/api/v0/logs/file", params=query).content


def _log_name(job_id: str) -> str:
    """What Ray calls the file with a job's output."""
    return f"job-driver-{job_id}.log"


def token_path() -> Path:
    """The token file: RAY_AUTH_TOKEN_PATH, else Ray's default ~/.ray/auth_token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def read_token() -> str | None:
    """The token, looked for as Ray does: RAY_AUTH_TOKEN, then the file; None if there is none.

    Raises:
        ClusterError: the file is there and cannot be read, or is empty.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = token_path()
    try:
        token = path.read_text().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ClusterError(f"token file {path}: {error.strerror}; it must be a file that you can read") from error
    if not token:
        raise ClusterError(f"token file {path} is empty; delete it, and `python -m cluster up --local` makes a new one")
    return token


def mode_too_wide(path: Path) -> int | None:
    """The permission bits of `path` if group or others may touch it, else None."""
    mode = stat.S_IMODE(path.stat().st_mode)
    return mode if mode & 0o077 else None


def ensure_token() -> tuple[Path, str]:
    """Make sure that there is a token which only its owner can read.

    Returns:
        The token file, and what was done in words ("" if nothing).

    Raises:
        ClusterError: the file cannot be made or read.
    """
    path = token_path()
    if os.environ.get("RAY_AUTH_TOKEN"):
        return path, ""
    try:
        if read_token() is None:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)  # private from its first byte on
            with os.fdopen(descriptor, "w") as stream:
                stream.write(secrets.token_hex(32))
            return path, "made a new token"
        if mode_too_wide(path) is not None:
            path.chmod(0o600)  # Ray itself writes it 0644 under the usual umask
            return path, "made the token file readable for you only"
    except OSError as error:
        raise ClusterError(f"token file {path}: {error.strerror or error}") from error
    return path, ""
