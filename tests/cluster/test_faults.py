"""The real commands on a cluster of two nodes: equal to direct runs, also when workers and nodes are killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from cluster import local
from cluster.jobs import loopback_node
from cluster.training.pair import RESIZE, latest_step
from tests.helpers.digits_jobs import (
    PREPARE,
    STEPS,
    final_weights,
    manifest,
    prepare_directly,
    train_command,
    train_directly,
)
from tests.helpers.experiments import tiny_words
from tests.helpers.frozen import has_pending, hold, release
from tests.helpers.local_cluster import ROOT, Machine, started, wait_until
from tests.helpers.small_disk import remount, small_disk
from tests.helpers.tiny_run import make_tiny_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def machine():
    """A head with one CPU, where no pair of towers fits, and two nodes for them."""
    with started(cpus=1, nodes=1) as machine:
        for _ in range(2):
            add_node(machine)
        yield machine


def add_node(machine: Machine) -> None:
    options = local.LocalOptions(machine.options.folder, num_cpus=2)
    before = machine.cluster
    cluster = local.add_node(options, before, len(before.nodes))
    local.wait_for_nodes(options, cluster, len(living(cluster)))
    wait_until(
        lambda: node_id_of(cluster.nodes[-1]) in alive_nodes(machine), "the new node"
    )  # a lost one may count yet


def living(cluster: local.LocalCluster) -> list[local.LocalNode]:
    return [node for node in cluster.nodes if local.is_alive(node)]


@pytest.fixture(scope="module")
def data(digits):
    """The data set of a direct run, of as many images a shard."""
    return digits


@pytest.fixture(scope="module")
def weights(data, tmp_path_factory):
    """The final weights of a direct run with two processes."""
    return final_weights(train_directly(data, tmp_path_factory.mktemp("direct") / "run"))


def towers_of(run: Path) -> dict[int, int]:
    """The process ids of a run's towers, by rank."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0") if process.name.isdigit() else []
            if b"trainer" not in words or str(run).encode() not in words:
                continue
            variables = dict(entry.partition(b"=")[::2] for entry in (process / "environ").read_bytes().split(b"\0"))
        except OSError:  # it ended while we looked
            continue
        if b"RANK" in variables:
            found[int(variables[b"RANK"])] = int(process.name)
    return found


def has_checkpoint(run: Path) -> bool:
    return any((run / "checkpoints").glob("step-*"))


def hold_towers(run: Path, count: int, *, but: Collection[int] = ()) -> dict[int, int]:
    """Stops the towers of a run that has a checkpoint, once all are there and none is among ``but``: it cannot end."""

    def find() -> list[int]:
        towers = towers_of(run) if has_checkpoint(run) else {}
        return list(towers.values()) if len(towers) == count and not set(towers.values()) & set(but) else []

    hold(find, f"{count} towers and a checkpoint")
    return towers_of(run)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_prepare_equals_a_direct_run(machine, data, tmp_path):
    command = ("python", *PREPARE, "--shard-size", "128", "--output", str(tmp_path / "d"), "--address", "auto")
    done = machine.run("submit", "--id", "digits", "--", *command, expect=0)
    assert "1,797 images" in done.stdout
    assert manifest(tmp_path / "d") == manifest(data)
    result = json.loads((machine.logs / "job-result-digits.json").read_text())
    assert (result["outcome"], result["exit_code"]) == ("succeeded", 0) and result["elapsed_s"] > 0


def test_a_full_disk_is_one_line_and_is_continued(machine, data, tmp_path):
    with small_disk(tmp_path / "disk", "300k") as disk:
        words = ("submit", "--", "python", *PREPARE, "--shard-size", "128", "--output", str(disk / "digits"))
        done = machine.run(*words)
        assert done.returncode == 2
        errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "No space left on device" in errors[0] and "Traceback" not in done.stdout
        remount(disk, "size=30m")
        machine.run(*words, expect=0)
        assert manifest(disk / "digits") == manifest(data)


