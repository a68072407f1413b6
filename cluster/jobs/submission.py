"""Sends a command as a Ray job, follows its log to the end, and learns its true exit code.

The log follower is our own. Ray's (`JobSubmissionClient.tail_job_logs`) is a websocket of text: it ends for good when a
proxy cuts it, and a log with a byte that is no UTF-8 is not shown, without a word (Ray 2.60).
"""

import contextlib
import itertools
import json
import logging
import os
import secrets
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import requests

from cluster.errors import ClusterError, last_line
from cluster.jobs.client import TERMINAL, Client, ServerError, Unreachable, is_loopback
from cluster.jobs.progress import BarStream

POLL_S = 0.5
LOST_CONTACT_S = 120.0
EXIT_LOST = 70  # the job ended without telling how: its node died, or it was killed together with its wrapper
ROOT = Path(__file__).resolve().parents[2]
PATH_OPTIONS = ("--output", "--input", "--data", "--run", "--json", "--html")  # the last two are also flags


@dataclass(frozen=True)
class JobRequest:
    """A command to run on a cluster.

    Attributes:
        command: program and arguments; `python` is the interpreter of the node that runs it.
        job_id: unique in the life of the cluster.
        environment: variables for the command and its Ray workers.
        python: the interpreter on the cluster that starts the wrapper.
        working_dir: the folder that is sent, less what .rayignore and .gitignore name.
    """

    command: tuple[str, ...]
    job_id: str
    environment: dict[str, str] = field(default_factory=dict)
    python: str = "python"
    working_dir: Path = ROOT

    @property
    def entrypoint(self) -> str:
        """The shell command of the job. `exec`, so that signals and the exit code meet no shell in between."""
        return f"exec {self.python} -m cluster.jobs.entry -- {shlex.join(self.command)}"

    def ray_command(self, address: str) -> str:
        """The equal `ray job submit` command."""
        words = ["ray", "job", "submit", "--address", address, "--submission-id", self.job_id]
        words += ["--working-dir", os.path.relpath(self.working_dir)]
        if self.environment:
            words += ["--runtime-env-json", json.dumps({"env_vars": self.environment})]
        return f"RAY_AUTH_MODE=token {shlex.join(words)} -- {self.entrypoint}"


def new_job_id(command: Sequence[str]) -> str:
    """A unique id that says what the job does and when it was sent, such as prepare-20261122-103000-1f3a."""
    return f"{stage_of(command)}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def stage_of(command: Sequence[str]) -> str:
    """What a command does in one word: prepare for `python -m pipeline prepare ...`, job if it does not show."""
    for package, word in itertools.pairwise(command):
        if package in ("pipeline", "trainer") and word.isidentifier():
            return word
    first = Path(command[0]).name if command else ""
    return first if first.isidentifier() and not first.startswith("python") else "job"


def absolute_paths(command: Sequence[str], address: str) -> tuple[str, ...]:
    """The command with absolute values of --output, --input, --data, --run, --json and --html.

    A job runs in a copy of the working tree that Ray deletes: a result written to a relative path would be lost. On a
    cluster of this machine such a path means the same as without a cluster; elsewhere it is refused.

    Raises:
        ClusterError: a relative path, and the cluster is on other machines.
    """
    words = list(command)
    for position, word in enumerate(words):
        option, _, inline = word.partition("=")
        if option not in PATH_OPTIONS or (not inline and position + 1 >= len(words)):
            continue
        value = inline or words[position + 1]
        if value.startswith("-") or "://" in value or Path(value).is_absolute():
            continue
        if not is_loopback(address):
            raise ClusterError(f"{option} {value}: give an absolute path or URL that every node of {address} can reach")
        words[position if inline else position + 1] = (f"{option}=" if inline else "") + str(Path(value).resolve())
    return tuple(words)


