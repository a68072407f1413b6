"""Jobs on a real Ray cluster of this machine, with token authentication; the CLI runs as its users run it."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from cluster import local

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Machine:
    """A running local cluster and the environment to reach it."""

    folder: Path
    cluster: local.LocalCluster
    environment: dict[str, str]

    def run(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "cluster", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=180,
            **options,
        )

    def status(self, job_id: str) -> dict:
        return json.loads(self.run("status", "--json", job_id).stdout)[0]


@pytest.fixture(scope="module")
def machine():
    folder = Path(tempfile.mkdtemp(prefix="tt-", dir="/tmp"))  # short: sockets lie below it
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_AUTH_TOKEN_PATH"] = str(folder / "token")
    options = ("--local", "--folder", str(folder / "c"), "--dashboard-port", "0", "--cpus", "2")
    try:
        subprocess.run([sys.executable, "-m", "cluster", "up", *options], cwd=ROOT, env=environment, check=True)
        cluster = local.load(folder / "c")
        environment["RAY_API_SERVER_ADDRESS"] = cluster.address
        yield Machine(folder, cluster, environment)
        subprocess.run([sys.executable, "-m", "cluster", "down", "--folder", str(folder / "c")], cwd=ROOT, check=True)
        assert local.load(folder / "c") is None
    finally:
        local.down(folder / "c")
        shutil.rmtree(folder, ignore_errors=True)


def test_token_file_is_private_and_the_dashboard_asks_for_it(machine):
    assert stat.S_IMODE((machine.folder / "token").stat().st_mode) == 0o600
    jobs = f"{machine.cluster.address}/api/jobs/"
    assert machine.cluster.address.startswith("http://127.0.0.1:")
    assert requests.get(jobs, timeout=20).status_code == 401
    assert requests.get(jobs, timeout=20, headers={"Authorization": "Bearer wrong"}).status_code == 403
    machine_without_token = Machine(machine.folder, machine.cluster, {**machine.environment})
    machine_without_token.environment["RAY_AUTH_TOKEN_PATH"] = str(machine.folder / "no-such-token")
    refused = machine_without_token.run("status")
    assert refused.returncode == 2 and "asks for a token" in refused.stderr


def test_submit_shows_the_whole_log_and_exits_with_the_true_code(machine):
    code = "import os, sys, time\nfor i in range(12): print('line', i, flush=True); time.sleep(0.05)\n"
    code += "import pipeline; print(os.path.dirname(pipeline.__file__)); sys.exit(7)"
    done = machine.run("submit", "--id", "seven", "--", "python", "-c", code)
    assert done.returncode == 7
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("line ")] == [f"line {i}" for i in range(12)]
    assert "runtime_resources/working_dir_files" in lines[-1], "the job must run the tree that was sent"
    assert "job seven failed: exit code 7" in done.stderr
    again = machine.run("submit", "--id", "seven", "--", "true")
    assert again.returncode == 2 and "was used before" in again.stderr


def test_killed_is_told_apart_from_failed(machine):
    done = machine.run("submit", "--id", "killed", "--", "bash", "-c", "kill -9 $$")
    assert done.returncode == 137
    assert "killed by SIGKILL" in done.stderr
    assert machine.status("killed")["state"] == "killed"


def test_stop_lets_the_command_save_and_reports_stopped(machine):
    saved = machine.folder / "saved"
    code = "import signal, sys, time\ndef save(*_):\n    time.sleep(4)\n"  # longer than Ray's default of 3 s
    code += f"    open({str(saved)!r}, 'w').close()\n    sys.exit(0)\n"
    code += "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(600)"
    job = machine.run("submit", "--no-wait", "--", "python", "-c", code).stdout.strip()
    deadline = time.monotonic() + 120
    while "ready\n" not in machine.run("logs", job).stdout and time.monotonic() < deadline:
        time.sleep(0.1)
    assert machine.status(job)["state"] == "running"
    stopped = machine.run("stop", job)
    assert stopped.returncode == 0 and "stopped: exit code 0" in stopped.stderr
    assert saved.exists()
    assert machine.status(job)["state"] == "stopped"


def test_token_is_in_no_log(machine):
    token = (machine.folder / "token").read_bytes()
    logs = [path for path in (machine.folder / "c").rglob("*") if path.is_file() and path.suffix != ".json"]
    assert any(path.name.startswith("job-driver-") for path in logs)
    assert not [path for path in logs if token in path.read_bytes()]
    shown = machine.run("doctor")
    assert shown.returncode == 0 and token.decode() not in shown.stdout + shown.stderr
