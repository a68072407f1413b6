"""Replicas that take rows of the same batch: together they are the batch, and their number may change in a run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.loader.batch import Batch, BatchShare, SplitFeed
from pipeline.loader.batches import TrainingLoader
from pipeline.loader.config import LoaderConfig
from tests.helpers.loader_data_set import make_encodings

CONFIG = LoaderConfig(crop_px=12, threads=1, color="deviation")
BATCH = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_encodings(tmp_path_factory.mktemp("share"), "jpeg", "raw")


def assert_rows(whole: Batch, parts: list[Batch]) -> None:
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert sum((part.keys for part in parts), ()) == whole.keys
    assert np.array_equal(np.concatenate([part.draws for part in parts]), whole.draws)
    assert {part.order_fingerprint for part in parts} == {whole.order_fingerprint}
    assert len({part.fingerprint for part in parts}) == len(parts)


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("mean", ["image", "channel"])
def test_the_shares_are_the_batch(folders: dict[str, Path], encoding: str, parts: int, mean: str) -> None:
    """Bit for bit, into the second epoch."""
    config = dataclasses.replace(CONFIG, mean=mean)
    whole = TrainingLoader(folders[encoding], config, batch_size=BATCH, seed=5)
    shares = [
        TrainingLoader(folders[encoding], config, batch_size=BATCH, seed=5, share=BatchShare(part, parts))
        for part in range(parts)
    ]
    for _ in range(5):
        batches = [loader.next() for loader in shares]
        assert all(len(batch.images) == BATCH // parts for batch in batches)
        assert_rows(whole.next(), batches)


def test_a_state_serves_any_number_of_replicas(folders: dict[str, Path]) -> None:
    """Four replicas of two towers, then two where they stopped, then three, then one: the undisturbed batches."""
    size = 12

    def opened(part: int, parts: int, state: dict | None, tower: str = "a") -> TrainingLoader:
        config = CONFIG if tower == "a" else dataclasses.replace(CONFIG, prefetch=4, threads=2, mmap=False)
        share = BatchShare(part, parts)
        return TrainingLoader(folders["raw"], config, batch_size=size, seed=5, share=share, state=state)

    undisturbed = opened(0, 1, None)
    state = None
    for parts in (4, 2, 3, 1):
        towers = [[opened(part, parts, state, tower) for part in range(parts)] for tower in "ab"]
        for _ in range(2):
            expected = undisturbed.next()
            a, b = ([loader.next() for loader in loaders] for loaders in towers)
            assert_rows(expected, a)
            assert_rows(expected, b)
            assert [batch.fingerprint for batch in a] == [batch.fingerprint for batch in b]
        states = [loader.state() for loaders in towers for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[-1]


def test_split_feeding_inside_a_replica(folders: dict[str, Path]) -> None:
    """Replica 1 of 2 on three towers' decoders: each gets a sixth of the batch, their union is the replica's rows."""
    crops: dict[int, torch.Tensor] = {}

    def read_part(tower: int) -> None:
        def keep(own: torch.Tensor) -> torch.Tensor:
            crops[tower] = own
            return torch.cat([own] * 3)

        feed = SplitFeed(tower, 3, keep)
        config = dataclasses.replace(CONFIG, decode="sharded")
        share = BatchShare(1, 2)
        loader = TrainingLoader(folders["jpeg"], config, batch_size=BATCH, seed=5, split_feed=feed, share=share)
        loader.next()

    for tower in range(3):
        read_part(tower)
    union = torch.cat([crops[tower] for tower in range(3)])
    config = dataclasses.replace(CONFIG, decode="sharded")
    feed = SplitFeed(0, 1, lambda own: union)  # decodes all rows, and gets them from elsewhere
    found = TrainingLoader(
        folders["jpeg"], config, batch_size=BATCH, seed=5, split_feed=feed, share=BatchShare(1, 2)
    ).next()
    expected = TrainingLoader(folders["jpeg"], CONFIG, batch_size=BATCH, seed=5, share=BatchShare(1, 2)).next()
    assert found.keys == expected.keys
    assert float((found.images - expected.images).abs().max()) <= 2e-6 * float(expected.images.abs().max())


def test_what_cannot_be_shared_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="batch size 6 cannot be divided among 4 replicas"):
        TrainingLoader(folders["jpeg"], CONFIG, batch_size=BATCH, seed=5, share=BatchShare(0, 4))
    with pytest.raises(ConfigError, match="part 2 of 2"):
        TrainingLoader(folders["jpeg"], CONFIG, batch_size=BATCH, seed=5, share=BatchShare(2, 2))
