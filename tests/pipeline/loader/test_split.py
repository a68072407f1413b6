"""Sharded decoding: two towers that decode half a batch each get, after the exchange, what ``replicated`` gives."""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.loader.batch import Batch, SplitFeed
from pipeline.loader.batches import TrainingLoader
from pipeline.loader.config import LoaderConfig
from tests.helpers.loader_data_set import make_encodings

pytestmark = pytest.mark.numeric

CONFIG = LoaderConfig(crop_px=12, threads=1, color="deviation")
BATCH = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_encodings(tmp_path_factory.mktemp("split"), "jpeg", "png", "raw")


class Meeting:
    """Two threads exchange tensors, as two processes would through a group; counts what passes."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.parts: list[torch.Tensor | None] = [None, None]
        self.passed_bytes = 0

    def exchange(self, part: int, crops: torch.Tensor) -> torch.Tensor:
        self.parts[part] = crops
        self.barrier.wait()
        whole = torch.cat([tensor for tensor in self.parts if tensor is not None])
        self.barrier.wait()
        if part == 0:
            self.passed_bytes += crops.numel() * crops.element_size()
        assert crops.dtype == torch.uint8
        return whole


def read_both(
    folder: Path, config: LoaderConfig, batches: int, state: dict | None = None
) -> tuple[list[list[Batch]], int]:
    meeting = Meeting()
    results: list[list[Batch]] = [[], []]

    def tower(part: int) -> None:
        feed = SplitFeed(part, 2, lambda crops: meeting.exchange(part, crops))
        loader = TrainingLoader(folder, config, batch_size=BATCH, seed=5, split_feed=feed, state=state)
        for _ in range(batches):
            results[part].append(loader.next())

    threads = [threading.Thread(target=tower, args=(part,)) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results, meeting.passed_bytes


@pytest.mark.parametrize("encoding", ["jpeg", "png", "raw"])
@pytest.mark.parametrize(
    "recipe",
    [
        {"mean": "image"},
        {"mean": "image_center", "color_divisor": 1.1},
        {"mean": "channel", "normalize": "per_channel"},
        {"mean": "none", "normalize": "per_image", "color_divisor": 1.1},
    ],
)
def test_split_equals_each(folders: dict[str, Path], encoding: str, recipe: dict[str, object]) -> None:
    config = dataclasses.replace(CONFIG, **recipe)  # type: ignore[arg-type]
    whole = TrainingLoader(folders[encoding], config, batch_size=BATCH, seed=5)
    batches = 5  # into the second epoch, over a dropped batch
    towers, passed_bytes = read_both(folders[encoding], dataclasses.replace(config, decode="sharded"), batches)
    for a, b in zip(*towers, strict=True):
        expected = whole.next()
        assert torch.equal(a.images, b.images)
        scale = float(expected.images.abs().max())
        assert float((a.images - expected.images).abs().max()) <= 2e-6 * max(scale, 1)
        assert a.fingerprint == b.fingerprint == expected.fingerprint
        assert a.keys == expected.keys and torch.equal(a.labels, expected.labels)
        assert np.array_equal(a.draws, expected.draws)
    assert passed_bytes == batches * BATCH // 2 * 3 * 12 * 12  # uint8 pixels of half a batch, one way


def test_split_resumes(folders: dict[str, Path]) -> None:
    config = dataclasses.replace(CONFIG, decode="sharded")
    alone = SplitFeed(0, 1, lambda crops: crops)
    loader = TrainingLoader(folders["jpeg"], config, batch_size=BATCH, seed=5, split_feed=alone)
    for _ in range(4):
        loader.next()
    resumed = TrainingLoader(folders["jpeg"], config, batch_size=BATCH, seed=5, split_feed=alone, state=loader.state())
    for _ in range(3):
        a, b = loader.next(), resumed.next()
        assert a.fingerprint == b.fingerprint and torch.equal(a.images, b.images)


def test_each_tower_decodes_its_half_only(folders: dict[str, Path]) -> None:
    seen: list[tuple[int, ...]] = []

    def exchange(crops: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(crops.shape))
        return torch.cat([crops, crops])

    config = dataclasses.replace(CONFIG, decode="sharded")
    feed = SplitFeed(1, 2, exchange)
    TrainingLoader(folders["jpeg"], config, batch_size=BATCH, seed=5, split_feed=feed).next()
    assert seen == [(BATCH // 2, 3, 12, 12)]


def test_split_without_a_partner_decodes_the_whole_batch(folders: dict[str, Path]) -> None:
    a = TrainingLoader(folders["jpeg"], dataclasses.replace(CONFIG, decode="sharded"), batch_size=BATCH, seed=5).next()
    b = TrainingLoader(folders["jpeg"], CONFIG, batch_size=BATCH, seed=5).next()
    assert torch.equal(a.images, b.images)


def test_a_batch_that_cannot_be_split_is_refused(folders: dict[str, Path]) -> None:
    config = dataclasses.replace(CONFIG, decode="sharded")
    with pytest.raises(ConfigError, match="batch size 5 cannot be split among 2"):
        TrainingLoader(folders["jpeg"], config, batch_size=5, seed=5, split_feed=SplitFeed(0, 2, torch.clone))
    with pytest.raises(ConfigError, match="part 2 of 2"):
        TrainingLoader(folders["jpeg"], config, batch_size=4, seed=5, split_feed=SplitFeed(2, 2, torch.clone))
