"""Some of the inputs of ``python -m tests.fuzz`` for runs, recipes, results and files of weights."""

from pathlib import Path

import pytest

from tests.helpers.fuzzing import Target, fuzz

COUNT = 1200  # of all targets together


def targets() -> list[Target]:
    from tests.fuzz import runs

    return runs.TARGETS


@pytest.mark.slow
def test_nothing_of_a_run_crashes_loops_or_writes_outside(tmp_path: Path) -> None:
    found, whole = [], sum(target.weight for target in targets())
    for target in targets():
        work = tmp_path / target.name
        work.mkdir()
        found += fuzz(target, work, seed=16, count=round(COUNT * target.weight / whole))
    assert not found, found[:5]