def test_prepare_survives_a_killed_node(machine, tmp_path, monkeypatch):
    options = ("--shard-size", "4")
    prepare_directly(tmp_path / "direct", *options)
    output, marker = tmp_path / "d", tmp_path / "held"
    monkeypatch.setenv("TWOTOWER_FAULT", f"hold-tar-half:{marker}")  # of the workers of one more node
    add_node(machine)
    job = machine.submit("python", *PREPARE, *options, "--output", str(output), "--address", "auto")
    wait_until(marker.exists, "a shard in work on the last node")  # the run waits for it
    wait_until(lambda: len(list(output.glob("train/*.tar"))) >= 20, "a few shards")
    wait_until(lambda: f'run="{output.name}",stage="prepare"' in metrics(machine), "the run's gauges")
    assert not (output / "manifest.json").exists(), "the node must be killed in the middle"
    local.stop_node(living(machine.cluster)[-1], kill=True)
    assert machine.run("logs", "--follow", job).returncode == 0
    assert manifest(output) == manifest(tmp_path / "direct")


def test_training_survives_a_killed_tower_worker_and_node(machine, data, weights, tmp_path):
    run = tmp_path / "run"
    job = machine.submit(*train_command(data, run), options=("--towers", "2"))
    first = hold_towers(run, 2)
    os.kill(first[0], signal.SIGKILL)
    release(first.values())
    second = hold_towers(run, 2, but=first.values())
    wait_until(lambda: "restart: " in machine.run("logs", job).stdout, "the restart")
    worker = parent_of(second[1])
    os.kill(worker, signal.SIGKILL)
    third = hold_towers(run, 2, but=second.values())
    assert worker not in map(parent_of, third.values())
    host = os.getsid(third[0])
    nodes = [node for node in living(machine.cluster) if node.pid == host]
    assert nodes and not nodes[0].head, "towers must not fit on the head"
    local.stop_node(nodes[0], kill=True)
    done = machine.run("logs", "--follow", job)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("restart: going on from the last checkpoint") == 3
    assert final_weights(run) == weights
    add_node(machine)


