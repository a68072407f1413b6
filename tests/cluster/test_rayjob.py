"""The file for KubeRay: pods against Kubernetes' own schemas, the rest against KubeRay's types and validation rules."""

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ("1.30", "1.37")  # the oldest and the newest that the pods are checked against
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")


def record(*required: str, **fields: Any) -> dict[str, Any]:
    """A JSON schema: an object with these fields and no others."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def count(least: int) -> dict[str, Any]:
    """A JSON schema: an int32."""
    return {"type": "integer", "minimum": least, "maximum": 2**31 - 1}


# ray.io/v1 of KubeRay 1.6 in our own words, from the Go types and the API reference of ray-project/kuberay
# (ray-operator/apis/ray/v1/rayjob_types.go and raycluster_types.go, docs/reference/api.md; read on 2026-11-22): every
# field of these records; what lies deeper only where the file uses it. The custom resource definition itself, which is
# generated from those types, is in no Python package. The API server would drop a misspelt field without a word.
TEXT, TRUTH, ANY = {"type": "string"}, {"type": "boolean"}, {}
TEXTS = {"type": "object", "additionalProperties": TEXT}
AUTH = record(mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=TRUTH)
GROUP = {"template": ANY, "resources": TEXTS, "labels": TEXTS, "rayStartParams": TEXTS}
HEAD = record(
    "template", **GROUP, headService=ANY, enableIngress=TRUTH, ingressOptions=ANY,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
)  # fmt: skip
WORKERS = record(
    "groupName", "template", "minReplicas", "maxReplicas",
    **GROUP, groupName=TEXT, replicas=count(0), minReplicas=count(0), maxReplicas=count(0), numOfHosts=count(1),
    idleTimeoutSeconds=count(0), priority=count(0), suspend=TRUTH, scaleStrategy=record(workersToDelete=ANY),
)  # fmt: skip
RAYCLUSTER = record(
    "headGroupSpec",
    headGroupSpec=HEAD, workerGroupSpecs={"type": "array", "items": WORKERS}, rayVersion=TEXT, authOptions=AUTH,
    enableInTreeAutoscaling=TRUTH, autoscalerOptions=ANY, headServiceAnnotations=TEXTS, suspend=TRUTH, managedBy=TEXT,
    gcsFaultToleranceOptions=ANY, historyServerOptions=ANY, networkPolicy=ANY, tlsOptions=ANY, upgradeStrategy=ANY,
)  # fmt: skip
RAYJOB = record(
    "entrypoint",
    entrypoint=TEXT, activeDeadlineSeconds=count(1), preRunningDeadlineSeconds=count(1), backoffLimit=count(0),
    rayClusterSpec=RAYCLUSTER, submitterPodTemplate=ANY, submitterConfig=record(backoffLimit=count(0)), metadata=TEXTS,
    clusterSelector=TEXTS, managedBy=TEXT, deletionStrategy=ANY, runtimeEnvYAML=TEXT, jobId=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]}, entrypointResources=TEXT,
    entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, ttlSecondsAfterFinished=count(0),
    shutdownAfterJobFinishes=TRUTH, suspend=TRUTH,
)  # fmt: skip
DOCUMENT = record(
    "apiVersion", "kind", "metadata", "spec",
    apiVersion={"const": "ray.io/v1"}, kind={"const": "RayJob"}, metadata=ANY, spec=RAYJOB,
)  # fmt: skip
NAME_LENGTH = 47  # of a RayJob, at most; generateName adds five characters


def broken_rules(spec: dict[str, Any]) -> list[str]:
    """What KubeRay's operator would refuse, from ray-operator/controllers/ray/utils/validation.go of the same day."""
    cluster, rules = spec.get("rayClusterSpec"), []
    if not cluster and not spec.get("clusterSelector"):
        rules.append("one of rayClusterSpec and clusterSelector")
    if spec.get("clusterSelector") and (spec.get("suspend") or spec.get("backoffLimit")):
        rules.append("clusterSelector knows neither suspend nor backoffLimit")
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        rules.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        rules.append("suspend needs shutdownAfterJobFinishes")
    if "authOptions" in (cluster or {}) and cluster["authOptions"].get("enableK8sTokenAuth"):
        rules.append("enableK8sTokenAuth is for RayClusters of their own")
    for group in groups(spec):
        if not group["template"]["spec"].get("containers"):
            rules.append("at least one container")
        if not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 0):
            rules.append("minReplicas <= replicas <= maxReplicas")
    return rules


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = spec.get("rayClusterSpec", {})
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]] if cluster else []


