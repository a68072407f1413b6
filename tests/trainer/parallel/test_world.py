"""Variables of torchrun, Ray and schedulers: joined where they are whole, no trouble where they were left behind."""

import os
import sys
from pathlib import Path

import pytest

from trainer.errors import PeerError
from trainer.parallel import launch
from trainer.parallel.world import NEEDED, World, has_interface, read_world
from trainer.stopping import Stopped
from twotower.meeting import SECRET, STORE

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = WHOLE | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("processes", "environment", "expected"),
    [
        (None, {}, None),
        (None, SLURM, None),
        (None, {"WORLD_SIZE": "8", "MASTER_PORT": "x", "LOCAL_RANK": "x"}, None),  # RANK decides
        (None, TORCHRUN, World(1, 4, 1, 2)),
        (2, TORCHRUN, World(1, 4, 1, 2)),  # the command of a Ray job says --processes 2, too
        (None, WHOLE, World(1, 4, 1, 2)),  # Kubeflow's operator sets no more
        (None, WHOLE | {"LOCAL_RANK": "7", "WORLD_SIZE": "8"}, World(1, 8, 7, 2)),
        (1, TORCHRUN, None),  # one means one
        (1, {"RANK": "x"}, None),
        (None, WHOLE | {"RANK": ""}, None),
        (None, {"RANK": "0", "WORLD_SIZE": "1"}, None),  # Kubeflow's job of one replica
        (2, {"RANK": "0", "WORLD_SIZE": "1"}, None),
    ],
)
def test_whom_to_join(processes: int | None, environment: dict[str, str], expected: World | None) -> None:
    assert read_world(processes, environment) == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"WORLD_SIZE": "", "MASTER_ADDR": ""}, "WORLD_SIZE, MASTER_ADDR not; unset RANK"),
        ({"MASTER_PORT": ""}, "MASTER_PORT not; unset RANK"),
        ({"RANK": "first"}, "RANK=first: expected a whole number from 0 to 3"),
        ({"RANK": "4"}, "RANK=4"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "3"}, "WORLD_SIZE=3"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT=tcp://10.0.0.1:80"),  # as Kubernetes has it of a service
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2"),
        ({"LOCAL_WORLD_SIZE": "none"}, "LOCAL_WORLD_SIZE=none"),
        ({"GLOO_SOCKET_IFNAME": "no9"}, "GLOO_SOCKET_IFNAME=no9: no such network interface here; there are"),
        ({"NCCL_SOCKET_IFNAME": "=l"}, "NCCL_SOCKET_IFNAME==l"),
    ],
)
def test_what_cannot_be_is_named(change: dict[str, str], named: str) -> None:
    """One line, before anything is written."""
    with pytest.raises(PeerError) as error:
        read_world(None, WHOLE | change)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_interfaces() -> None:
    """NCCL's ways of naming them."""
    for names in ("lo", "l", "=lo", "no9,lo", "^no9"):
        assert has_interface(names), names
    for names in ("no9", "=l", "^l,e,i,d,v,w,b,t"):
        assert not has_interface(names), names


def test_what_our_own_towers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interfaces that are not here are forgotten, all towers are on this machine; others are kept."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no9")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "no9")
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    meeting = {STORE: "/x/store", SECRET: "s"}
    told = launch.tower_environment(0, meeting)
    assert told["GLOO_SOCKET_IFNAME"] == told["NCCL_SOCKET_IFNAME"] == "lo", "no other machine can reach them"
    assert [told[name] for name in NEEDED] == ["0", "2"] and meeting.items() <= told.items()
    assert "MASTER_ADDR" not in told, "there is nobody who listens"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=lo")
    assert launch.tower_environment(0, meeting)["NCCL_SOCKET_IFNAME"] == "=lo"


@pytest.mark.parametrize(
    ("given", "told"), [("abc", "share"), ("0", "share"), ("-2", "share"), ("", "share"), ("3", "3"), ("2,1", "2,1")]
)
def test_threads_of_our_own_towers(given: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What OpenMP would not take is as if it were not set: each tower gets its share of the cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    read = "os.environ['OMP_NUM_THREADS']"
    program = f"import os, pathlib, sys; pathlib.Path(sys.argv[1], os.environ['RANK']).write_text({read})"
    assert launch.run_towers([sys.executable, "-c", program, str(tmp_path)], 2) == 0
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for rank in ("0", "1"):
        assert (tmp_path / rank).read_text() == (share if told == "share" else told)


def test_a_stop_before_the_towers_know_each_other(capfd: pytest.CaptureFixture[str]) -> None:
    """One has ended; the other waits for it in C++, hears nothing, and is not waited for."""
    program = (
        "import os, signal, time; from trainer import stopping\n"
        "if os.environ['RANK'] == '0': os.kill(os.getppid(), signal.SIGTERM)\n"
        "else: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.environ['RANK'] == '0':\n"
        "    try: stopping.raise_on_stop(); time.sleep(1000)\n"
        "    except stopping.Stopped as stop: raise SystemExit(stop.status)\n"
        "time.sleep(1000)"
    )
    with pytest.raises(Stopped) as stop:
        launch.run_towers([sys.executable, "-c", program], 2)
    assert stop.value.status == 143
    assert capfd.readouterr().err == ""