def trainings_of(run: Path) -> list[int]:
    """The process of a run that has a checkpoint."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline") if has_checkpoint(run) else ():
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[1:4] == [b"-m", b"trainer", b"train"] and os.fsencode(run) in words:
                found.append(int(path.parent.name))
    return found


def test_an_experiment_survives_a_killed_node(machine, tmp_path):
    """Two runs, a node each, of which one is killed in the middle of its run: the rows are those without Ray."""
    data = make_tiny_data(tmp_path / "data")
    more = ("--variants", "no-dropout", "--cpus", 2, "--set", "train.epochs=12")
    here, there = (tiny_words("ablations", data, tmp_path / name, *more, seeds=1) for name in ("here", "there"))
    job = machine.submit("python", "-m", "trainer", *map(str, there), "--address", "auto")
    (held,) = hold(lambda: trainings_of(tmp_path / "there" / "runs" / "no-dropout" / "seed-0"), "a training")
    host = os.getsid(held)
    (node,) = [node for node in living(machine.cluster) if node.pid == host]
    assert not node.head, "a run of two CPUs must not fit on the head"
    local.stop_node(node, kill=True)
    command = [sys.executable, "-m", "trainer", *map(str, here)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    done = machine.run("logs", "--follow", job)
    assert done.returncode == 0 and "runs 2/2" in done.stdout, done.stdout
    for name in ("results.jsonl", "summary.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    add_node(machine)


def test_a_task_is_told_of_with_its_own_status(machine, tmp_path):
    programs = {
        "fine": "print('hello')",
        "seven": "raise SystemExit(7)",
        "killed": "import os; os.kill(os.getpid(), 9)",
    }
    tasks = [
        {"name": name, "command": ["python", "-c", program], "log": str(tmp_path / f"{name}.log")}
        for name, program in programs.items()
    ]
    words = ("cluster.training.tasks", "--address", machine.cluster.gcs, "--stop-file", str(tmp_path / "stop"))

    def statuses() -> dict[str, int]:
        lines = "".join(json.dumps(task) + "\n" for task in tasks)
        done = subprocess.run(
            [sys.executable, "-m", *words],
            input=lines,
            cwd=ROOT,
            env=machine.environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        )
        first, *rows = map(json.loads, done.stdout.splitlines())
        assert first == {"ready": True}
        return {row["name"]: row["status"] for row in rows}

    assert statuses() == {"fine": 0, "seven": 7, "killed": 137}
    assert (tmp_path / "fine.log").read_text() == "hello\n"
    (tmp_path / "stop").touch()
    assert set(statuses().values()) == {128 + signal.SIGTERM}, "none is begun once it was asked to stop"


def test_two_replicas_equal_a_direct_run_also_after_a_kill(machine, data, tmp_path):
    """Each pair in one bundle, the pairs on different nodes; a killed tower of the second pair brings all four back."""
    run, direct = tmp_path / "run", train_directly(data, tmp_path / "direct", "--replicas", "2")
    job = machine.submit(*train_command(data, run), options=("--towers", "2", "--replicas", "2"))
    towers = hold_towers(run, 4)
    nodes = [os.getsid(towers[rank]) for rank in range(4)]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    os.kill(towers[3], signal.SIGKILL)
    release(towers.values())
    done = machine.run("logs", "--follow", job)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("restart: going on from the last checkpoint") == 1
    assert "2 replicas of two processes" in done.stdout
    assert final_weights(run) == final_weights(direct)


def test_an_elastic_run_shrinks_and_grows_back(machine, data, tmp_path):
    """Two pairs, then one after a lost node, then two again when a node joins; growing costs not one step."""
    run = tmp_path / "run"
    options = ("--towers", "2", "--replicas", "1:2", "--resize-every", "1", "--max-failures", "1")
    job = machine.submit(*train_command(data, run), options=options)
    pairs = hold_two_pairs(run)
    step = last_step(run)
    host = os.getsid(pairs[3])
    local.stop_node(next(node for node in living(machine.cluster) if node.pid == host), kill=True)
    release(pairs.values())

    def one_pair_at_work() -> list[int]:
        """Its own steps: the killed pairs may have finished one or two more when they were released."""
        towers = towers_of(run)
        new = sorted(towers) == [0, 1] and not set(towers.values()) & set(pairs.values())
        return list(towers.values()) if new and last_step(run) > step + 2 else []

    alone = hold(one_pair_at_work, "a step of one pair")
    shrunk = machine.run("logs", job).stdout.rpartition("restart: going on from the last checkpoint")[2]
    assert "replicas of two processes" not in shrunk and "two processes, one per tower, cpu, from step" in shrunk
    add_node(machine)
    grow(run, alone)
    done = machine.run("logs", "--follow", job)
    assert done.returncode == 0, done.stdout
    _, _, grown = done.stdout.rpartition("the cluster holds another number of pairs: saving")
    saved = int(grown.partition("stopped at step ")[2].split(":")[0])
    again = grown.partition("restart: going on from the last checkpoint")[2]
    assert "2 replicas of two processes" in again and f"from step {saved}" in again, "not one step may be lost"
    result = json.loads((run / "result.json").read_text())
    assert (result["exit_reason"], result["step"], result["processes"]) == ("finished", STEPS, 4)


def hold_two_pairs(run: Path) -> dict[int, int]:
    """Stops the four towers of an elastic run that has a checkpoint.

    Ray Train knows the nodes as they were up to 20 s ago: what it began with one pair is held until there is room.
    """

    def find() -> list[int]:
        towers = towers_of(run) if has_checkpoint(run) else {}
        return list(towers.values()) if len(towers) in (2, 4) else []

    found = hold(find, "one pair or two, and a checkpoint")
    if len(found) == 2:
        grow(run, found)
        return hold_towers(run, 4)
    return towers_of(run)


def grow(run: Path, held: Collection[int]) -> None:
    """Lets the towers of one pair go on once Ray Train has asked them to make room for two."""
    wait_until(lambda: list(run.parent.glob(f".{run.name}.ray/*/{RESIZE}")), "Ray Train's look for room")
    release(held)


def last_step(run: Path) -> int:
    return int((latest_step(run / "metrics.jsonl") or {"step": 0})["step"])


def node_id_of(node: local.LocalNode) -> str:
    """Ray's id of a node, from the command line of its raylet; an empty text before that is there."""
    for pid in local.session_members(node.pid):
        with contextlib.suppress(OSError):  # it ended while we looked: a node that starts has many such
            for word in Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0"):
                if word.startswith("--node_id="):
                    return word.partition("=")[2]
    return ""


