"""The figures for the shuffle: what they say of known orders, and of what the order does."""

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.loader.batches import TrainingLoader
from pipeline.loader.bench import compare_orders, measure_shuffle, orders
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


@pytest.mark.parametrize("shape", [(50, 2000, 128), (100, 640, 64), (64, 256, 512)])
def test_epochs_are_mixed_as_by_a_perfect_shuffle(shape: tuple[int, int, int]) -> None:
    """Also where tars and stretches fit each other, as 640 samples of a tar and 1,000 of a stretch do."""
    num_tars, size, batch_size = shape
    quality = measure_shuffle(np.full(num_tars, size), LoaderConfig(), batch_size=batch_size, seed=1)
    assert quality.displacement == pytest.approx(1, abs=0.1)
    assert quality.spread == pytest.approx(1, abs=0.1)
    assert quality.batchmates == pytest.approx(1, abs=0.1)


def test_once_is_the_same_order_again() -> None:
    first, second = orders(np.array([3, 1, 4]), LoaderConfig(shuffle="once"), batch_size=3, seed=1, epochs=2)
    assert first.tolist() == second.tolist() == list(range(8))


def test_a_loader_reserves_no_memory_beforehand(tmp_path: Path) -> None:
    """DALI's own reader took up to 16 GiB, after which a machine forks nothing more."""
    folder = make_data_set(tmp_path, encoding="raw", size=(4, 4), train=40, val=1)
    before = reserved_bytes()
    loader = TrainingLoader(folder, LoaderConfig(crop_px=4, threads=1), batch_size=10, seed=1)
    loader.next()
    assert reserved_bytes() - before < 2**30
    loader.close()


def reserved_bytes() -> int:
    """Writable memory of this process, touched or not."""
    return int(re.findall(r"^VmData:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[0]) * 1024
