"""The files for `ray up`, Slurm and `ray submit`, against the real schema or parser; KubeRay's is in test_rayjob.py."""

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cluster import ray_up as ray_up_module
from cluster.__main__ import main
from cluster.jobs.tree import SECRETS

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "cluster" / "deploy"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"


@pytest.fixture(scope="module")
def ray_up():
    return yaml.safe_load((FILES / "ray-cluster.yaml").read_text())


def test_ray_up_file_passes_rays_own_schema(ray_up):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(ray_up)  # fills in the provider's defaults, as `ray up` does
    validate_config(prepared)
    with pytest.raises(Exception, match="unknown_field"):
        validate_config({**prepared, "unknown_field": 1})


def test_ray_up_starts_every_node_with_the_token(ray_up):
    for kind in ("head", "worker"):
        (start,) = (command for command in ray_up[f"{kind}_start_ray_commands"] if "ray start" in command)
        assert "RAY_AUTH_MODE=token" in start and "\n" not in start
    assert ray_up["file_mounts"]["~/.ray/auth_token"].startswith("~/.ray/"), "outside of the tree"
    assert any("chmod 600 ~/.ray/auth_token" in command for command in ray_up["setup_commands"])
    assert "--dashboard-host=127.0.0.1" in " ".join(ray_up["head_start_ray_commands"])


def test_ray_up_commands_are_options_of_ray_start(ray_up):
    from ray.scripts.scripts import start

    for kind in ("head", "worker"):
        command = ray_up[f"{kind}_start_ray_commands"][-1].partition("ray start ")[2].split()
        start.make_context("start", [word.replace("~", "/root") for word in command])  # raises on an unknown option


def test_ray_up_has_a_key_of_its_own_and_leaves_out_what_is_secret(ray_up):
    """Also of plain `ray up`, which sends the folder as it lies there."""
    assert ray_up["auth"]["ssh_private_key"] == "~/.ssh/twotower", "the head gets it: not the user's own"
    assert set(SECRETS) | {".git", ".venv"} <= set(ray_up["rsync_exclude"])


@pytest.fixture
def rays(monkeypatch, tmp_path):
    """Ray's command line, which notes how it is called, what CLUSTER.yaml says then, and what the mounts hold."""
    calls, real = [], subprocess.run

    def run(words, env, check, **others):
        if words[0] == "git":
            return real(words, env=env, check=check, **others)
        record = yaml.safe_load(Path(words[-1]).read_text())
        tree = Path(record["file_mounts"]["~/twotower"])
        files = {path.relative_to(tree).as_posix() for path in tree.rglob("*")} if tree != Path() else set()
        calls.append((words, env, record, files))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(ray_up_module.subprocess, "run", run)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-another-cluster")
    monkeypatch.chdir(ROOT)
    config = tmp_path / "my.yaml"
    text = (FILES / "ray-cluster.yaml").read_text().replace("~/.ray/twotower.token", str(tmp_path / "s" / "token"))
    config.write_text(text)
    return config, calls


def test_up_and_down_hand_the_file_to_ray_with_the_clusters_own_token(rays, tmp_path):
    from ray.scripts import scripts

    config, calls = rays
    token = tmp_path / "s" / "token"
    assert main(["up", str(config)]) == 0
    first = token.read_text()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert main(["up", str(config)]) == 0 and token.read_text() == first, "`up` again is an update"
    assert main(["down", str(config)]) == 0 and not token.exists()
    for (words, env, record, _), verb in zip(calls, ("up", "up", "down"), strict=True):
        assert words[:4] == [sys.executable, "-m", "ray.scripts.scripts", verb]
        context = getattr(scripts, verb).make_context(verb, words[4:])
        assert context.params["yes"]
        assert env["RAY_AUTH_TOKEN_PATH"] == str(token) and "RAY_AUTH_TOKEN" not in env
        assert record["cluster_name"] == "twotower"


