"""Jobs on a real Ray cluster of this machine, with token authentication; the CLI runs as its users run it."""

import contextlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from cluster.host_checks import open_ports
from tests.helpers.cutting_proxy import cutting_proxy
from tests.helpers.local_cluster import ROOT, Machine, started, wait_until


@pytest.fixture(scope="module")
def machine():
    with started(cpus=2) as machine:
        yield machine


def test_token_file_is_private_and_the_dashboard_asks_for_it(machine):
    token = Path(machine.environment["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    jobs = f"{machine.cluster.address}/api/jobs/"
    assert machine.cluster.address.startswith("http://127.0.0.1:")
    assert requests.get(jobs, timeout=20).status_code == 401
    assert requests.get(jobs, timeout=20, headers={"Authorization": "Bearer wrong"}).status_code == 403
    nowhere = {"RAY_AUTH_TOKEN_PATH": str(machine.folder / "no-such-token")}
    stranger = Machine(machine.folder, machine.options, machine.environment | nowhere)
    assert "asks for a token" in stranger.run("status", expect=2).stderr


def test_submit_shows_the_whole_log_and_exits_with_the_true_code(machine):
    code = "import os, sys, time\nfor i in range(12): print('line', i, flush=True); time.sleep(0.05)\n"
    code += "import pipeline; print(os.path.dirname(pipeline.__file__)); sys.exit(7)"
    done = machine.run("submit", "--id", "seven", "--", "python", "-c", code)
    assert done.returncode == 7
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("line ")] == [f"line {i}" for i in range(12)]
    assert "runtime_resources/working_dir_files" in lines[-1], "the job must run the tree that was sent"
    assert "job seven failed: exit code 7" in done.stderr
    result = json.loads((machine.logs / "job-result-seven.json").read_text())
    assert (result["outcome"], result["exit_code"], result["signal"]) == ("failed", 7, None)
    again = machine.run("submit", "--id", "seven", "--", "true")
    assert again.returncode == 2 and "was used before" in again.stderr


def test_log_is_whole_and_the_code_true_though_connections_are_cut(machine):
    code = "import sys, time\nfor i in range(200): print('line', i, flush=True); time.sleep(0.01)\nsys.exit(7)"
    with cutting_proxy(machine.cluster.address) as proxy:
        done = machine.run("submit", "--address", proxy.address, "--", "python", "-c", code, expect=7)
    assert proxy.cuts >= 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("line ")]
    assert lines == [f"line {number}" for number in range(200)]


def test_log_is_shown_byte_for_byte(machine):
    """Also a byte that is no UTF-8, which Ray's own interface for logs refuses."""
    code = "import sys; sys.stdout.buffer.write(b'caf\\xe9 \\xff\\n')"
    machine.run("submit", "--no-wait", "--id", "bytes", "--", "python", "-c", code, expect=0)
    for options in (("--follow",), ()):
        command = [sys.executable, "-m", "cluster", "logs", *options, "bytes"]
        done = subprocess.run(command, cwd=ROOT, env=machine.environment, capture_output=True, timeout=120)
        assert done.returncode == 0 and b"caf\xe9 \xff\n" in done.stdout, done.stderr


@pytest.mark.slow
def test_all_ports_listen_on_loopback_only(machine):
    """Also those of workers and of a job, which inherit what the nodes were told."""
    code = "import ray, time; ray.init(address='auto'); f = ray.remote(lambda: time.sleep(600)).remote()\n"
    code += "ray.get(ray.remote(lambda: 1).remote()); print('ready', flush=True); ray.get(f)"
    job = machine.submit("python", "-c", code)
    wait_until(lambda: "ready\n" in machine.run("logs", job).stdout, "workers run")
    family = descendants(machine.cluster.nodes[0].pid)
    names = {name_of(pid) for pid in family}
    assert {b"ray::DashboardAgent", b"ray::RuntimeEnvAgent", b"ray::JobSupervisor"} <= names
    assert open_ports(family) == set()
    assert "all of the local cluster's listen on loopback only" in machine.run("doctor", *machine.place).stdout
    machine.run("stop", job, expect=0)


