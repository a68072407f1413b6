"""What processes that would not do the same work are told: values and folders, no hash."""

import hashlib
import types

import pytest

from trainer.parallel import status
from trainer.parallel.status import Fact

# A mesh of two processes, as far as `check_consistency` looks.
WORLD = types.SimpleNamespace(control=None, coord=types.SimpleNamespace(world=2, rank=0))


def told(monkeypatch, mine: Fact, theirs: Fact) -> str:
    def gather(everyone, own, group):
        everyone[:] = [own, ({"the thing": theirs}, own[1])]

    monkeypatch.setattr(status.dist, "all_gather_object", gather)
    with pytest.raises(status.PeerError) as refused:
        status.check_consistency(WORLD, {"the thing": mine})
    return str(refused.value)


def test_the_first_line_that_differs_is_shown(monkeypatch):
    mine, theirs = Fact(("a = 1", "b = 2", "c = 3")), Fact(("a = 1", "b = 4", "c = 5"))
    assert told(monkeypatch, mine, theirs) == (
        "the processes have different values of the thing: rank 0 b = 2, rank 1 b = 4"
    )
    assert told(monkeypatch, Fact(("a",)), Fact(("a", "z = 1"))).endswith("rank 0 nothing, rank 1 z = 1")


def test_a_folder_is_shown_instead_of_a_hash(monkeypatch):
    hashes = [hashlib.sha256(text).hexdigest() for text in (b"1", b"2")]
    said = told(monkeypatch, Fact(hashes[0], shown="/data on a"), Fact(hashes[1], shown="/data on b"))
    assert said.endswith("rank 0 /data on a, rank 1 /data on b") and not any(text in said for text in hashes)


def test_equal_values_are_no_matter(monkeypatch):
    def gather(everyone, own, group):
        everyone[:] = [own, ({"the thing": Fact(1, shown="/y")}, own[1])]

    monkeypatch.setattr(status.dist, "all_gather_object", gather)
    status.check_consistency(WORLD, {"the thing": Fact(1, shown="/x")})
