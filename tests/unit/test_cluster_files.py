"""The files for `ray up`, Slurm and `ray submit`, against the real schema or parser; KubeRay's is in test_rayjob.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "cluster"
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
    assert "~/.ray/auth_token" in ray_up["file_mounts"]
    assert any(command.startswith("chmod 600") for command in ray_up["setup_commands"])
    assert "--dashboard-host=127.0.0.1" in " ".join(ray_up["head_start_ray_commands"])


def test_ray_up_commands_are_options_of_ray_start(ray_up):
    from ray.scripts.scripts import start

    for kind in ("head", "worker"):
        command = ray_up[f"{kind}_start_ray_commands"][-1].partition("ray start ")[2].split()
        start.make_context("start", [word.replace("~", "/root") for word in command])  # raises on an unknown option


@pytest.fixture
def slurm(tmp_path):
    """Slurm's commands as stand-ins that write down how they were called, and what srun's environment was."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\necho first-node\necho second-node\n")
    (tools / "srun").write_text(
        f"#!{sys.executable}\nimport json, os, pathlib, stat, sys\n"
        "token = pathlib.Path(os.environ['RAY_AUTH_TOKEN_PATH'])\n"
        "record = {'arguments': sys.argv[1:], 'environment': dict(os.environ), 'token': len(token.read_text()),\n"
        "          'mode': stat.S_IMODE(token.stat().st_mode)}\n"
        "pathlib.Path('srun.json').write_text(json.dumps(record))\nsys.exit(7)\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)

    def run(*command: str) -> subprocess.CompletedProcess:
        environment = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2"}
        environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "8"}
        environment["PATH"] = f"{tools}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        script = ["bash", str(FILES / "slurm.sh"), *command]
        return subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)

    return run


def test_slurm_script_starts_ray_once_a_node_with_a_private_token(slurm, tmp_path):
    done = slurm("python", "-m", "pipeline", "prepare", "--output", "/shared/a b")
    assert done.returncode == 7, done.stderr
    record = json.loads((tmp_path / "srun.json").read_text())
    assert record["mode"] == 0o600 and record["token"] == 64
    assert record["environment"]["RAY_AUTH_MODE"] == "token"
    assert not Path(record["environment"]["RAY_AUTH_TOKEN_PATH"]).exists(), "the token must not outlive the job"
    words = record["arguments"]
    assert "--nodes=2" in words and "--ntasks=2" in words
    assert words[words.index("cluster.entry") + 2 :] == [
        "python",
        "-m",
        "pipeline",
        "prepare",
        "--output",
        "/shared/a b",
    ]


def test_slurm_script_calls_symmetric_run_as_ray_parses_it(slurm, tmp_path):
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

    slurm("python", "-m", "pipeline", "prepare")
    words = json.loads((tmp_path / "srun.json").read_text())["arguments"]
    words = words[words.index("symmetric-run") + 1 :]
    ours = words[: words.index("--")]
    context = symmetric_run.make_context("symmetric-run", list(words))
    assert context.params["address"] == "first-node:23456" and context.params["min_nodes"] == 2
    start_options = curate_and_validate_ray_start_args(ours)
    start.make_context("start", ["--head", *start_options])


def test_slurm_script_without_a_command(slurm):
    done = slurm()
    assert done.returncode == 2 and done.stderr.startswith("error: no command")


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
    assert context.params["script"] == "cluster/run_command.py"
    command = "python -m pipeline prepare --source digits --output /shared/digits"
    assert " ".join(context.params["script_args"]) == command
    assert not context.params["stop"] and not context.params["port_forward"], "none of the words is Ray's"


def test_script_for_ray_submit_says_what_is_missing(tmp_path):
    command = [sys.executable, str(FILES / "run_command.py"), "true"]
    environment = {**os.environ, "TWOTOWER_ROOT": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: the project is not in")
