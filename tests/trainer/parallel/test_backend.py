"""What carries the tensors: decided by all processes alike, from what each tells; and what NCCL is told besides."""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.tiny_run import RECIPE
from trainer.errors import PeerError
from trainer.parallel import backend, launch
from trainer.parallel.backend import Standing, agree, decide, fault_of, nccl_environment, reason_of

CARD, OTHER = "GPU-1111", "GPU-2222"


def standing(asked: str = "auto", gpu: str = CARD, host: str = "", shares: bool = False) -> Standing:
    return Standing(asked, gpu, host, shares)


@pytest.mark.parametrize(
    ("standings", "expected"),
    [
        ([standing(), standing(gpu=OTHER)], "nccl"),
        ([standing(), standing()], "gloo"),  # one card: NCCL would refuse it
        ([standing(host="a"), standing(host="b")], "nccl"),  # NCCL believes them on two hosts
        ([standing(host="a"), standing(host="a")], "gloo"),
        ([standing(shares=True), standing(shares=True)], "nccl"),
        ([standing(shares=True), standing()], "gloo"),  # the other's NCCL refuses it
        ([standing(gpu=""), standing(gpu="")], "gloo"),
        ([standing(gpu=""), standing()], "gloo"),  # a CPU beside a GPU
        ([standing("gloo"), standing("gloo", gpu=OTHER)], "gloo"),
        ([standing("nccl"), standing("nccl", gpu=OTHER)], "nccl"),
        ([standing(), standing(gpu=OTHER), standing(), standing(gpu=OTHER)], "gloo"),  # two pairs on two cards
    ],
)
def test_all_decide_alike(standings: list[Standing], expected: str) -> None:
    assert decide(standings) == expected


@pytest.mark.parametrize(
    ("standings", "named"),
    [
        ([standing("nccl", gpu=""), standing("nccl")], "rank 0 has no GPU; leave --backend out"),
        ([standing("nccl"), standing("nccl", gpu=OTHER), standing("nccl")], "ranks 0 and 2 are on one GPU"),
        ([standing("nccl"), standing("gloo", gpu=OTHER)], "not the same in all processes: rank 0 nccl, rank 1 gloo"),
        ([standing("auto"), standing("nccl", gpu=OTHER)], "rank 0 auto, rank 1 nccl"),
    ],
)
def test_what_cannot_be_is_refused_by_name(standings: list[Standing], named: str) -> None:
    with pytest.raises(PeerError, match=named):
        decide(standings)


def test_each_learns_where_the_others_stand_from_the_store() -> None:
    store = dist.HashStore()
    store.set("standing-1", '["auto", "GPU-2222", "", false]')
    assert agree(store, 0, 2, standing()) == "nccl"
    assert agree(store, 1, 2, standing()) == "gloo"
    for told in (b'["auto", "GPU-2222", ""]', b"\xff\n", b'["mpi", "", "", false]'):
        store.set("standing-0", told)
        with pytest.raises(PeerError, match="rank 0 does not tell which GPU it has"):
            agree(store, 1, 2, standing())


def test_several_ranks_a_card_need_the_variable_and_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, told, expected in (((2, 30, 7), "1", True), ((2, 28, 9), "1", False), ((2, 31), "0", False)):
        monkeypatch.setattr(backend, "nccl_version", lambda version=version: version)
        assert backend.takes_several_ranks({backend.MULTI_RANK: told}) is expected
        assert backend.takes_several_ranks({}) is False


def test_towers_on_one_card_are_told_apart() -> None:
    first, second = (nccl_environment(rank, {}) for rank in (0, 1))
    assert first["NCCL_HOSTID"] != second["NCCL_HOSTID"]
    assert first["NCCL_SOCKET_IFNAME"] == "lo" and first["NCCL_IB_DISABLE"] == "1"
    own = nccl_environment(1, {"NCCL_HOSTID": "mine", "NCCL_SOCKET_IFNAME": "eth0", "NCCL_IB_DISABLE": "0"})
    assert own == {"NCCL_HOSTID": "mine-1", "NCCL_SOCKET_IFNAME": "eth0", "NCCL_IB_DISABLE": "0"}


def test_the_launcher_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_HOSTID", raising=False)
    program = (
        "import os, sys; open(sys.argv[1] + '/' + os.environ['RANK'], 'w').write(os.environ.get('NCCL_HOSTID', ''))"
    )
    for on_one, expected in ((False, ["", ""]), (True, ["twotower-0", "twotower-1"])):
        assert launch.run_towers([sys.executable, "-c", program, str(tmp_path)], 2, nccl_on_one_gpu=on_one) == 0
        assert [(tmp_path / rank).read_text() for rank in "01"] == expected


@pytest.mark.parametrize(
    ("gpus", "device", "shared", "processes"),
    [
        (0, None, True, 1),
        (1, None, True, 1),
        (1, "cuda:0", True, 1),
        (2, None, False, 2),
        (2, "cuda", False, 2),
        (2, "cuda:1", True, 1),  # one GPU by its number
        (2, "cpu", False, 1),
        (8, None, False, 2),
    ],
)
def test_a_tower_a_gpu_where_there_are_two(
    gpus: int, device: str | None, shared: bool, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert launch.shares_gpu(device, 2) is shared
    assert launch.default_processes(device, towers=2) == processes
    assert launch.default_processes(device, towers=1) == 1


class Group:
    """A group whose NCCL has something to say."""

    def __init__(self, error: str) -> None:
        self.error, self.aborted = types.SimpleNamespace(name=error), False

    def _get_backend(self, device: torch.device) -> "Group":
        assert device.type == "cuda"
        return self

    def get_error(self) -> object:
        return self.error

    def abort(self) -> None:
        self.aborted = True


def test_what_nccl_reports_is_told_and_every_group_is_aborted() -> None:
    groups = [Group("SUCCESS"), Group("REMOTE_ERROR")]
    assert fault_of(groups[:1]) == "" and fault_of(groups) == "remote error"
    backend.abort_groups(groups)
    assert all(group.aborted for group in groups)


def test_an_error_of_nccl_is_told_by_its_own_words() -> None:
    text = (
        "NCCL error in: ProcessGroupNCCL.cpp:94, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2\n"
        "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
        "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000\n"
    )
    assert reason_of(RuntimeError(text)).startswith("Duplicate GPU detected")
    assert reason_of(RuntimeError("first\nsecond")) == "first" and reason_of(RuntimeError("")) == "RuntimeError"


def test_nccl_without_a_gpu_is_refused_before_anything_is_started(
    tiny_data: Path, trainer: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """One line, not one of each tower; and no run is begun."""
    run, device = tmp_path / "run", ("--device", "cpu", "--backend", "nccl")
    for words in (("train", *RECIPE, "--data", tiny_data, "--run", run), ("bench", "--synthetic", *RECIPE)):
        status, _, err = trainer(*words, "--processes", 2, *device)
        assert status == 2 and err.count("\n") == 1, err
        assert err.startswith("error: --backend nccl: it needs a GPU") and not run.exists()
    launch.check_backend("nccl", "cpu", 1)
    launch.check_backend("nccl", "cuda:0", 2)
