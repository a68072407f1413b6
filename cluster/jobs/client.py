"""A small client of the cluster's HTTP interface (Ray Jobs and log files), with one clear line for every failure.

Plain HTTP instead of Ray's own client: it starts in a tenth of the time, has a deadline on every call, and the same
code reads job status, logs and our result files (which lie beside the job's log on the node that ran it).
"""

import json
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

import requests

from cluster.auth import read_token, token_path
from cluster.errors import ClusterError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TIMEOUT_S = 20.0
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")


def dashboard_address(address: str | None) -> str:
    """The dashboard's URL from --address, else RAY_API_SERVER_ADDRESS, else this machine's port 8265.

    Raises:
        ClusterError: the address is not of the form http(s)://HOST:PORT or HOST:PORT.
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
    """Calls to one cluster.

    Args:
        address: dashboard, http(s)://HOST:PORT, see `dashboard_address`.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy between us and a loopback address never helps
        self.headers: dict[str, str] = {}
        if token := read_token():
            self.headers["Authorization"] = f"Bearer {token}"
        self._session.headers.update(self.headers)

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        """One HTTP call.

        Raises:
            ClusterError: no answer, the token is missing or wrong, or the server reports an error.
        """
        options.setdefault("timeout", TIMEOUT_S)
        try:
            answer = self._session.request(method, self.address + path, **options)
        except requests.RequestException as error:
            raise Unreachable(self._no_answer(error)) from error
        if answer.status_code in (401, 403):
            raise ClusterError(self._refused(answer.status_code))
        if answer.status_code >= 400:
            raise ServerError(answer.status_code, f"{self.address}{path}: {_last_line(answer.text)}")
        return answer

    def _no_answer(self, error: Exception) -> str:
        why = "no answer in time" if isinstance(error, requests.Timeout) else "nothing answers there"
        fix = "start one with `python -m cluster up --local`, or give --address"
        return f"no Ray cluster at {self.address} ({why}); {fix}"

    def _refused(self, status: int) -> str:
        if status == 401:
            return (
                f"{self.address} asks for a token and there is none in {token_path()}; copy the cluster's token file "
                "there (mode 0600), or set RAY_AUTH_TOKEN_PATH"
            )
        return f"{self.address} refuses the token in {token_path()}; it belongs to another cluster: copy the right one"

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

    def log(self, job_id: str) -> bytes:
        """All that a job has written so far."""
        return str(self.read(f"/api/jobs/{job_id}/logs").get("logs", "")).encode()

    def log_file(self, node_id: str, name: str, lines: int = -1) -> bytes:
        """A file of a node's log folder, whole (-1) or its last lines.

        Raises:
            ServerError: there is no such file.
        """
        query: dict[str, str | int] = {"node_id": node_id, "filename": name, "lines": lines}
        return self.call("GET", "/api/v0/logs/file", params=query).content

    def follow_log_file(self, node_id: str, name: str) -> Iterator[bytes]:
        """A file of a node's log folder from its first byte on, as it grows; ends when the connection does."""
        query: dict[str, str | int | float] = {"node_id": node_id, "filename": name, "lines": -1, "interval": 0.5}
        with self.call("GET", "/api/v0/logs/stream", params=query, stream=True, timeout=(TIMEOUT_S, None)) as answer:
            yield from answer.iter_content(chunk_size=None)

    def result(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """The result that cluster/jobs/entry.py wrote for a job, or None if it could not write one."""
        if not job.get("driver_node_id"):
            return None
        try:
            record = json.loads(self.log_file(job["driver_node_id"], result_name(job["submission_id"])))
        except (ServerError, json.JSONDecodeError):
            return None
        return record if isinstance(record, dict) else None

    def nodes(self) -> list[dict[str, Any]]:
        """The summary of every node that the cluster has or had."""
        return list(self.read("/nodes", params={"view": "summary"})["data"]["summary"])


class ServerError(ClusterError):
    """The cluster answered with an error; `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Unreachable(ClusterError):
    """Nothing answers at the address."""


def result_name(job_id: str) -> str:
    """The name of a job's result file in the log folder of the node that ran it, as in cluster/jobs/entry.py."""
    return f"job-result-{job_id}.json"


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"
