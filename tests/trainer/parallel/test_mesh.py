"""Who stands where, and how gradients are dealt out to buckets."""

import dataclasses
import datetime
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.helpers.pair import run_mesh
from trainer.errors import CheckpointError, LostError, PeerError
from trainer.parallel.data_parallel import fill_buckets
from trainer.parallel.failures import FailureStore
from trainer.parallel.mesh import Mesh, MeshCoord, check_world


def test_pairs_are_neighbors_and_groups_cover_the_world() -> None:
    places = [MeshCoord(rank, 6) for rank in range(6)]
    assert [(place.replica, place.tower) for place in places] == [
        (0, "a"),
        (0, "b"),
        (1, "a"),
        (1, "b"),
        (2, "a"),
        (2, "b"),
    ]
    for place in places:
        assert place.replicas == 3 and place.rank in place.pair and place.rank in place.same_tower
        assert [MeshCoord(rank, 6).replica for rank in place.pair] == [place.replica] * 2
        assert {MeshCoord(rank, 6).tower for rank in place.same_tower} == {place.tower}
        assert len(place.same_tower) == 3


@pytest.mark.parametrize("world", [1, 3, 0])
def test_a_world_without_pairs_is_refused(world: int) -> None:
    with pytest.raises(PeerError, match=f"{world} processes were started"):
        check_world(world)


def test_the_first_report_is_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was killed says nothing, and whoever sees it first names it: worth another try."""
    monkeypatch.setattr("trainer.parallel.failures.REPORT_WAIT_S", 0.0)
    store = dist.HashStore()
    first = FailureStore(store).lost("tower b (rank 1) is lost at conv3")
    assert isinstance(first, LostError) and first.status == 4
    for vague in (False, True):
        assert str(FailureStore(store).lost("tower a (one of ranks 0, 4) is lost", vague=vague)) == str(first)


def test_an_error_of_its_own_is_the_cause_and_would_come_again() -> None:
    store = dist.HashStore()
    FailureStore(store).ended(3, CheckpointError("no room"))
    found = FailureStore(store).lost("tower b (rank 3) is lost at control")
    assert str(found) == "rank 3 ended: CheckpointError: no room"
    assert isinstance(found, PeerError) and not isinstance(found, LostError) and found.status == 2


def test_buckets_keep_the_order_and_the_limit() -> None:
    """Sizes in bytes 400, 80, 40, 8000, 40: the large one travels alone, none is left out."""
    parameters = [nn.Parameter(torch.empty(size)) for size in (100, 20, 10, 2000, 10)]
    buckets = fill_buckets(parameters, limit_bytes=500)
    assert [[p.nbytes for p in bucket] for bucket in buckets] == [[400, 80], [40], [8000], [40]]
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in parameters]
    assert fill_buckets([]) == []


def test_a_start_may_take_long_and_a_step_may_not(tmp_path: Path) -> None:
    """Until the first step the start's limit counts (150 s here), from then on that of the steps (1 s)."""
    reason, waited = run_mesh(slow_start_then_silence, tmp_path / "told", replicas=1)
    assert "is lost" in reason and waited is True


def slow_start_then_silence(mesh: Mesh, told: Path) -> str | bool:
    """Tower b comes 3 s late, and then never again; what tower a says of it, or whether a had said it in time."""
    mesh = dataclasses.replace(mesh, peer_timeout=datetime.timedelta(seconds=1))
    time.sleep(3 * mesh.coord.rank)
    mesh.link.control([1, 0, 0])
    mesh.begin_steps()
    dist.barrier = lambda: None  # of the helper that called this: there is nobody left to meet
    if mesh.coord.rank:
        deadline = time.monotonic() + 100
        while not told.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return told.exists()
    try:
        mesh.link.control([2, 0, 0])
    except PeerError as error:
        return str(error)
    finally:
        told.touch()
    return "nothing"