def submit(client: Client, request: JobRequest) -> None:
    """Send the working tree and start the job.

    Raises:
        ClusterError: the tree is too large, the id was used before, or the cluster refuses.
    """
    runtime_env: dict[str, Any] = {"working_dir": str(request.working_dir)}
    if request.environment:
        runtime_env["env_vars"] = request.environment
    with _only_to(client.address):
        from ray.job_submission import JobSubmissionClient  # half a second to import: only here

        for name in ("ray", JobSubmissionClient.__module__, "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            sender = JobSubmissionClient(client.address, headers=dict(client.headers))
            sender.submit_job(entrypoint=request.entrypoint, submission_id=request.job_id, runtime_env=runtime_env)
        except (RuntimeError, ValueError, OSError, requests.RequestException) as error:
            raise ClusterError(_why_refused(request, error)) from error


@contextlib.contextmanager
def _only_to(address: str) -> Iterator[None]:
    """Let Ray's client send tree, job and token to this address only, and the same way as ours (client.py).

    Ray's client prefers RAY_API_SERVER_ADDRESS, then RAY_ADDRESS, to the address that it is given, goes through proxies
    and takes passwords from ~/.netrc. RAY_AUTH_MODE lets it send the token; whether one is asked for is the cluster's
    decision.
    """
    names = {"RAY_API_SERVER_ADDRESS": address, "RAY_AUTH_MODE": "token", "NETRC": os.devnull}
    names |= {"no_proxy": "*", "NO_PROXY": "*"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _why_refused(request: JobRequest, error: Exception) -> str:
    text = str(error)
    if "already exists" in text:
        return f"job id {request.job_id!r} was used before on this cluster; choose another with --id"
    if "exceeds the maximum size" in text or "is too large" in text:
        return f"{request.working_dir} is larger than Ray's 512 MiB; name what a job does not need in .rayignore"
    return f"the cluster refused the job: {last_line(text, type(error).__name__)}"


@dataclass(frozen=True)
class Ending:
    """How a job ended.

    Attributes:
        outcome: succeeded, failed, killed, stopped or lost.
        exit_code: the command's own, 128 + N after signal N, 70 if nobody knows.
        note: the rest in words.
    """

    outcome: str
    exit_code: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.outcome}{' ' + self.note if self.note else ''}: exit code {self.exit_code}"


def ending(client: Client, job: dict[str, Any]) -> Ending:
    """How a job in a terminal state ended: from its own result file, else from what Ray knows."""
    if record := client.result(job):
        note = f"by {record['signal']}" if record.get("signal") else record.get("error") or ""
        return Ending(str(record["outcome"]), int(record["exit_code"]), note)
    if job["status"] == "STOPPED":
        return Ending("stopped", 137, "by force: it did not end in time after SIGTERM")
    code = job.get("driver_exit_code")
    if code is not None and (code < 0 or code > 128):
        return Ending("killed", 128 - code if code < 0 else code, "together with its wrapper")
    message = (job.get("message") or "").strip() or "no reason given"
    return Ending("failed" if code else "lost", code or EXIT_LOST, message.splitlines()[0][:300])


class LogFollower:
    """Copies a job's log to a stream while the job runs, and attaches again whenever the connection ends.

    Following can end early (a proxy, a restart of the dashboard), so the number of bytes shown is counted and the rest
    is fetched once the job is over.
    """

    def __init__(self, client: Client, job_id: str, stream: BinaryIO | BarStream) -> None:
        self._client, self._job_id, self._stream = client, job_id, stream
        self._shown = 0  # bytes
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.first_byte_at: float | None = None

    def start(self, node_id: str) -> None:
        """Follow in the background."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, args=(node_id,), daemon=True)
            self._thread.start()

    def finish(self, node_id: str | None) -> None:
        """Show what has not been shown yet; the job must be over."""
        self._over.set()
        with contextlib.suppress(ServerError):
            whole = self._client.log(self._job_id, node_id)
            with self._lock:
                self._show(whole, 0)

    def _follow(self, node_id: str) -> None:
        while not self._over.is_set():
            seen = 0
            try:
                for chunk in self._client.follow_log(self._job_id, node_id):
                    with self._lock:
                        if self._over.is_set():
                            return
                        self._show(chunk, seen)
                    seen += len(chunk)
            except (ClusterError, requests.RequestException):
                pass  # attach again; that the cluster is gone is for the status poll to notice
            self._over.wait(POLL_S)

    def _show(self, chunk: bytes, offset: int) -> None:
        """Write the part of `chunk`, which begins at byte `offset` of the log, that has not been shown."""
        new = chunk[max(0, self._shown - offset) :]
        if not new:
            return
        self.first_byte_at = self.first_byte_at or time.time()
        self._shown += len(new)
        self._stream.write(new)
        self._stream.flush()


def wait(client: Client, job_id: str, stream: BinaryIO | BarStream | None) -> tuple[dict[str, Any], LogFollower | None]:
    """Poll a job until it is over, showing its log on the way.

    Args:
        client: the cluster.
        job_id: the job.
        stream: where the log goes; None to show nothing.

    Returns:
        The job's record, and what showed its log.

    Raises:
        ClusterError: the cluster does not answer for two minutes, or there is no such job.
    """
    follower = LogFollower(client, job_id, stream) if stream else None
    last_answer = time.monotonic()
    while True:
        try:
            job = client.job(job_id)
            last_answer = time.monotonic()
        except (Unreachable, ServerError) as error:
            if time.monotonic() - last_answer > LOST_CONTACT_S:
                raise ClusterError(f"lost contact with the cluster while waiting for {job_id}: {error}") from error
            time.sleep(POLL_S)
            continue
        if follower and job.get("driver_node_id"):
            follower.start(job["driver_node_id"])
        if job["status"] in TERMINAL:
            if follower:
                follower.finish(job.get("driver_node_id"))
            return job, follower
        time.sleep(POLL_S)