def alive_nodes(machine: Machine) -> dict[str, dict]:
    """The dashboard's rows of the nodes that it holds to be alive, by Ray's id."""
    token = Path(machine.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    address, headers = machine.cluster.address, {"Authorization": f"Bearer {token}"}
    nodes = requests.get(f"{address}/nodes?view=summary", headers=headers, timeout=30).json()["data"]["summary"]
    return {node["raylet"]["nodeId"]: node for node in nodes if node["raylet"]["state"] == "ALIVE"}


def metrics(machine: Machine) -> str:
    """What Prometheus would read from all nodes."""
    urls = [f"http://{n['ip']}:{n['raylet']['metricsExportPort']}/metrics" for n in alive_nodes(machine).values()]
    return "".join(requests.get(url, timeout=30).text for url in urls)


def test_preemption_notice_leads_to_a_checkpoint(machine, data, weights, tmp_path):
    run = tmp_path / "run"
    job = machine.submit(*train_command(data, run), options=("--towers", "2", "--max-failures", "0"))
    towers = hold_towers(run, 2)  # gauges take ten seconds to be exported; the run would be over
    host = os.getsid(towers[0])
    wait_until(lambda: f'run="{run.name}"' in metrics(machine), "the run's gauges")
    assert "ray_twotower_images_per_s{" in metrics(machine)
    node = next(node for node in living(machine.cluster) if node.pid == host)
    drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", machine.cluster.gcs]
    drain += ["--node-id", node_id_of(node), "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    drain += ["--reason-message", "a test", "--deadline-remaining-seconds", "120"]
    environment = {**machine.environment, "RAY_AUTH_MODE": "token", loopback_node.STAY_ON_LOOPBACK: "0"}
    subprocess.run(drain, env=environment, check=True, capture_output=True, timeout=120)
    wait_until(lambda: "this node is going away: saving" in machine.run("logs", job).stdout, "the notice")
    release(towers.values())
    done = machine.run("logs", "--follow", job)
    assert done.returncode == 0, done.stdout
    saved = int(done.stdout.partition("stopped at step ")[2].split(":")[0])
    assert f"from step {saved}" in done.stdout, "not one step may be lost"
    assert final_weights(run) == weights
    local.stop_node(node)
    add_node(machine)


def test_stop_saves_and_resume_goes_on(machine, data, weights, tmp_path):
    run = tmp_path / "run"
    job = machine.submit(*train_command(data, run), options=("--towers", "2"))
    towers = hold_towers(run, 2).values()
    with ThreadPoolExecutor() as pool:
        stopping = pool.submit(machine.run, "stop", job, expect=0)
        wait_until(lambda: all(has_pending(tower, signal.SIGTERM) for tower in towers), "the request at the towers")
        release(towers)
        stopping.result()
    assert machine.status(job)["state"] == "stopped"
    result = json.loads((run / "result.json").read_text())
    assert result["exit_reason"] == "stopped" and 0 < result["step"] < STEPS
    assert (run / "checkpoints" / f"step-{result['step']:08d}" / "checkpoint.json").is_file()
    assert not towers_of(run)
    again = machine.run("submit", "--towers", "2", "--", *train_command(data, run), expect=2)
    assert "holds a run" in again.stdout, "an accidental reuse must be refused"
    assert json.loads((run / "result.json").read_text())["step"] == result["step"]
    machine.run("submit", "--towers", "2", "--", *train_command(data, run), "--resume", "auto", expect=0)
    assert final_weights(run) == weights


def test_missing_resources_are_one_line(machine, data, tmp_path):
    options = ("--towers", "2", "--cpus-per-pair", "64", "--wait", "0")
    done = machine.run("submit", *options, "--", *train_command(data, tmp_path / "run"), expect=2)
    assert "error: missing resources: the towers need 1 x 64 CPUs" in done.stdout
    assert not (tmp_path / "run").exists()
