"""A loader's state of another data set is refused by the folder's name, not by a hash."""

import types
from pathlib import Path

import pytest

from pipeline.errors import DatasetError
from pipeline.loader import state


def reader(fingerprint: str, seed: int = 0):
    config = types.SimpleNamespace(shuffle="epoch", shuffle_buffer=8, last_batch="drop")
    manifest = types.SimpleNamespace(fingerprint=fingerprint)
    split = types.SimpleNamespace(manifest=manifest, skipped=(), folder=Path("/data/mine"))
    return types.SimpleNamespace(split=split, batch_size=4, seed=seed, config=config)


def test_another_data_set_is_named_by_its_folder():
    kept = state.identity(reader("a" * 64))
    with pytest.raises(DatasetError, match="saved with another data set than /data/mine") as refused:
        state.restore(reader("b" * 64), kept)
    assert "aaaa" not in str(refused.value) and "bbbb" not in str(refused.value)
    with pytest.raises(DatasetError, match="seed 0, and this run has 1"):
        state.restore(reader("a" * 64, seed=1), kept)
