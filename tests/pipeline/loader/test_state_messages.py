"""A loader's state of another data set is refused by the folder's name, not by a hash."""

import types
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DatasetError
from pipeline.loader import state
from pipeline.loader.config import LoaderConfig
from pipeline.loader.order import Order


def identity(fingerprint: str, seed: int = 0, skipped: tuple[str, ...] = ()) -> dict:
    manifest = types.SimpleNamespace(fingerprint=fingerprint)
    return state.identity(
        types.SimpleNamespace(manifest=manifest, skipped=skipped), LoaderConfig(), Order(np.array([8]), 4, seed)
    )


def test_another_data_set_is_named_by_its_folder() -> None:
    split = types.SimpleNamespace(folder=Path("/data/mine"))
    kept = {**identity("a" * 64), "epoch": 1, "position": 1}
    assert state.restore(identity("a" * 64), split, 2, kept) == (1, 1)
    with pytest.raises(DatasetError, match="saved with another data set than /data/mine") as refused:
        state.restore(identity("b" * 64), split, 2, kept)
    assert "aaaa" not in str(refused.value) and "bbbb" not in str(refused.value)
    with pytest.raises(DatasetError, match="seed 0, and this run has 1"):
        state.restore(identity("a" * 64, seed=1), split, 2, kept)


def test_a_million_skipped_keys_are_a_line() -> None:
    split = types.SimpleNamespace(folder=Path("/data/mine"))
    kept = {**identity("a", skipped=tuple(f"train-{number:08d}" for number in range(1_000_000))), "epoch": 0}
    with pytest.raises(
        DatasetError, match=r"skipped keys '1000000 of sha256 \w{16}', and this run has 'none'"
    ) as refused:
        state.restore(identity("a"), split, 2, kept)
    assert len(str(refused.value)) < 250
