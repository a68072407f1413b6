"""The files for `ray up`, KubeRay, Slurm and `ray submit`, against the real schema or parser where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "cluster"


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


# Fields of ray.io/v1 that the file may use, from KubeRay's API reference (docs.ray.io, KubeRay 1.6): a typing error in
# a name would be dropped by the API server without a word.
RAYJOB = {
    "submissionMode", "entrypoint", "activeDeadlineSeconds", "backoffLimit", "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished", "rayClusterSpec", "runtimeEnvYAML", "jobId", "metadata", "suspend", "clusterSelector",
    "submitterPodTemplate", "submitterConfig", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources",
}  # fmt: skip
RAYCLUSTER = {
    "rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions",
    "suspend", "headServiceAnnotations",
}  # fmt: skip
HEAD = {"rayStartParams", "template", "serviceType", "headService", "enableIngress"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"}
POD = {"terminationGracePeriodSeconds", "containers", "volumes", "nodeSelector", "tolerations", "serviceAccountName"}
CONTAINER = {"name", "image", "workingDir", "env", "resources", "volumeMounts", "ports", "securityContext"}


@pytest.fixture(scope="module")
def rayjob():
    return yaml.safe_load((FILES / "rayjob.yaml").read_text())


def pods(rayjob):
    cluster = rayjob["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [(group, group["template"]["spec"]) for group in groups]


def test_rayjob_uses_only_known_fields(rayjob):
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    assert rayjob["spec"].keys() <= RAYJOB
    assert rayjob["spec"]["rayClusterSpec"].keys() <= RAYCLUSTER
    assert rayjob["spec"]["rayClusterSpec"]["headGroupSpec"].keys() <= HEAD
    for group, pod in pods(rayjob):
        assert group.keys() <= HEAD | WORKERS
        assert pod.keys() <= POD
        assert all(container.keys() <= CONTAINER for container in pod["containers"])
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_rayjob_is_safe_and_bounded(rayjob):
    spec = rayjob["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["activeDeadlineSeconds"] > 0 and spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"]
    assert "generateName" in rayjob["metadata"], "a name that is never reused"
    for _, pod in pods(rayjob):
        (container,) = pod["containers"]
        wait_s = {entry["name"]: int(entry["value"]) for entry in container["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
        assert wait_s < pod["terminationGracePeriodSeconds"], "Kubernetes must not kill before Ray does"
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_rayjob_runs_the_pinned_ray_and_our_commands(rayjob):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    words = rayjob["spec"]["entrypoint"].split()
    assert words[:4] == ["exec", "python", "-m", "cluster.entry"]
    training = words[words.index("cluster.training") + 1 :]
    from cluster.training import parse

    options, command = parse(training)
    assert options.replicas == (1, 1) and command[:4] == ["python", "-m", "trainer", "train"]
    assert (ROOT / command[command.index("--config") + 1]).is_file()


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


def test_slurm_directives_come_before_the_first_command():
    lines = (FILES / "slurm.sh").read_text().splitlines()
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


def test_script_for_ray_submit_says_what_is_missing(tmp_path):
    command = [sys.executable, str(FILES / "run_command.py"), "true"]
    environment = {**os.environ, "TWOTOWER_ROOT": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: the project is not in")