def templates(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Of all pods: Ray's, and the one that submits."""
    return [*(group["template"] for group in groups(spec)), spec["submitterPodTemplate"]]


def check(document: dict[str, Any]) -> None:
    """Raises a jsonschema.ValidationError if KubeRay or Kubernetes would not take the file as it is written."""
    jsonschema.Draft202012Validator(DOCUMENT).validate(document)
    for template in templates(document["spec"]):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        for version in KUBERNETES:
            kubernetes_validate.validate(pod, version, strict=True)


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / "deploy" / "rayjob.yaml").read_text())


def test_kuberay_and_kubernetes_take_the_file(rayjob):
    check(rayjob)
    assert broken_rules(rayjob["spec"]) == []
    prefix = rayjob["metadata"]["generateName"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*-)?", prefix) and len(prefix) + 5 <= NAME_LENGTH


WORKER = ("spec", "rayClusterSpec", "workerGroupSpecs", 0)
SPEC = (*WORKER, "template", "spec")
CONTAINER = (*SPEC, "containers", 0)
AUTH_OPTIONS = ("spec", "rayClusterSpec", "authOptions")


@pytest.mark.parametrize(
    ("place", "field", "value"),
    [
        (("spec",), "activeDeadlineSecond", 60),
        (("spec",), "backoffLimit", "2"),
        (("spec",), "activeDeadlineSeconds", 0),
        (("spec",), "submissionMode", "K8sMode"),
        (AUTH_OPTIONS, "mode", "tokens"),
        (WORKER, "replicas", "1"),
        (WORKER, "rayStartParams", {"num-cpus": 0}),
        (SPEC, "terminationGracePeriod", 120),
        (SPEC, "terminationGracePeriodSeconds", "120"),
        (SPEC, "volumes", [{"name": "shm", "emptyDir": {"medium": "Memory", "size": "8Gi"}}]),
        (CONTAINER, "workingDirectory", "/app"),
        (CONTAINER, "env", [{"name": "X", "value": 100}]),
        (CONTAINER, "resources", {"request": {"cpu": "4"}}),
        (CONTAINER, "volumeMounts", [{"name": "shared", "path": "/shared"}]),
    ],
)
def test_a_misspelt_field_or_a_wrong_type_is_refused(rayjob, place, field, value):
    changed = copy.deepcopy(rayjob)
    record_there: Any = changed
    for step in place:
        record_there = record_there[step]
    record_there[field] = value
    with pytest.raises(jsonschema.ValidationError):
        check(changed)


