"""A local cluster for tests, reached through the command line as its users do."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster import local

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Machine:
    """A running local cluster and the environment to reach it."""

    folder: Path
    options: local.LocalOptions
    environment: dict[str, str]

    @property
    def cluster(self) -> local.LocalCluster:
        """As it is now: nodes come and go."""
        cluster = local.load(self.options.folder)
        assert cluster is not None
        return cluster

    @property
    def place(self) -> tuple[str, str]:
        """The options that name its folder."""
        return "--folder", str(self.options.folder)

    @property
    def logs(self) -> Path:
        """Where Ray writes on this machine."""
        return self.folder / "c" / "ray" / "session_latest" / "logs"

    def run(self, *arguments: str, expect: int | None = None) -> subprocess.CompletedProcess[str]:
        """Run `python -m cluster ARGUMENTS` and check its exit code if one is expected."""
        done = subprocess.run(
            [sys.executable, "-m", "cluster", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if expect is not None:
            assert done.returncode == expect, f"{done.stdout}\n{done.stderr}"
        return done

    def submit(self, *command: str, options: tuple[str, ...] = ()) -> str:
        """Submit without waiting; the job's id."""
        return self.run("submit", "--no-wait", *options, "--", *command, expect=0).stdout.strip()

    def status(self, job_id: str) -> dict:
        """One job's row of `status`."""
        return json.loads(self.run("status", "--json", job_id, expect=0).stdout)[0]


def wait_until(true: Callable[[], object], what: str, timeout_s: float = 300.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for: {what}"
        time.sleep(0.1)


@contextlib.contextmanager
def started(cpus: int, nodes: int = 1) -> Iterator[Machine]:
    """A cluster from `up --local`, ended with `down`; both run as commands."""
    folder = Path(tempfile.mkdtemp(prefix="tt-", dir="/tmp"))  # short: sockets lie below it
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_AUTH_TOKEN_PATH"] = str(folder / "c" / local.TOKEN_NAME)
    machine = Machine(folder, local.LocalOptions(folder / "c", 0, cpus, nodes), environment)
    try:
        machine.run(
            "up",
            "--local",
            *machine.place,
            "--dashboard-port",
            "0",
            "--cpus",
            str(cpus),
            "--nodes",
            str(nodes),
            expect=0,
        )
        environment["RAY_API_SERVER_ADDRESS"] = machine.cluster.address
        yield machine
        machine.run("down", *machine.place, expect=0)
        assert local.load(folder / "c") is None and not Path(environment["RAY_AUTH_TOKEN_PATH"]).exists()
    finally:
        local.down(folder / "c")
        shutil.rmtree(folder, ignore_errors=True)
