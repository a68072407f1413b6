"""The checks of doctor: each fault is found and comes with something to do."""

import contextlib
import os
import socket
import subprocess
import sys
from collections import namedtuple
from importlib.metadata import version

import pytest

from cluster import doctor, host_checks, local
from cluster.host_checks import Finding

SMI = "| NVIDIA-SMI 580.1   Driver Version: 580.1   CUDA Version: {} |"
TWO = "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n"
PACKAGES = {"nvidia-nccl-cu13": "2.30.7", "nvidia-dali-cuda130": "2.4.0"}
Usage = namedtuple("Usage", "total used free")


def levels(findings) -> list[str]:
    findings = list(findings)
    assert all(finding.fix for finding in findings if finding.level == "bad"), "a bad finding says what to do"
    return [finding.level for finding in findings]


def node(ip: str, now: float, state: str = "ALIVE") -> dict:
    return {"ip": ip, "now": now, "raylet": {"state": state, "resourcesTotal": {"CPU": 4.0}}}


def test_clocks():
    assert levels(doctor.check_nodes([node("a", 1000.0), node("b", 1009.0)])) == ["ok", "ok"]
    _, clocks = doctor.check_nodes([node("a", 1000.0), node("b", 1100.0)])
    assert clocks.level == "bad" and "b is 100 s ahead of a" in clocks.seen


def test_lost_nodes_are_shown_and_their_clocks_are_not_read():
    (seen,) = doctor.check_nodes([node("a", 1000.0), node("b", 1.0, "DEAD")])
    assert (seen.level, seen.seen) == ("note", "1 alive with 4 CPUs and 0 GPUs, 1 lost")


@pytest.mark.parametrize("free", [0, 4 * host_checks.GIB])
def test_full_disk(monkeypatch, tmp_path, free):
    monkeypatch.setattr(host_checks.shutil, "disk_usage", lambda place: Usage(1000 * host_checks.GIB, 0, free))
    assert levels(host_checks.check_disk(tmp_path / "not" / "yet" / "made")) == ["bad"]


def test_small_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(
        host_checks.shutil, "disk_usage", lambda place: Usage(64 << 20, 0, 64 << 20)
    )  # docker's default
    assert levels(host_checks.check_shared_memory(tmp_path)) == ["bad"]
    assert levels(host_checks.check_shared_memory(tmp_path / "missing")) == ["bad"]


def test_few_open_files(monkeypatch):
    monkeypatch.setattr(host_checks.resource, "getrlimit", lambda which: (1024, 1048576))
    (finding,) = host_checks.check_file_limit()
    assert finding.level == "note" and finding.fix == "ulimit -n 1048576"


def test_no_gpu_is_no_fault(monkeypatch):
    monkeypatch.setattr(host_checks.shutil, "which", lambda name: None)
    assert levels(host_checks.check_gpu()) == ["note"]


def test_gpus_nccl_and_driver():
    assert levels(host_checks.judge_gpus(TWO, SMI.format("13.0"), PACKAGES)) == ["ok", "ok"]
    old = list(host_checks.judge_gpus(TWO, SMI.format("12.8"), PACKAGES))
    assert levels(old) == ["ok", "ok", "bad"] and "supports CUDA 12.8" in old[-1].seen
    one = TWO.splitlines()[0]
    assert levels(host_checks.judge_gpus(one, SMI.format("13.0"), {})) == ["note", "bad"]


@pytest.mark.parametrize(
    ("packages", "level"),
    [
        ({}, "bad"),
        ({"nvidia-dali-cuda130": "2.4.0"}, "ok"),
        ({"nvidia-dali-cuda130": "2.4.0", "nvidia-dali-cuda120": "1.50"}, "bad"),
    ],
)
def test_dali(monkeypatch, packages, level):
    monkeypatch.setattr(host_checks, "installed", lambda: packages)
    assert levels(host_checks.check_dali()) == [level]


def test_dali_of_this_installation_is_found():
    assert levels(host_checks.check_dali()) == ["ok"]


@pytest.mark.parametrize(("ours", "level"), [("2.54.1", "bad"), ("2.60.0", "ok"), ("3.0.0", "ok")])
def test_ray_with_known_holes(monkeypatch, ours, level):
    monkeypatch.setattr(doctor, "version", lambda name: ours)
    assert levels(doctor.check_ray()) == [level]


def test_token_in_the_environment_is_worth_a_note(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret-of-this-test")
    (finding,) = host_checks.check_token()
    assert finding.level == "note" and "secret-of-this-test" not in str(finding)


def _socket_at(stack, host: str) -> int:
    found = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
    found.bind((host, 0))
    found.listen()
    return found.getsockname()[1]


def test_ports_that_listen_on_more_than_loopback():
    with contextlib.ExitStack() as stack:
        wide = {_socket_at(stack, host) for host in ("0.0.0.0", "::", "::ffff:0.0.0.0")}
        narrow = {_socket_at(stack, host) for host in ("127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1")}
        found = host_checks.open_ports({os.getpid()})
        assert wide <= found and not narrow & found
        assert not wide & host_checks.open_ports({1})


@pytest.mark.parametrize(("host", "wanted"), [("0.0.0.0", ["bad"]), ("127.0.0.1", ["ok"])])
def test_a_local_cluster_that_listens_on_all_interfaces(tmp_path, host, wanted):
    """A process in a session of its own stands for a node; the socket is real."""
    code = f"import socket, time\ns = socket.create_server(({host!r}, 0))\n"
    code += "print(s.getsockname()[1], flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, local.PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            address = f"http://127.0.0.1:{int(process.stdout.readline())}"
            node = local.LocalNode(process.pid, local._start_time(process.pid), head=True)
            local.save(tmp_path, local.LocalCluster(address, "127.0.0.1:1", (node,)))
            assert levels(doctor.check_binding(address, tmp_path)) == wanted
            assert levels(doctor.check_binding("http://127.0.0.1:1", tmp_path)) == [], "another cluster"
        finally:
            process.kill()


@pytest.mark.parametrize(("theirs", "level"), [("2.54.0", "bad"), ("2.999.0", "bad"), (version("ray"), "ok")])
def test_ray_of_the_cluster(theirs, level):
    (finding,) = doctor._check_version(theirs)
    assert finding.level == level and theirs in finding.seen


def test_token_that_crosses_a_network_in_clear_text(monkeypatch):
    """Only the finding about the way is looked at: nothing of a network is touched."""
    monkeypatch.setattr(doctor, "_status_without_token", lambda address: 401)
    monkeypatch.setattr(doctor.Client, "version", lambda self: version("ray"))
    monkeypatch.setattr(doctor.Client, "nodes", lambda self: [])
    found = {address: list(doctor.check_cluster(address)) for address in ("http://10.0.0.7:1", "https://10.0.0.7:1")}
    assert "not encrypted" in found["http://10.0.0.7:1"][-1].seen and found["http://10.0.0.7:1"][-1].level == "bad"
    assert "bad" not in levels(found["https://10.0.0.7:1"])


def test_port_taken_by_another_program():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        findings = list(doctor._check_port(f"http://127.0.0.1:{other.getsockname()[1]}"))
    assert levels(findings) == ["bad"] and "taken by another program" in findings[0].seen


def test_finding_shows_its_fix_below():
    assert str(Finding("bad", "disk", "full", "free some")) == "bad   disk: full\n      -> free some"
