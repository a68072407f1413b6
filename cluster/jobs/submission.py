"""Sends a command as a Ray job, follows its log to the end, and learns its true exit code.

The log follower is our own. Ray's (`JobSubmissionClient.tail_job_logs`) is a websocket of text: it ends for good when a
proxy cuts it, and a log with a byte that is no UTF-8 is not shown, without a word (Ray 2.60).
"""

import contextlib
import itertools
import json
import os
import re
import secrets
import shlex
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import requests

from cluster.errors import ClusterError, last_line
from cluster.jobs import job_secrets
from cluster.jobs.client import TERMINAL, Client, ServerError, Unreachable
from cluster.jobs.entry import shell_code
from cluster.jobs.progress import BarStream
from cluster.jobs.tree import Tree, pack
from twotower.words import one_line

POLL_S = 0.5
WRAPPER = "-m cluster.jobs.entry"
LOST_CONTACT_S = 120.0
CATCH_UP_S = 5.0  # that the end of a followed log may take to come, before all of it is fetched
EXIT_LOST = 70  # the job ended without telling how: its node died, or it was killed together with its wrapper


@dataclass(frozen=True)
class JobRequest:
    """A command to run on a cluster.

    Attributes:
        command: program and arguments; `python` is the interpreter of the node that runs it.
        job_id: unique in the life of the cluster.
        tree: the files that the job gets.
        environment: variables for the command and its Ray workers; Ray shows them to all who use the cluster.
        python: the interpreter on the cluster that starts the wrapper.
        secrets: variables that Ray does not show, see job_secrets.py.
    """

    command: tuple[str, ...]
    job_id: str
    tree: Tree
    environment: dict[str, str] = field(default_factory=dict)
    python: str = "python"
    secrets: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def entrypoint(self) -> str:
        """The shell command of the job. `exec`, so that signals and the exit code meet no shell in between."""
        return f"exec {shlex.quote(self.python)} {WRAPPER} -- {shlex.join(self.command)}"

    def ray_command(self, address: str) -> str:
        """The equal `ray job submit` command."""
        words = ["ray", "job", "submit", "--address", address, "--submission-id", self.job_id]
        words += ["--working-dir", os.path.relpath(self.tree.folder)]
        if self.environment:
            words += ["--runtime-env-json", json.dumps({"env_vars": self.environment})]
        return f"RAY_AUTH_MODE=token {shlex.join(words)} -- {self.entrypoint}"


def new_job_id(command: Sequence[str]) -> str:
    """A unique id that says what the job does and when it was sent, such as prepare-20261122-103000-1f3a."""
    return f"{stage_of(command)[:40]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def stage_of(command: Sequence[str]) -> str:
    """What a command does in one word: prepare for `python -m pipeline prepare ...`, job if it does not show."""
    for package, word in itertools.pairwise(command):
        if package in ("pipeline", "trainer") and _is_word(word):
            return word
    first = Path(command[0]).name if command else ""
    return first if _is_word(first) and not first.startswith("python") else "job"


def _is_word(text: str) -> bool:
    return text.isascii() and text.isidentifier() and text[0] != "_"


