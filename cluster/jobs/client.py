"""The HTTP interface of a Ray cluster (jobs, nodes, packages, log files); every request goes through `Client.call`.

Ray's own JobSubmissionClient is not used, because

- it prefers RAY_API_SERVER_ADDRESS, then RAY_ADDRESS, to the address that it is given,
- its requests obey proxies, ~/.netrc and redirects, so that tree, job and token may reach another machine than the one
  that was named, and they have no time limit,
- it has logs as text only: the server answers 500 if a job has written a byte that is no UTF-8,
- it knows neither nodes nor log files, and a job's true exit code is in a file beside its log (entry.py),
- importing it takes 0.45 s of processor time; all of `python -m cluster status` takes 0.13 s (2 cores, Ray 2.60).
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import requests

from cluster.errors import ClusterError, last_line
from cluster.jobs.auth_token import find_token, token_path
from twotower.listeners import Address, addresses_here, stranger_at
from twotower.verbosity import log
from twotower.words import one_line

TIMEOUT_S = 20.0
MOST_CONNECTIONS = 64  # kept open; the table of jobs asks many nodes side by side
SEND_TIMEOUT_S = 300.0  # the server stores up to 512 MiB before it answers
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
REASONS = ("msg", "message", "error", "detail")  # where answers in JSON have theirs
ASKS_FOR_TOKEN = "Unauthorized: Missing authentication token"  # Ray's words, and no other program's (Ray 2.60)


class ServerError(ClusterError):
    """The cluster answered with an error; `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Unreachable(ClusterError):
    """Nothing answers at the address."""


def plain_session() -> requests.Session:
    """Requests that go to their address and nowhere else, whatever proxies, ~/.netrc and redirects say.

    Raises:
        ClusterError: REQUESTS_CA_BUNDLE, which is heeded, names no file.
    """
    session = requests.Session()
    session.trust_env = False
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=MOST_CONNECTIONS))
    if bundle := os.environ.get("REQUESTS_CA_BUNDLE"):
        if not Path(bundle).exists():
            raise ClusterError(f"REQUESTS_CA_BUNDLE is {bundle!r}: expected a file of certificates; unset or mend it")
        session.verify = bundle
    return session


class Client:
    """Calls to one cluster. Every failure is one line.

    The token goes to a server only once it has refused a request without it in Ray's own words, and on this machine
    only to a program of this user or of root.

    Args:
        address: the dashboard, see `addresses.dashboard_address`.
        token_file: of a cluster that has a token of its own; None: see `auth_token.find_token`.
    """

    def __init__(self, address: str, token_file: Path | None = None) -> None:
        self.address = address
        self._session = plain_session()
        self._token = find_token(token_file)
        self.asks_for_token = False
        self._here: set[Address] | None = None  # the address's own, if it is this machine's

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        """One HTTP call.

        Raises:
            Unreachable: no answer.
            ClusterError: the token is missing or wrong, or it is not Ray that asks for it; or the answer sends on to
                another address.
            ServerError: the server reports another error.
        """
        answer = self._request(method, path, **options)
        if answer.status_code == 401 and not self.asks_for_token:
            self._check_who_asks(answer)
            self.asks_for_token = True
            if self._token:
                answer.close()
                answer = self._request(method, path, **options)
        if answer.status_code >= 300:
            raise self._refusal(answer, path)
        return answer

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        """A request, with the token if it was asked for since the last connection; nothing is followed or retried."""
        headers = {}
        if self._token and self.asks_for_token:
            self._check_port()
            headers["Authorization"] = f"Bearer {self._token.text}"
        options.setdefault("timeout", TIMEOUT_S)
        try:
            answer = self._session.request(
                method, self.address + path, allow_redirects=False, headers=headers, **options
            )
        except requests.RequestException as error:
            self.asks_for_token = False  # who answers next may be somebody else
            raise Unreachable(f"no Ray cluster at {self.address} ({_why_silent(error)}") from error
        log.debug("%s %s: %d", method, answer.url, answer.status_code)
        return answer

    def _check_port(self) -> None:
        """Refuse to send the token to another user's program on this machine."""
        url = urlsplit(self.address)
        if self._here is None:
            self._here = addresses_here(url.hostname or "")
        stranger = stranger_at(self._here, url.port or (443 if url.scheme == "https" else 80))
        if stranger is not None:
            raise ClusterError(
                f"{self.address} belongs to another user of this machine (uid {stranger}): the token was not sent; "
                "give the address of your own cluster or tunnel with --address"
            )

    def _check_who_asks(self, answer: requests.Response) -> None:
        if answer.text.strip() != ASKS_FOR_TOKEN:
            raise ClusterError(
                f"{self.address} asks for a password, and not as Ray does (another program answers there): the token "
                "was not sent; mind the port"
            )

    def _refusal(self, answer: requests.Response, path: str) -> ClusterError:
        """What an answer that is none says, and what to do."""
        if answer.is_redirect:
            target = one_line(answer.headers.get("Location", ""))
            fix = "if that is the cluster, give its address with --address: the token goes nowhere unasked"
            return ClusterError(f"{self.address} sends requests on to {target}; {fix}")
        if answer.status_code == 401 and not self._token:
            fix = "copy the cluster's token file there (mode 0600), or set RAY_AUTH_TOKEN_PATH"
            return ClusterError(f"{self.address} asks for a token and there is none in {token_path()}; {fix}")
        if answer.status_code in (401, 403):
            place = self._token.place if self._token else token_path()
            fix = "it belongs to another cluster: copy the right one"
            return ClusterError(f"{self.address} refuses the token in {place}; {fix}")
        said = f"HTTP {answer.status_code}: {reason(answer)}"
        return ServerError(answer.status_code, f"{self.address}{path}: {said}")

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
        try:
            return list(self.read("/nodes", params={"view": "summary"})["data"]["summary"])
        except (KeyError, TypeError):
            raise self._no_ray() from None

    def jobs(self) -> list[dict[str, Any]]:
        """All submitted jobs, the newest first."""
        record = self.read("/api/jobs/")
        if not isinstance(record, list) or not all(isinstance(job, dict) for job in record):
            raise self._no_ray()
        jobs = [job for job in record if job.get("submission_id")]
        return sorted(jobs, key=lambda job: job.get("start_time") or 0, reverse=True)

    def job(self, job_id: str) -> dict[str, Any]:
        """One job's record as the Jobs API has it; its `submission_id` is the id, also where Ray's own was given.

        Raises:
            ClusterError: there is no such job, or it is a program that was not submitted.
        """
        unknown = ClusterError(f"no job {job_id!r} on {self.address}; see `python -m cluster status`")
        if job_id.strip(".") == "":  # a URL would be shortened by it
            raise unknown
        try:
            record = self.read(f"/api/jobs/{quote(job_id, safe='')}")
        except ServerError as error:
            if error.status == 404:
                raise unknown from None
            raise
        if not isinstance(record, dict):
            raise self._no_ray()
        if not record.get("submission_id"):
            raise ClusterError(
                f"job {job_id!r} was not submitted, its program called ray.init by itself: no log, no stop"
            )
        return dict(record)

    def stop(self, job_id: str) -> None:
        """Ask a job to end: SIGTERM now, SIGKILL after the cluster's RAY_JOB_STOP_WAIT_TIME_S."""
        self.call("POST", f"/api/jobs/{quote(job_id, safe='')}/stop")

    def has_package(self, name: str) -> bool:
        """Whether the cluster has a package of files, such as a working tree, already."""
        try:
            self.call("GET", f"/api/packages/{name}")
        except ServerError as error:
            if error.status == 404:
                return False
            raise
        return True

    def send_package(self, name: str, content: bytes) -> None:
        """Store a package of files."""
        self.call("PUT", f"/api/packages/{name}", data=content, timeout=SEND_TIMEOUT_S)

    def start_job(self, job: dict[str, Any]) -> None:
        """Start a job; `job` has the fields of Ray's JobSubmitRequest."""
        self.call("POST", "/api/jobs/", json=job, timeout=SEND_TIMEOUT_S)

    def log(self, job_id: str, node_id: str | None, lines: int = -1, timeout_s: float | None = None) -> bytes:
        """What a job has written so far, byte for byte.

        Args:
            job_id: the job.
            node_id: where it runs, `driver_node_id` of its record; None: it never came to a node, Ray has a message.
            lines: only so many of the last lines; -1: all.
            timeout_s: that the node has for an answer; None: as any call.

        Raises:
            ServerError: there is no such file.
        """
        if node_id is None:
            return str(self.read(f"/api/jobs/{quote(job_id, safe='')}/logs").get("logs", "")).encode()
        return self._log_file(node_id, _log_name(job_id), lines, timeout_s)

    def follow_log(self, job_id: str, node_id: str) -> Iterator[bytes]:
        """A job's log from its first byte on, as it grows; ends when the connection does."""
        query: dict[str, Any] = {"node_id": node_id, "filename": _log_name(job_id), "lines": -1, "interval": 0.5}
        with self.call("GET", "/api/v0/logs/stream", params=query, stream=True, timeout=(TIMEOUT_S, None)) as answer:
            yield from answer.iter_content(chunk_size=None)

    def result(self, job: dict[str, Any], timeout_s: float | None = None) -> dict[str, Any] | None:
        """The result that entry.py wrote for a job, or None if it could not write one; `timeout_s` as in `log`."""
        if not job.get("driver_node_id"):
            return None
        try:
            # entry.py writes it under this name into the folder of the job's log.
            name = f"job-result-{job['submission_id']}.json"
            record = json.loads(self._log_file(job["driver_node_id"], name, timeout_s=timeout_s))
        except (ServerError, json.JSONDecodeError):
            return None
        return record if isinstance(record, dict) else None

    def _log_file(self, node_id: str, name: str, lines: int = -1, timeout_s: float | None = None) -> bytes:
        query: dict[str, Any] = {"node_id": node_id, "filename": name, "lines": lines}
        limit = {} if timeout_s is None else {"timeout": timeout_s}
        return self.call("GET", "/api/v0/logs/file", params=query, **limit).content


def _log_name(job_id: str) -> str:
    """What Ray calls the file with a job's output."""
    return f"job-driver-{job_id}.log"


def _why_silent(error: requests.RequestException) -> str:
    """Why a request got no answer, the bracket after it, and what to do."""
    if isinstance(error, requests.exceptions.SSLError):
        fix = "REQUESTS_CA_BUNDLE=FILE names the certificates to trust; http:// is spoken where there is no TLS"
        return f"its TLS certificate is not accepted, or it speaks none); {fix}"
    why = "no answer in time" if isinstance(error, requests.Timeout) else "nothing answers there"
    return f"{why}); start one with `python -m cluster up --local`, or give --address"


def reason(answer: requests.Response) -> str:
    """Why a server refused, in one line: from its JSON, its page, or the last line of its traceback."""
    try:
        record = answer.json()
    except ValueError:
        record = None
    if isinstance(record, dict):
        said = next((str(record[name]) for name in REASONS if record.get(name)), answer.text)
    elif "html" in answer.headers.get("Content-Type", ""):
        words = re.sub(r"<(script|style).*?</\1>|<[^>]*>", "\n", answer.text, flags=re.DOTALL | re.IGNORECASE)
        said = next((line for line in words.splitlines() if line.strip()), "")  # the title
    else:
        said = answer.text
    return one_line(last_line(said, answer.reason or "no reason given"))
