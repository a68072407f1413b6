"""verify and inspect on several processes say what they say on one."""

import os
from pathlib import Path

import pytest

from pipeline.errors import DatasetError
from pipeline.inspection import over_shards
from pipeline.inspection.inspect import read_contents
from pipeline.inspection.verify import check_dataset
from tests.helpers.shard_data import make_dataset


def test_little_is_done_in_this_process() -> None:
    found = list(over_shards.over_shards(lambda shared, item: (shared, item, os.getpid()), 1, [2, 3], size_bytes=10))
    assert found == [(1, 2, os.getpid()), (1, 3, os.getpid())]


@pytest.mark.slow
def test_several_processes_find_the_same_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_dataset(tmp_path, count=10)
    for shard in manifest.splits["train"].shards[::2]:
        tar = bytearray((tmp_path / shard.name).read_bytes())
        tar[600] ^= 1
        (tmp_path / shard.name).write_bytes(tar)
    reported: list[int] = []
    alone = check_dataset(tmp_path, manifest, level="full"), read_contents(tmp_path, manifest, "val")
    monkeypatch.setattr(over_shards, "SMALL_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    together = check_dataset(tmp_path, manifest, level="full", report=reported.append)
    assert together == alone[0] and len(together) >= 2
    assert sum(reported) == manifest.num_samples
    contents = read_contents(tmp_path, manifest, "val")
    assert (contents.classes, contents.converted) == (alone[1].classes, alone[1].converted)
    assert contents.widths_px.tolist() == alone[1].widths_px.tolist()


@pytest.mark.slow
def test_what_goes_wrong_in_a_process_comes_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_dataset(tmp_path, count=10)
    (tmp_path / manifest.splits["train"].shards[1].index_name).unlink()
    monkeypatch.setattr(over_shards, "SMALL_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(DatasetError, match="no valid index"):
        read_contents(tmp_path, manifest, "train")
