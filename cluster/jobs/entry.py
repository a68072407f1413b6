"""The entrypoint of a job: runs one command and records how it ended. `python -m cluster.jobs.entry -- COMMAND...`.

Ray tells a job's submitter only "failed" (`ray job submit` exits 1 whatever the code). So the true exit code, or the
signal that killed the command, goes to a small JSON file. It lies beside the job's log, where the dashboard serves it
to anyone with the token; no shared file system is needed. Standard library only: it starts in milliseconds.
"""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

CANNOT_START = 127  # as a shell


def command_of(words: Sequence[str]) -> list[str]:
    """The command in `[--] COMMAND...`; [] if there is none."""
    return list(words[1:] if words[:1] == ["--"] else words)


def program_of(command: Sequence[str]) -> list[str]:
    """The command as it is started: `python` stands for the interpreter that runs this."""
    return [sys.executable, *command[1:]] if command[0] in ("python", "python3") else list(command)


def shell_code(status: int) -> int:
    """A process's exit status as a shell has it: 128 + N after signal N."""
    return status if status >= 0 else 128 - status


def job_settings() -> dict[str, Any]:
    """What Ray told this job about itself (its id, its environment); empty outside a Ray job."""
    try:
        return dict(json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")))
    except ValueError:
        return {}


def result_path(job_id: str | None) -> Path | None:
    """The result file: TWOTOWER_RESULT, else beside the job's log, which is this process's output, else None."""
    if wanted := os.environ.get("TWOTOWER_RESULT"):
        return Path(wanted)
    try:
        log = Path("/proc/self/fd/1").readlink()
    except OSError:
        return None
    return log.parent / f"job-result-{job_id}.json" if job_id and log.name.startswith("job-driver-") else None


def log_bytes() -> int | None:
    """Size of the job's log, which is this process's output; None where that is no file.

    At the end of the command it tells who has followed the log whether all of it was seen.
    """
    try:
        about = os.fstat(1)
    except OSError:  # closed
        return None
    return about.st_size if stat.S_ISREG(about.st_mode) else None


def child_environment() -> dict[str, str]:
    """The command's environment: this one, without the thread limit that Ray sets for a job that reserves no CPU.

    Ray gives such a job OMP_NUM_THREADS=1, and PyTorch is then several times slower than in the same command without
    Ray. A value that the submitter asked for stays.
    """
    environment = dict(os.environ)
    wanted = job_settings().get("runtime_env", {}).get("env_vars", {})
    if environment.get("OMP_NUM_THREADS") == "1" and "OMP_NUM_THREADS" not in wanted:
        del environment["OMP_NUM_THREADS"]
    return environment


class Stopped:
    """Remembers that the job was asked to stop.

    In a Ray job the signal is not passed on: Ray sends it to every process of the job itself, and a command that gets
    it twice may take the second as "at once". Elsewhere (Slurm) SIGTERM comes to this process only and is passed on.
    """

    def __init__(self) -> None:
        self.asked = False
        self._pass_on = not job_settings()
        self._child: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._child and self._pass_on and number == signal.SIGTERM:
            self._child.terminate()

    def wait_for(self, child: "subprocess.Popen[bytes]") -> int:
        """The status of the command, which may have been asked to stop before it was known here."""
        self._child = child
        if self.asked and self._pass_on:
            child.terminate()
        return child.wait()


def run(command: list[str]) -> dict[str, Any]:
    """Run the command to its end.

    Args:
        command: program and arguments, see `program_of`.

    Returns:
        The record for the result file: outcome succeeded, failed, killed or stopped; exit_code as a shell has it
        (128 + N after signal N); signal by name or None; times in seconds since 1970.
    """
    stopped = Stopped()
    started = time.time()
    status, error = CANNOT_START, None
    try:
        if stopped.asked:
            status = -signal.SIGTERM
        else:
            status = stopped.wait_for(subprocess.Popen(program_of(command), env=child_environment()))
    except OSError as failure:
        error = f"cannot start {command[0]!r}: {failure.strerror}"
        print(f"error: {error}", file=sys.stderr, flush=True)
    ended = time.time()
    return {
        "submission_id": job_settings().get("metadata", {}).get("job_submission_id"),
        "command": command,
        "outcome": "stopped" if stopped.asked else _outcome(status),
        "exit_code": shell_code(status),
        "signal": signal.Signals(-status).name if status < 0 else None,
        "error": error,
        "started": started,
        "ended": ended,
        "elapsed_s": round(ended - started, 3),
        "host": socket.gethostname(),
        "python": sys.version.split()[0],
    }


def _outcome(status: int) -> str:
    if status == 0:
        return "succeeded"
    return "killed" if status < 0 else "failed"


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a small file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w") as stream:
        json.dump(record, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


def main(arguments: list[str]) -> int:
    """Run `-- COMMAND...` and return its exit code."""
    command = command_of(arguments)
    if not command:
        print("error: no command; expected: python -m cluster.jobs.entry -- COMMAND...", file=sys.stderr)
        return 2
    if wanted := os.environ.get("TWOTOWER_PID"):  # who wants to stop us from outside Ray signals this process
        with contextlib.suppress(OSError):  # a full disk must not keep the command from running
            Path(wanted).write_text(str(os.getpid()))
    with_secrets = "TWOTOWER_SECRETS" in os.environ  # see job_secrets.py
    if with_secrets:
        from cluster.jobs import job_secrets

        try:
            job_secrets.load()
        except Exception as error:  # of Ray's, of whatever class: the command must not run without them
            print(f"error: the job's secrets cannot be read ({type(error).__name__})", file=sys.stderr, flush=True)
            return 2
    record = run(command) | {"log_bytes": log_bytes()}
    if with_secrets:
        job_secrets.forget()
    if path := result_path(record["submission_id"]):
        try:
            write_json(path, record)
        except OSError as error:  # a full disk must not change the command's exit code
            print(f"warning: result file {path}: {error.strerror}", file=sys.stderr, flush=True)
    return int(record["exit_code"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