def check_job_id(job_id: str) -> None:
    """Refuse an id that cannot be a part of a file's name and of a URL.

    Raises:
        ClusterError: naming what may stand in one.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", job_id):
        raise ClusterError(
            f"--id {job_id!r}: expected up to 100 letters, digits, '.', '_' and '-', first a letter or digit"
        )


def submit(client: Client, request: JobRequest) -> None:
    """Send the working tree and start the job.

    Raises:
        ClusterError: the tree cannot be packed or is too large, the id was used before, or the cluster refuses.
    """
    try:
        runtime_env: dict[str, Any] = {"working_dir": _send_tree(client, request.tree)}
        variables = dict(request.environment)
        if request.secrets:
            variables |= _send_secrets(client, request.secrets)
            runtime_env["worker_process_setup_hook"] = job_secrets.HOOK
        if variables:
            runtime_env["env_vars"] = variables
        job = {"entrypoint": request.entrypoint, "submission_id": request.job_id, "runtime_env": runtime_env}
        client.start_job(job)
    except ServerError as error:
        raise ClusterError(_why_refused(request, error)) from error
    except (ValueError, OSError) as error:
        raise ClusterError(f"{request.tree.folder} cannot be packed: {last_line(str(error))}") from error


def _send_tree(client: Client, tree: Tree) -> str:
    """Store the files on the cluster; their name there, which is a hash of their content."""
    name, content = pack(tree)
    if not client.has_package(f"gcs/{name}"):
        client.send_package(f"gcs/{name}", content)
    return f"gcs://{name}"


def _send_secrets(client: Client, found: dict[str, str]) -> dict[str, str]:
    """Store one half of the secrets; the variable with the other.

    Raises:
        ClusterError: the cluster answers everyone, so it would hand them out.
    """
    if not client.asks_for_token:
        raise ClusterError(f"--secret: {client.address} asks nobody for a token; start it with RAY_AUTH_MODE=token")
    key, stored, value = job_secrets.split(found)
    client.send_package(f"gcs/{key}", stored)
    return {job_secrets.VARIABLE: value}


def _why_refused(request: JobRequest, error: ServerError) -> str:
    text = str(error)
    if "submission_id" in text and "already exists" in text:
        return f"job id {request.job_id!r} was used before on this cluster; choose another with --id"
    if error.status == 413 or "exceeds the maximum size" in text or "is too large" in text:
        return f"{request.tree.folder} is larger than Ray's 512 MiB; name what a job does not need in .rayignore"
    return f"the cluster refused the job: {text}"


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
    """How a job in a terminal state ended; asks for its result file."""
    return ending_of(job, client.result(job))


def ending_of(job: dict[str, Any], record: dict[str, Any] | None) -> Ending:
    """How a job in a terminal state ended.

    Args:
        job: its record as the Jobs API has it.
        record: its own result file; None (plain `ray job submit`, for example): as Ray knows it.
    """
    if record:
        note = f"by {record['signal']}" if record.get("signal") else record.get("error") or ""
        return Ending(str(record["outcome"]), int(record["exit_code"]), note)
    ours = WRAPPER in job["entrypoint"]
    code = job.get("driver_exit_code")
    if job["status"] == "SUCCEEDED":
        return Ending("succeeded", 0)
    if job["status"] == "STOPPED":
        return Ending("stopped", 137, "by force: it did not end in time after SIGTERM" if ours else "by Ray")
    if code is not None and (code < 0 or code > 128):
        return Ending("killed", shell_code(code), "together with its wrapper" if ours else "")
    if code and not ours:  # Ray's message says no more, and repeats the log
        return Ending("failed", code)
    message = (job.get("message") or "").strip() or "no reason given"
    never_began = message.startswith("runtime_env setup failed")
    outcome = "failed" if code or never_began else "lost"
    return Ending(outcome, code or EXIT_LOST, one_line(message.splitlines()[0][:300]))


def command_line(job: dict[str, Any]) -> str:
    """What a job runs, without our wrapper."""
    before, found, after = job["entrypoint"].partition(f"{WRAPPER} -- ")
    return one_line(after if found else before)


class LogFollower:
    """Copies a job's log to a stream while the job runs, and attaches again whenever the connection ends.

    Following can end early (a proxy, a restart of the dashboard), so the number of bytes shown is counted. A job's
    result says how long its log is: where all of that was shown, nothing is fetched a second time. `unread` is the
    error of a stream that takes no more: its reader is gone, its disk is full.
    """

    def __init__(self, client: Client, job_id: str, stream: BinaryIO | BarStream) -> None:
        self._client, self._job_id, self._stream = client, job_id, stream
        self._shown = 0  # bytes
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.first_byte_at: float | None = None
        self.unread: OSError | None = None

    @property
    def follows(self) -> bool:
        """Whether it was started: whether the job was met before its end."""
        return self._thread is not None

    def start(self, node_id: str) -> None:
        """Follow in the background."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, args=(node_id,), daemon=True)
            self._thread.start()

    def finish(self, node_id: str | None, size_bytes: int | None = None) -> None:
        """Show what has not been shown yet; the job must be over.

        Args:
            node_id: where it ran.
            size_bytes: of the whole log, if that is known.
        """
        if self._thread and size_bytes is not None:
            deadline = time.monotonic() + CATCH_UP_S
            while self._shown < size_bytes and not self.unread and time.monotonic() < deadline:
                self._over.wait(POLL_S / 10)
        self._over.set()
        with self._lock:  # what was shown is then written too
            if size_bytes is not None and self._shown >= size_bytes:
                return
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
        if not new or self.unread:
            return
        self.first_byte_at = self.first_byte_at or time.time()
        self._shown += len(new)
        try:
            self._stream.write(new)
            self._stream.flush()
        except OSError as error:
            self.unread = error
            self._over.set()


def _log_bytes(client: Client, job: dict[str, Any]) -> int | None:
    """How long the log of a job is that is over, as its result says; None where that is not known."""
    size = (client.result(job) or {}).get("log_bytes")
    return size if isinstance(size, int) else None


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
        OSError: the stream takes no more.
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
        over, node = job["status"] in TERMINAL, job.get("driver_node_id")
        if follower and node and not over:
            follower.start(node)
        if follower and over:
            follower.finish(node, _log_bytes(client, job) if follower.follows else None)
        if follower and follower.unread:
            raise follower.unread
        if over:
            return job, follower
        time.sleep(POLL_S)
