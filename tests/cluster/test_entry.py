"""The entry wrapper: the true exit code, killed told apart from failed and stopped."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.jobs.entry import child_environment

ROOT = Path(__file__).resolve().parents[2]


def start(log_folder: Path, *command: str) -> subprocess.Popen:
    """Run the wrapper as Ray does: the job's id in the environment, its output in the job's log file."""
    settings = {"metadata": {"job_submission_id": "job-1"}}
    environment = {**os.environ, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(settings)}
    with (log_folder / "job-driver-job-1.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.jobs.entry", "--", *command],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def result(log_folder: Path) -> dict:
    return json.loads((log_folder / "job-result-job-1.json").read_text())


@pytest.mark.parametrize(
    ("code", "status", "outcome"),
    [
        ("pass", 0, "succeeded"),
        ("import sys; sys.exit(7)", 7, "failed"),
        ("import os; os.kill(os.getpid(), 9)", 137, "killed"),
    ],
)
def test_exit_code_and_outcome(tmp_path, code, status, outcome):
    assert start(tmp_path, "python", "-c", code).wait(60) == status
    record = result(tmp_path)
    assert (record["exit_code"], record["outcome"]) == (status, outcome)
    assert record["signal"] == ("SIGKILL" if outcome == "killed" else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job-driver-job-1.log", "job-result-job-1.json"]


def test_python_is_the_interpreter_of_the_wrapper(tmp_path):
    start(tmp_path, "python", "-c", "import sys; print(sys.executable)").wait(60)
    assert sys.executable in (tmp_path / "job-driver-job-1.log").read_text()


def test_unknown_program_is_one_line(tmp_path):
    assert start(tmp_path, "no-such-program").wait(60) == 127
    assert (tmp_path / "job-driver-job-1.log").read_text().splitlines() == [
        "error: cannot start 'no-such-program': No such file or directory"
    ]


@pytest.mark.parametrize(("handler", "status"), [("lambda *_: sys.exit(3)", 3), ("signal.SIG_DFL", 143)])
def test_stopped_keeps_the_code_of_the_command(tmp_path, handler, status):
    flag = tmp_path / "ready"
    code = "import pathlib, signal, sys, time\n"
    code += f"signal.signal(signal.SIGTERM, {handler})\npathlib.Path({str(flag)!r}).touch()\ntime.sleep(600)"
    process = start(tmp_path, sys.executable, "-c", code)
    deadline = time.monotonic() + 60
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):  # Ray signals every process of the job
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    assert process.wait(60) == status
    assert result(tmp_path)["outcome"] == "stopped"


def test_thread_limit_of_ray_is_lifted_unless_the_submitter_set_it(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert "OMP_NUM_THREADS" not in child_environment()
    settings = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(settings))
    assert child_environment()["OMP_NUM_THREADS"] == "1"