def descendants(pid: int) -> set[int]:
    """A process and all below it; a job's leads a session of its own."""
    found, fresh = {pid}, {pid}
    while fresh:
        children: set[int] = set()
        for one in fresh:
            with contextlib.suppress(OSError):  # it has ended
                children |= set(map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split()))
        fresh = children - found
        found |= fresh
    return found


def name_of(pid: int) -> bytes:
    """The first word of a process's command line; none of one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].split(b" ")[0]
    return b""


def test_a_job_of_plain_ray_is_shown_as_ray_knows_it(machine):
    line = "prepared 239 / 1,797 images, 48 images/s, 33 s left"
    jobs = (("good", 0, "succeeded"), ("b d?", 7, "failed"), ("killed by 9", 137, "killed"))
    headers = {"Authorization": f"Bearer {Path(machine.environment['RAY_AUTH_TOKEN_PATH']).read_text()}"}
    entrypoint = f"echo -e '{line} \\xff' -- x; exit "
    for job_id, code, _ in jobs:
        job = {"submission_id": job_id, "entrypoint": f"{entrypoint}{code}"}
        requests.post(f"{machine.cluster.address}/api/jobs/", json=job, headers=headers, timeout=60).raise_for_status()
    for job_id, code, state in jobs:
        done = machine.run("logs", "--follow", job_id)
        assert (done.returncode, line in done.stdout) == (code, True), done.stderr
        row = machine.status(job_id)
        assert (row["state"], row["exit_code"]) == (state, code)
        assert (row["done"], row["total"], row["images_per_s"]) == (239, 1797, 48.0)
        assert row["entrypoint"] == f"{entrypoint}{code}"


@pytest.mark.slow
def test_a_reader_of_the_log_that_goes_away_does_not_stop_the_job(machine):
    code = "import time\nprint('first', flush=True)\nwhile True: print('more', flush=True); time.sleep(0.05)"
    command = [sys.executable, "-m", "cluster", "submit", "--id", "head", "--", "python", "-c", code]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT, "env": machine.environment}
    with subprocess.Popen(command, **streams) as process:
        assert process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read().decode().splitlines()
        assert process.wait(120) == 141
    assert said[-1:] == ["job head goes on; end it with `python -m cluster stop head`"]
    assert machine.status("head")["state"] == "running"
    assert "stopped by SIGTERM: exit code 143" in machine.run("stop", "head", expect=0).stderr


def test_a_relative_result_of_a_job_is_where_the_same_command_would_write_it(machine):
    drawing = os.path.relpath(machine.folder / "net.svg", ROOT)
    words = ["trainer", "describe", "--config", "configs/digits.toml", f"--svg={drawing}"]
    done = machine.run("submit", "--", "python", "-m", *words, expect=0)
    assert (machine.folder / "net.svg").read_text().startswith("<svg") and f"{ROOT}/{drawing}" in done.stdout


@pytest.mark.parametrize(("output", "code"), [("/dev/full", 2), (None, 0)])
def test_output_that_takes_nothing(machine, output, code):
    """A full disk is one line; a closed stream (`>&-`) is for nobody."""
    words = [sys.executable, "-m", "cluster", "status"]
    place = f">{output}" if output else ">&-"
    done = subprocess.run(
        ["bash", "-c", f'"$@" {place}', "-", *words], cwd=ROOT, env=machine.environment, capture_output=True, timeout=60
    )
    assert done.returncode == code
    assert done.stderr == (b"error: stdout: No space left on device\n" if output else b"")


def test_killed_is_told_apart_from_failed(machine):
    done = machine.run("submit", "--id", "killed", "--", "bash", "-c", "kill -9 $$")
    assert done.returncode == 137
    assert "killed by SIGKILL" in done.stderr
    assert machine.status("killed")["state"] == "killed"


def test_stop_lets_the_command_save_and_reports_stopped(machine):
    saved = machine.folder / "saved"
    code = "import signal, sys, time\ndef save(*_):\n    time.sleep(4)\n"  # longer than Ray's default of 3 s
    code += f"    open({str(saved)!r}, 'w').close()\n    sys.exit(0)\n"
    code += "signal.signal(signal.SIGTERM, save)\n"
    code += "print('prepared 239 / 1,797 images, 48 images/s, 33 s left\\nready', flush=True); time.sleep(600)"
    job = machine.submit("python", "-c", code)
    wait_until(lambda: "ready\n" in machine.run("logs", job).stdout, "the command runs")
    row = machine.status(job)
    assert (row["state"], row["stage"], row["exit_code"]) == ("running", "job", None)
    assert (row["done"], row["total"], row["images_per_s"], row["left"]) == (239, 1797, 48.0, "33 s")
    wait_until(  # a busy node may miss the 3 s that the table gives it
        lambda: "239/1797  48        33 s" in machine.run("status", expect=0).stdout, "the job's figures in the table"
    )
    stopped = machine.run("stop", job)
    assert stopped.returncode == 0 and "stopped: exit code 0" in stopped.stderr
    assert saved.exists()
    assert machine.status(job)["state"] == "stopped"


def test_token_is_in_no_log(machine):
    machine.run("submit", "--", "true", expect=0)
    token = Path(machine.environment["RAY_AUTH_TOKEN_PATH"]).read_bytes()
    logs = {}
    for path in (machine.folder / "c" / "ray").rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # Ray removes what has ended
            if path.is_file():
                logs[path] = path.read_bytes()
    assert any(path.name.startswith("job-driver-") for path in logs)
    assert not [path for path, content in logs.items() if token in content]
    shown = machine.run("doctor")
    assert shown.returncode == 0 and token.decode() not in shown.stdout + shown.stderr


@pytest.mark.slow
def test_a_secret_is_in_the_job_and_its_workers_and_nowhere_else(machine):
    """Neither in what the API answers, nor in a file of Ray's, nor in a command line; and it is gone with the job."""
    secret, marker = f"s3cret-{os.getpid()}", machine.folder / "go"
    code = "import os, ray, time; ray.init(address='auto'); here = ray.remote(lambda: os.environ['A_KEY']).remote()\n"
    code += "print('equal', ray.get(here) == os.environ['A_KEY'], len(os.environ['A_KEY']), flush=True)\n"
    code += f"while not os.path.exists({str(marker)!r}): time.sleep(0.05)"
    mine = Machine(machine.folder, machine.options, machine.environment | {"A_KEY": secret})
    job = mine.submit("python", "-c", code, options=("--secret", "A_KEY"))
    wait_until(lambda: "\nequal " in mine.run("logs", job).stdout, "the command has it")
    assert f"equal True {len(secret)}" in mine.run("logs", job).stdout
    token = Path(machine.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    headers = {"Authorization": f"Bearer {token}"}
    for path in ("/api/jobs/", f"/api/jobs/{job}", "/api/v0/workers?detail=1", "/api/v0/runtime_envs?detail=1"):
        answer = requests.get(f"{machine.cluster.address}{path}", headers=headers, timeout=60)
        assert answer.status_code == 200 and secret not in answer.text
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert secret.encode() not in process.read_bytes()
    for path in (machine.folder / "c").rglob("*"):
        with contextlib.suppress(OSError):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    marker.touch()
    assert mine.run("logs", "--follow", job).returncode == 0
    late = "from cluster.jobs import job_secrets; import os; job_secrets.load(); print(os.environ.get('A_KEY'))"
    record = requests.get(f"{machine.cluster.address}/api/jobs/{job}", headers=headers, timeout=60).json()
    value = record["runtime_env"]["env_vars"]["TWOTOWER_SECRETS"]
    done = machine.run("submit", "--env", f"TWOTOWER_SECRETS={value}", "--", "python", "-c", late, expect=0)
    assert done.stdout.splitlines()[-1] == "None", "the half in the store is deleted"


@pytest.mark.slow
def test_a_command_runs_once_on_every_node_and_the_worst_exit_code_counts(tmp_path):
    """On a cluster of two nodes each knows its name."""
    code = "import os, sys; node = os.environ['TWOTOWER_NODE']\n"
    code += f"open({str(tmp_path)!r} + '/' + node, 'x').close(); sys.exit(3 if node.endswith('-2') else 0)"
    with started(cpus=1, nodes=2) as machine:
        done = machine.run("submit", "--every-node", "--id", "both", "--", "python", "-c", code, expect=3)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert len(names) == 2 and [name[-2:] for name in names] == ["-1", "-2"]  # two nodes of one host
        assert f"node {names[0]}: exit code 0" in done.stdout and f"node {names[1]}: exit code 3" in done.stdout
