"""Training on Ray without a cluster: placement, environment of the towers, how a run ends, what a restart does."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.__main__ import main
from cluster.errors import ClusterError
from cluster.jobs.entry import write_json
from cluster.training import pair, ray_train
from cluster.training.pair import latest_step
from cluster.training.ray_train import Need, choose_gpus, fitting_pairs

ROOT = Path(__file__).resolve().parents[2]


def node(cpus: float, gpus: float = 0) -> dict[str, float]:
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


@pytest.mark.parametrize(
    ("nodes", "need", "pairs"),
    [
        ([node(1), node(1)], Need(2, 0, 1), 0),  # two halves make no pair
        ([node(2), node(5)], Need(2, 0, 1), 3),
        ([node(64, 3)], Need(2, 2, 1), 1),
        ([node(2, 8), node(64)], Need(2, 2, 1), 1),
        ([], Need(2, 0, 1), 0),
    ],
)
def test_a_pair_is_never_split_over_nodes(nodes, need, pairs):
    assert fitting_pairs(nodes, need) == pairs


@pytest.mark.parametrize(
    ("nodes", "replicas", "gpus"),
    [
        ([node(8, 2)], 1, 2),
        ([node(8, 1)], 1, 1),
        ([node(8, 2)], 2, 1),
        ([node(8)], 1, 0),
        ([node(8, 1), node(8, 1)], 1, 1),  # two GPUs, but on two nodes
    ],
)
def test_gpus_are_used_where_they_suffice(nodes, replicas, gpus):
    assert choose_gpus(nodes, num_towers=2, num_replicas=replicas) == gpus


def test_missing_resources_end_in_one_line_instead_of_waiting_for_ever(monkeypatch):
    monkeypatch.setattr(ray_train, "_nodes", lambda: [node(1), node(1)])
    with pytest.raises(ClusterError, match=r"missing resources: the towers need 1 x 2 CPUs.*1 CPUs 0 GPUs, 1 CPUs"):
        ray_train.wait_for_room(Need(2, 0, 1), timeout_s=0.0)


@pytest.mark.parametrize("comes", [True, False])
def test_an_autoscaler_is_asked_once_and_the_request_taken_back(monkeypatch, comes):
    asked = []
    monkeypatch.setattr(ray_train, "_ask_autoscaler", asked.append)
    monkeypatch.setattr(ray_train, "_nodes", lambda: [node(4, 2)] if comes and asked else [node(1)])
    clock = SimpleNamespace(monotonic=lambda: 10 * len(asked), sleep=lambda seconds: None)  # stands until it is asked
    monkeypatch.setattr(ray_train, "time", clock)
    if comes:
        ray_train.wait_for_room(Need(2, 1, 2), timeout_s=60.0)
    else:
        with pytest.raises(ClusterError, match="missing resources: the towers need 2 x 2 CPUs and 1 GPUs"):
            ray_train.wait_for_room(Need(2, 1, 2), timeout_s=5.0)
    assert asked == [[{"CPU": 2, "GPU": 1}] * 2, []]


def settings(towers: int = 2) -> pair.PairSettings:
    return pair.PairSettings(("python", "x"), "/shared", towers, num_threads=1)


def test_ranks_are_those_of_torchrun():
    rendezvous = [pair.Rendezvous(replica, 3, "10.0.0.1", 29500) for replica in range(3)]
    environments = [pair.tower_environment(settings(), place, tower) for place in rendezvous for tower in range(2)]
    assert [int(environment["RANK"]) for environment in environments] == list(range(6))
    assert [int(environment["LOCAL_RANK"]) for environment in environments] == [0, 1] * 3
    assert {environment["WORLD_SIZE"] for environment in environments} == {"6"}
    assert {environment["MASTER_ADDR"] for environment in environments} == {"10.0.0.1"}


def test_one_process_has_no_rank():
    environment = pair.tower_environment(settings(towers=1), pair.Rendezvous(0, 1, "127.0.0.1", 1), 0)
    assert "RANK" not in environment and "MASTER_ADDR" not in environment


def test_restart_resumes_and_overwrites_nothing():
    command = ["python", "-m", "trainer", "train", "--run", "/r", "--overwrite", "--resume", "never"]
    again = pair.resume_command(command)
    assert "--overwrite" not in again and again[-2:] == ["--resume", "auto"]
    assert command[-3] == "--overwrite", "the first start keeps what the user said"


@pytest.mark.parametrize(
    ("words", "run", "again"),
    [
        (["--run", "/r"], "/r", ["--resume", "auto"]),
        (["--run=/r", "--resume=auto"], "/r", ["--resume", "auto"]),
        (["--resume", "/r"], "/r", []),
        (["--resume=/r", "--set", "train.epochs=9"], "/r", []),
        (["--resume", "auto", "--resume", "/r"], "/r", []),
        (["--run", "/q", "--run", "/r"], "/r", ["--resume", "auto"]),
        (["--data", "/d"], "", ["--resume", "auto"]),
        (["--resume", "auto"], "", ["--resume", "auto"]),
    ],
)
def test_the_run_of_a_command_and_how_it_goes_on(words, run, again):
    """``--resume RUN`` names the run by itself, and is said again after a loss; as argparse reads it."""
    command = ["python", "-m", "trainer", "train", *words]
    assert pair.run_of(command) == run
    assert pair.resume_command(command) == [*command, *again]


@pytest.mark.parametrize(("statuses", "status"), [([0, 0], 0), ([3, 3], 3), ([0, 3], 3), ([2, 0], 2), ([2, 2], 2)])
def test_foreseen_ends_are_final(statuses, status):
    assert pair.exit_status(statuses) == status


@pytest.mark.parametrize("statuses", [[-9, 2], [0, -15], [1, 2], [2, 1], [4, 0], [4, 4], [-9, 4]])
def test_killed_and_crashed_towers_are_worth_another_try(statuses):
    with pytest.raises(pair.TowerLost, match=r"tower [ab] (was ended by SIG|crashed|lost another one)"):
        pair.exit_status(statuses)


def test_pairs_agree_on_the_end(tmp_path):
    assert pair.common_exit_status(tmp_path, "7", num_replicas=2) is None
    write_json(tmp_path / "done-7-0", {"status": 0})
    assert pair.common_exit_status(tmp_path, "7", num_replicas=2) is None, "the other pair still works"
    write_json(tmp_path / "done-6-1", {"status": 0})
    assert pair.common_exit_status(tmp_path, "7", num_replicas=2) is None, "a mark of an attempt before this one"
    write_json(tmp_path / "done-7-1", {"status": 3})
    assert pair.common_exit_status(tmp_path, "7", num_replicas=2) == 3


@pytest.mark.parametrize(
    ("flag", "status"), [("_stopping", pair.STOPPED), ("_resizing", pair.STOPPED), ("_preempted", pair.PREEMPTED)]
)
def test_towers_that_our_own_signal_ended_are_not_lost(tmp_path, flag, status):
    """It may come while they still import, before they can catch it; or before their first step, which is 128 + 15."""
    settings = pair.PairSettings(("x",), str(tmp_path), 2, 1)
    monitor = pair.PairMonitor(settings, pair.Rendezvous(0, 1, "127.0.0.1", 1), (), "7")
    with pytest.raises(pair.TowerLost):
        monitor._record_end([-signal.SIGTERM, 0])
    setattr(monitor, flag, True)
    for code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        monitor._record_end([code, 0])
        told = 143 if (flag, code) == ("_stopping", 143) else status  # who stopped it is told that it had not begun
        assert pair.common_exit_status(tmp_path, "7", num_replicas=1) == told
        (tmp_path / "done-7-0").unlink()
    with pytest.raises(pair.TowerLost, match="SIGKILL"):
        monitor._record_end([-signal.SIGKILL, 0])


def test_one_refusal_ends_all_pairs(tmp_path):
    write_json(tmp_path / "done-7-1", {"status": 2})
    assert pair.common_exit_status(tmp_path, "7", num_replicas=4) == 2


def test_a_preempted_pair_waits_for_the_others_to_save(tmp_path):
    write_json(tmp_path / "done-7-0", {"status": pair.PREEMPTED})
    assert pair.common_exit_status(tmp_path, "7", num_replicas=2) is None
    write_json(tmp_path / "done-7-1", {"status": pair.STOPPED})
    assert pair.common_exit_status(tmp_path, "7", num_replicas=2) == pair.PREEMPTED


def test_pairs_are_asked_to_save_and_waited_for(tmp_path):
    ended, resize = tmp_path / pair.ENDED, tmp_path / pair.RESIZE
    ended.touch()  # of the resize before
    assert not pair.ask_to_save(tmp_path, timeout_s=0.05) and not resize.exists()

    def answer():
        while not resize.exists():
            time.sleep(0.01)
        ended.touch()

    pairs = threading.Thread(target=answer)
    pairs.start()
    assert pair.ask_to_save(tmp_path, timeout_s=60) and not resize.exists()
    pairs.join()


def test_submit_wraps_the_training_command(capsys):
    arguments = ["submit", "--print", "--replicas", "1:4", "--", "python", "-m", "trainer", "train", "--run", "/r"]
    assert main(arguments) == 0
    line = capsys.readouterr().out
    assert "python -m cluster.training.ray_train --towers 2 --replicas 1:4" in line and " --resize-every 60 " in line
    assert line.rstrip().endswith("-- python -m trainer train --run /r")
    assert " --submission-id train-" in line


@pytest.mark.parametrize("text", ["0", "3:2", "x"])
def test_bad_replicas(text, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["submit", "--replicas", text, "--", "true"])
    assert ended.value.code == 2


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_towers_do_not_outlive_their_worker(tmp_path):
    child = tmp_path / "pid"
    tower = f"import os, time; open({str(child)!r} + '.part', 'w').write(str(os.getpid()));"
    tower += f"os.rename({str(child)!r} + '.part', {str(child)!r}); time.sleep(600)"
    worker = "import os, subprocess, sys, time\n"
    worker += "command = [sys.executable, '-m', 'cluster.training.pair', str(os.getpid()), "
    worker += f"sys.executable, '-c', {tower!r}]\n"
    worker += "subprocess.Popen(command); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", worker], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not child.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = int(child.read_text())
    assert is_running(pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)


def test_orphan_ends_at_once():
    command = [sys.executable, "-m", "cluster.training.pair", "1", sys.executable, "-c", "print('never')"]
    assert os.getpid() != 1
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL and not done.stdout


def test_latest_step_of_a_file_that_is_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert latest_step(path) is None
    steps = [json.dumps({"kind": "step", "step": step, "images_per_s": 9.0}) for step in range(1, 400)]
    evaluation = json.dumps({"kind": "evaluation", "step": 399})
    path.write_text("\n".join([*steps, evaluation]) + '\n{"kind": "step", "step": 400, "ima')
    assert latest_step(path)["step"] == 399
