"""The figures for the shuffle: what they say of known orders, and of what the reader does."""

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.loader.batches import TrainingLoader
from pipeline.loader.bench import compare_orders, measure_shuffle, read_orders
from pipeline.loader.config import LoaderConfig
from tests.helpers.loader_data_set import make_data_set


def test_a_perfect_shuffle_scores_one() -> None:
    random = np.random.default_rng(0)
    quality = compare_orders(random.permutation(60_000), random.permutation(60_000), 100)
    assert quality.displacement == pytest.approx(1, abs=0.02)
    assert quality.spread == pytest.approx(1, abs=0.02)
    assert quality.batchmates == pytest.approx(1, abs=0.1)


def test_the_same_order_again_scores_worst() -> None:
    order = np.random.default_rng(0).permutation(5_000)
    quality = compare_orders(order, order, 50)
    assert quality.displacement == 0
    assert quality.spread == pytest.approx(3 / 5_000)
    assert quality.batchmates == pytest.approx(4_999 / 49)


def test_tars_in_another_order_alone_leave_neighbors_together() -> None:
    blocks = np.arange(10_000).reshape(100, 100)
    shuffled = blocks[np.random.default_rng(0).permutation(100)].ravel()
    quality = compare_orders(blocks.ravel(), shuffled, 100)
    assert quality.displacement > 0.8 and quality.spread < 0.05 and quality.batchmates > 90


def test_a_larger_buffer_mixes_better(tmp_path: Path) -> None:
    folder = make_data_set(tmp_path, encoding="raw", size=(4, 4), train=600, val=1, shard_size=20)
    qualities = [
        measure_shuffle(folder, LoaderConfig(crop_px=4, shuffle_buffer=buffer, threads=1), batch_size=10, seed=1)
        for buffer in (1, 30, 600)
    ]
    spreads = [quality.spread for quality in qualities]
    assert spreads[0] < spreads[1] < spreads[2] and spreads[2] > 0.9
    assert qualities[0].batchmates > 20 and qualities[2].batchmates < 2
    assert all(0.7 < quality.displacement < 1.3 for quality in qualities)


def test_orders_hold_every_sample_once(tmp_path: Path) -> None:
    folder = make_data_set(tmp_path, encoding="raw", size=(4, 4), train=23, val=1)
    config = LoaderConfig(crop_px=4, shuffle_buffer=6, threads=1)
    for order in read_orders(folder, config, batch_size=5, seed=2, epochs=3):
        assert sorted(order) == list(range(23))


def test_a_large_buffer_reserves_no_memory_beforehand(tmp_path: Path) -> None:
    """DALI's default is 1 MiB for each place in the buffer: 16 GiB here, after which a machine forks nothing more."""
    folder = make_data_set(tmp_path, encoding="raw", size=(4, 4), train=40, val=1)
    before = reserved_bytes()
    loader = TrainingLoader(folder, LoaderConfig(crop_px=4, shuffle_buffer=16_384, threads=1), batch_size=10, seed=1)
    loader.next()
    assert reserved_bytes() - before < 2**30
    loader.close()


def reserved_bytes() -> int:
    """Writable memory of this process, touched or not."""
    return int(re.findall(r"^VmData:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[0]) * 1024
