"""How well the reader's two shuffles (whole tars, and a buffer) mix an epoch, measured on the order that they give."""

import dataclasses
from pathlib import Path

import numpy as np

from pipeline.loader.batch import read_keys
from pipeline.loader.config import LoaderConfig
from pipeline.loader.graph import Reader, build_pipeline, encoded_graph
from pipeline.loader.open_split import open_split


@dataclasses.dataclass(frozen=True)
class ShuffleQuality:
    """Two epochs compared. For a perfect shuffle each figure is 1, for the same order again 0, 0 and large.

    Attributes:
        displacement: mean distance between a sample's places in the two epochs, against the n/3 of a perfect shuffle.
        spread: mean distance, in the second epoch, of neighbours in the first, against n/3. Samples of
            one tar stay within about a tar and a buffer of each other, so large data sets have small figures.
        batchmates: how often two samples of one batch meet in one batch of the next epoch, against a perfect shuffle.
    """

    displacement: float
    spread: float
    batchmates: float


def compare_orders(first: np.ndarray, second: np.ndarray, batch_size: int) -> ShuffleQuality:
    """Compares two orders of the same samples.

    Args:
        first, second: (n,) sample numbers 0..n-1, each once.
        batch_size: samples a batch, >= 2.
    """
    count = len(first)
    place = np.empty(count, np.int64)
    place[second] = np.arange(count)
    moved = place[first]  # where the samples of the first epoch, in order, are in the second
    displacement = np.abs(moved - np.arange(count)).mean() / (count / 3)
    spread = np.abs(np.diff(moved)).mean() / (count / 3)
    whole = count // batch_size * batch_size
    batches = np.sort((moved[:whole] // batch_size).reshape(-1, batch_size), axis=1)
    met = sum(_pairs(row) for row in batches)
    pairs = len(batches) * batch_size * (batch_size - 1) / 2
    return ShuffleQuality(float(displacement), float(spread), float(met / pairs * (count - 1) / (batch_size - 1)))


def _pairs(batch: np.ndarray) -> int:
    """Pairs of equal numbers in a sorted row."""
    sizes = np.unique(batch, return_counts=True)[1]
    return int((sizes * (sizes - 1) // 2).sum())


def read_orders(folder: Path, config: LoaderConfig, *, batch_size: int, seed: int, epochs: int) -> list[np.ndarray]:
    """The orders in which the training samples come, as sample numbers; reads without decoding (100,000 samples/s)."""
    reader = Reader(open_split(folder, "train"), config, batch_size, "cpu", seed, config.shuffle == "epoch")
    pipeline = build_pipeline(reader, lambda: encoded_graph(reader))
    numbers: dict[str, int] = {}
    orders = []
    for _ in range(epochs):
        keys = [key for _ in range(reader.batches_per_epoch) for key in read_keys(pipeline.run()[1])]
        keys = keys[: reader.split.num_samples]  # the rest is padding
        orders.append(np.array([numbers.setdefault(key, len(numbers)) for key in keys]))
    return orders


def measure_shuffle(folder: Path, config: LoaderConfig, *, batch_size: int, seed: int = 0) -> ShuffleQuality:
    """The shuffle between the first two epochs of a data set."""
    first, second = read_orders(folder, config, batch_size=batch_size, seed=seed, epochs=2)
    return compare_orders(first, second, batch_size)