def test_up_sends_what_submit_would_send(rays):
    config, calls = rays
    assert main(["up", str(config)]) == 0
    ((words, _, record, files),) = calls
    assert {"pyproject.toml", "cluster/ray_up.py", "constraints.txt", "Makefile"} <= files
    assert not any(name.startswith((".git/", ".venv", "benchmarks/results/")) for name in files)
    assert not Path(words[-1]).exists() and not Path(record["file_mounts"]["~/twotower"]).exists(), "a copy for once"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  ~/.ray/auth_token: ", "  ~/.ray/other: ", "file_mounts has no ~/.ray/auth_token"),
        ("auth_token: ", "auth_token: ./token #", "lies in the tree"),
        ("file_mounts:", "file_mount:", "expected file_mounts"),
        ("cluster_name: twotower", "cluster_name: [", "cannot be read"),
    ],
)
def test_a_cluster_file_without_a_private_token_is_refused(rays, old, new, said, capsys):
    config, calls = rays
    config.write_text(config.read_text().replace(old, new, 1))
    assert main(["up", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not calls


SRUN = """\
import json, os, pathlib, stat, sys
token = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"])
record = {"arguments": sys.argv[1:], "environment": dict(os.environ), "token": len(token.read_text()),
          "mode": stat.S_IMODE(token.stat().st_mode), "folder": stat.S_IMODE(token.parent.stat().st_mode)}
pathlib.Path("srun.json").write_text(json.dumps(record))
words = sys.argv[sys.argv.index("ray"):]
os.execvp(words[0], words)
"""
RAY = """\
import subprocess, sys
sys.exit(subprocess.run(sys.argv[sys.argv.index("--") + 1:]).returncode)
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts the script with stand-ins: srun writes down its call and obeys, `ray symmetric-run` runs the command."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\necho first-node\necho second-node\n")
    (tools / "srun").write_text(f"#!{sys.executable}\n{SRUN}")
    (tools / "ray").write_text(f"#!{sys.executable}\n{RAY}")
    for tool in tools.iterdir():
        tool.chmod(0o755)

    def start(*command: str, job: str = "123456") -> subprocess.Popen:
        environment = {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2"}
        environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "8", "PYTHONPATH": str(ROOT)}
        environment["HOME"] = str(tmp_path.parent / f"home-{tmp_path.name}")
        environment["PATH"] = f"{tools}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        script = ["bash", str(FILES / "slurm.sh"), *command]
        pipe = subprocess.PIPE
        return subprocess.Popen(script, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    return start


def test_slurm_script_starts_ray_once_a_node_with_a_private_token(slurm, tmp_path):
    command = ("python", "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "--output", "/shared/a b")
    process = slurm(*command)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 7, stderr
    assert stdout.strip() == "['--output', '/shared/a b']"
    record = json.loads((tmp_path / "srun.json").read_text())
    assert record["mode"] == 0o600 and record["token"] == 64
    assert record["environment"]["RAY_AUTH_MODE"] == "token"
    token = Path(record["environment"]["RAY_AUTH_TOKEN_PATH"])
    assert not token.parent.exists(), "the token must not outlive the job"
    assert record["folder"] == 0o700 and not token.is_relative_to(tmp_path), "not in the tree, which is sent about"
    words = record["arguments"]
    assert "--nodes=2" in words and "--ntasks=2" in words
    assert tuple(words[words.index("cluster.jobs.entry") + 2 :]) == command
    assert json.loads((tmp_path / "job-result-123456.json").read_text())["outcome"] == "failed"


def test_slurm_script_lets_the_command_save_when_its_time_is_up(slurm, tmp_path):
    """As `--signal=B:TERM@120` does: the signal comes to the script alone."""
    code = "import pathlib, signal, sys, time\ndef save(*_):\n    time.sleep(0.5)\n"
    code += "    pathlib.Path('saved').touch()\n    sys.exit(3)\n"
    code += "signal.signal(signal.SIGTERM, save); pathlib.Path('ready').touch(); time.sleep(600)"
    process = slurm("python", "-c", code)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3, stderr
    assert (tmp_path / "saved").exists()
    assert json.loads((tmp_path / "job-result-123456.json").read_text())["outcome"] == "stopped"
    assert not list(tmp_path.glob(".*-123456")) and not list(tmp_path.parent.glob("home-*/.ray/*")), (
        "neither the token nor the process id may outlive the job"
    )


def test_slurm_script_fails_where_ray_does_not_start(slurm, tmp_path):
    """`ray symmetric-run` itself exits 0 then; a result of an attempt before a requeue must not hide it."""
    (tmp_path / "bin" / "ray").write_text("#!/bin/sh\necho 'Failed to start Ray' >&2\n")
    (tmp_path / "job-result-123456.json").write_text("{}")
    process = slurm("true")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 70 and stderr.splitlines()[-1].startswith("error: the command did not run")


def test_slurm_script_calls_symmetric_run_as_ray_parses_it(slurm, tmp_path):
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

    slurm("true").communicate(timeout=60)
    words = json.loads((tmp_path / "srun.json").read_text())["arguments"]
    words = words[words.index("symmetric-run") + 1 :]
    ours = words[: words.index("--")]
    context = symmetric_run.make_context("symmetric-run", list(words))
    assert context.params["address"] == "first-node:23456" and context.params["min_nodes"] == 2
    start_options = curate_and_validate_ray_start_args(ours)
    start.make_context("start", ["--head", *start_options])


def test_slurm_script_without_a_command(slurm):
    process = slurm()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and stderr.startswith("error: no command")


def test_slurm_script_is_sound_shell():
    subprocess.run(["bash", "-n", str(FILES / "slurm.sh")], check=True, timeout=60)
    done = subprocess.run([SHELLCHECK, str(FILES / "slurm.sh")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


SBATCH = {  # long options of sbatch that the script uses, and what their values look like
    "--job-name": r"\w+",
    "--nodes": r"\d+(-\d+)?",
    "--ntasks-per-node": r"\d+",
    "--cpus-per-task": r"\d+",
    "--time": r"(\d+-)?\d+:\d\d:\d\d",
    "--signal": r"(B:)?[A-Z]+@\d+",
    "--requeue": "",
    "--exclusive": "",
    "--output": r"[\w%.-]+",
}


def test_slurm_directives_come_before_the_first_command_and_are_spelt_right():
    lines = (FILES / "slurm.sh").read_text().splitlines()
    for line in lines:
        if line.startswith("#SBATCH"):
            option, _, value = line.split(maxsplit=1)[1].partition("=")
            assert re.fullmatch(SBATCH[option], value), line
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives and max(directives) < first, "sbatch ignores what follows a command"


def test_script_for_ray_submit_runs_the_command_in_the_project(tmp_path):
    script = tmp_path / "run_command.py"  # `ray submit` copies it to the head's home
    script.write_bytes((FILES / "run_command.py").read_bytes())
    environment = {**os.environ, "TWOTOWER_ROOT": str(ROOT), "TWOTOWER_RESULT": str(tmp_path / "result.json")}
    code = "import os, sys; print(os.getcwd()); sys.exit(7)"
    command = [sys.executable, str(script), "python", "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (7, str(ROOT))
    assert json.loads((tmp_path / "result.json").read_text())["outcome"] == "failed"


def test_ray_submit_takes_the_line_that_the_script_documents():
    from ray.scripts.scripts import submit

    (line,) = (
        line for line in (FILES / "run_command.py").read_text().splitlines() if line.startswith("    ray submit")
    )
    context = submit.make_context("submit", line.split()[2:])
    assert context.params["script"] == "cluster/deploy/run_command.py"
    command = "python -m pipeline prepare --source digits --output /shared/d"
    assert " ".join(context.params["script_args"]) == command
    assert not context.params["stop"] and not context.params["port_forward"], "none of the words is Ray's"


def test_script_for_ray_submit_says_what_is_missing(tmp_path):
    command = [sys.executable, str(FILES / "run_command.py"), "true"]
    environment = {**os.environ, "TWOTOWER_ROOT": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: the project is not in")