def test_rayjob_is_safe_and_bounded(rayjob):
    spec = rayjob["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] and spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    for group in groups(spec):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        wait_s = {entry["name"]: int(entry["value"]) for entry in container["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
        assert wait_s < pod["terminationGracePeriodSeconds"], "Kubernetes must not kill before Ray does"
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_quantities_are_as_kubernetes_wants_them(rayjob):
    for group in groups(rayjob["spec"]):
        resources = group["template"]["spec"]["containers"][0]["resources"]
        quantities = [*resources["requests"].values(), *resources["limits"].values()]
        assert all(QUANTITY.fullmatch(quantity) for quantity in quantities)
        assert resources["limits"]["memory"] == resources["requests"]["memory"]
        gpus = [resources[kind].get("nvidia.com/gpu") for kind in ("requests", "limits")]
        assert gpus[0] == gpus[1], "GPUs cannot be asked for and limited by different numbers"


def test_rayjob_runs_the_pinned_ray_and_our_commands(rayjob):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    words = rayjob["spec"]["entrypoint"].split()
    assert words[:4] == ["exec", "python", "-m", "cluster.jobs.entry"]
    training = words[words.index("cluster.training.ray_train") + 1 :]
    from cluster.training.ray_train import parse

    options, command = parse(training)
    assert options.replicas == (1, 1) and command[:4] == ["python", "-m", "trainer", "train"]
    assert (ROOT / command[command.index("--config") + 1]).is_file()


def test_start_parameters_are_options_of_ray_start(rayjob):
    from ray.scripts.scripts import start

    for group in groups(rayjob["spec"]):
        words = [f"--{name}={value}" for name, value in group["rayStartParams"].items() if value != "true"]
        words += [f"--{name}" for name, value in group["rayStartParams"].items() if value == "true"]
        start.make_context("start", ["--head", *words])  # raises on an unknown option


def test_the_image_holds_what_the_pods_run(rayjob):
    lines = (ROOT / "cluster" / "deploy" / "Dockerfile").read_text().splitlines()
    copied = {name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]}
    assert all((ROOT / name).exists() for name in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert {name.rstrip("*") for name in packages["include"]} | {"configs", "constraints.txt"} <= copied
    (folder,) = (line.split()[1] for line in lines if line.startswith("WORKDIR "))
    for group in groups(rayjob["spec"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["workingDir"] == folder
    assert any("wget" in line for line in lines), "KubeRay's probes call it"


def unsafe(template: dict[str, Any]) -> list[str]:
    """What a pod may do that it need not."""
    pod, found = template["spec"], []
    user = pod.get("securityContext", {})
    if pod.get("automountServiceAccountToken") is not False:
        found.append("a token of Kubernetes")
    if not user.get("runAsNonRoot") or not user.get("runAsUser") or not user.get("runAsGroup"):
        found.append("root")
    if user.get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.append("every system call")
    if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")) or any(
        "hostPath" in v for v in pod["volumes"]
    ):
        found.append("the host")
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        rights = container.get("securityContext", {})
        if rights.get("allowPrivilegeEscalation") is not False or rights.get("privileged"):
            found.append("more rights")
        if rights.get("capabilities") != {"drop": ["ALL"]}:
            found.append("capabilities")
        if rights.get("readOnlyRootFilesystem") is not True:
            found.append("a root file system that is written")
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        if {"name": mounts.get("/tmp"), "emptyDir": {}} not in pod["volumes"]:
            found.append("no place for temporary files")
        if not re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:([0-9a-f]{64}|DIGEST)", container["image"]):
            found.append("an image that may change")
    return found


def test_pods_have_no_rights_that_they_do_not_need(rayjob):
    found = templates(rayjob["spec"])
    assert len(found) == 3 and [unsafe(template) for template in found] == [[], [], []]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("automountServiceAccountToken",), True),
        (("securityContext", "runAsNonRoot"), False),
        (("securityContext", "seccompProfile"), {"type": "Unconfined"}),
        (("containers", 0, "securityContext"), {}),
        (("containers", 0, "securityContext", "capabilities"), {"drop": ["ALL"], "add": ["SYS_PTRACE"]}),
        (("containers", 0, "image"), "REGISTRY/twotower:latest"),
        (("volumes",), [{"name": "tmp", "hostPath": {"path": "/"}}]),
    ],
)
def test_a_right_too_many_is_noticed(rayjob, place, value):
    changed = copy.deepcopy(rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"])
    there: Any = changed["spec"]
    for step in place[:-1]:
        there = there[step]
    there[place[-1]] = value
    assert unsafe(changed)


def test_the_image_as_it_stands_is_one_that_no_node_can_pull(rayjob):
    """A digest has 64 hexadecimal digits: what is not set ends in InvalidImageName, and not in somebody's image."""
    for template in templates(rayjob["spec"]):
        assert all(container["image"].endswith("@sha256:DIGEST") for container in template["spec"]["containers"])


def test_the_image_runs_as_the_pods_user_and_is_not_written(rayjob):
    text = (ROOT / "cluster" / "deploy" / "Dockerfile").read_text()
    user = rayjob["spec"]["submitterPodTemplate"]["spec"]["securityContext"]
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE)[-1] == f"{user['runAsUser']}:{user['runAsGroup']}"
    assert "HOME=/tmp" in text and "--require-hashes --requirement requirements.lock" in text


def test_the_network_policy_shuts_rays_pods_to_all_but_ray():
    policy = yaml.safe_load((ROOT / "cluster" / "deploy" / "network-policy.yaml").read_text())
    for version in KUBERNETES:
        kubernetes_validate.validate(policy, version, strict=True)
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["spec"]["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    (rule,) = policy["spec"]["ingress"]
    assert rule["from"] and all(peer for peer in rule["from"]), "an empty peer is everybody"
