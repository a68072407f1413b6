"""What processes that would not do the same work are told: values and folders, no hash."""

import hashlib
import json
import types

import pytest

from trainer.parallel import status
from trainer.parallel.status import Fact

# A mesh of two processes, as far as `check_consistency` looks.
WORLD = types.SimpleNamespace(control=None, coord=types.SimpleNamespace(world=2, rank=0))


def told(monkeypatch, mine: Fact, theirs: Fact) -> str:
    answer(monkeypatch, lambda own: [own[0], {"the thing": [theirs.value, theirs.shown]}])
    with pytest.raises(status.PeerError) as refused:
        status.check_consistency(WORLD, {"the thing": mine})
    return str(refused.value)


def answer(monkeypatch, make) -> None:
    """The other process says what ``make`` makes of our own words, through JSON as on the wire."""

    def gather(own, group):
        return [json.loads(json.dumps(each)) for each in (own, make(own))]

    monkeypatch.setattr(status, "all_gather_json", gather)


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
    answer(monkeypatch, lambda own: [own[0], {"the thing": [1, "/y"]}])
    status.check_consistency(WORLD, {"the thing": Fact(1, shown="/x")})


@pytest.mark.parametrize(
    "words",
    [5, [], ["host"], ["host", []], ["host", {}], ["host", {"the thing": 1}], ["host", {"the thing": [1]}],
     ["host", {"the thing": [1, 2]}], ["host", {"another": [1, ""]}], [1, {"the thing": [1, ""]}]],
)  # fmt: skip
def test_whoever_answers_something_else_is_refused(monkeypatch, words):
    answer(monkeypatch, lambda own: words)
    with pytest.raises(status.PeerError, match="rank 1 does not tell what is to be compared"):
        status.check_consistency(WORLD, {"the thing": Fact(1)})


def test_what_another_process_says_stays_in_its_line(monkeypatch):
    said = told(monkeypatch, Fact("x"), Fact("y\nerror: the disk is gone\x1b[2J"))
    assert said.endswith(r"rank 0 x, rank 1 y\nerror: the disk is gone\x1b[2J")
