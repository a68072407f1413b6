"""Measures the loader: by stages (reading; reading and decoding; everything), and how well it shuffles."""

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.errors import ConfigError
from pipeline.loader.config import LoaderConfig
from pipeline.loader.graph import Decoding, measure_decoder_shares
from pipeline.loader.open_split import open_split
from pipeline.loader.order import Order
from pipeline.loader.stages import STAGES, open_stage
from pipeline.loader.staging import stage

WARM_UP_BATCHES = 3


@dataclasses.dataclass(frozen=True)
class StageResult:
    """One stage.

    Attributes:
        name: ``read``: every encoded byte copied out of the files; ``decode``: and decoded to uint8 crops;
            ``whole``: what :class:`pipeline.loader.batches.TrainingLoader` gives the trainer.
        images_per_s: median over the repeats.
        images_per_s_min, images_per_s_max: slowest and fastest repeat.
        mb_per_s: stored megabytes (10**6) a second at the median; of raw images in mapped files only crops are read.
        cores: processor seconds per second, over the repeats.
        cpu_us_per_image: processor microseconds per image: what is left to compare on a machine that others use too.
        first_batch_s: from opening to the first batch.
    """

    name: str
    images_per_s: float
    images_per_s_min: float
    images_per_s_max: float
    mb_per_s: float
    cores: float
    cpu_us_per_image: float
    first_batch_s: float


@dataclasses.dataclass(frozen=True)
class ShuffleQuality:
    """Two epochs compared. For a perfect shuffle each figure is 1, for the same order again 0, 0 and large.

    Attributes:
        displacement: mean distance between a sample's places in the two epochs, against the n/3 of a perfect shuffle.
        spread: mean distance, in the second epoch, of neighbors in the first, against n/3. Samples of
            one tar stay within about a tar and a buffer of each other, so large data sets have small figures.
        batchmates: how often two samples of one batch meet in one batch of the next epoch, against a perfect shuffle.
    """

    displacement: float
    spread: float
    batchmates: float


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """A whole run.

    Attributes:
        data: fingerprint of the data set.
        images: what is stored, in words.
        device: ``cpu`` or ``cuda:N``.
        batch_size: samples per batch.
        repeats: measurements a stage.
        stages: one result a stage.
        shuffle: how well two epochs are mixed, see :class:`ShuffleQuality`.
        peak_memory_mb: most memory of this process, 10**6 bytes.
        hw_decoder_images_per_s: reading and decoding by hw_decoder_load, if it was swept.
    """

    data: str
    images: str
    device: str
    batch_size: int
    repeats: int
    stages: tuple[StageResult, ...]
    shuffle: ShuffleQuality
    peak_memory_mb: float
    hw_decoder_images_per_s: dict[str, float] | None


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        device: ``cpu``, ``cuda:N``, or ``auto``: a GPU where there is one.
        batch_size: samples per batch; 0: 128, or all samples where there are fewer.
        seconds: length of one repeat.
        repeats: repeats a stage, >= 1.
        sweep: measure every share of the GPU's hardware decoder too.
        threads: decoding threads, instead of the recipe's.
    """

    device: str = "auto"
    batch_size: int = 0
    seconds: float = 2.0
    repeats: int = 5
    sweep: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.seconds <= 0 or self.batch_size < 0:
            raise ConfigError("--repeats must be 1 or more, --seconds more than 0, --batch-size 0 or more")

    def resolved(self) -> "BenchOptions":
        """With a device in place of ``auto``."""
        if self.device != "auto":
            return self
        return dataclasses.replace(self, device="cuda:0" if torch.cuda.is_available() else "cpu")


def run_bench(data: Path, config: LoaderConfig | None, options: BenchOptions) -> BenchResult:
    """Measures every stage on the training split.

    Args:
        data: a prepared data set.
        config: the recipe; None: the paper's, with a smaller crop where the images are smaller than 224 px.
        options: how to measure.

    Raises:
        ConfigError, DatasetError: as the loader.
    """
    folder, options = stage(data), options.resolved()
    split = open_split(folder, "train")
    config = config or LoaderConfig(crop_px=min(224, split.height_px, split.width_px))
    if options.threads is not None:
        config = dataclasses.replace(config, threads=options.threads)
    batch_size = options.batch_size or min(128, split.num_samples)
    decoding = Decoding(split, config, batch_size, options.device)

    def opener(name: str) -> Callable[[], Iterator[Any]]:
        return lambda: open_stage(name, folder, config, batch_size=batch_size, device=options.device)

    image = split.manifest.image
    return BenchResult(
        data=split.manifest.fingerprint,
        images=f"{split.num_samples} {image.encoding} {image.width_px}x{image.height_px}x{image.channels}",
        device=options.device,
        batch_size=batch_size,
        repeats=options.repeats,
        stages=tuple(_measure(name, opener(name), split.sample_bytes, batch_size, options) for name in STAGES),
        shuffle=measure_shuffle(split.counts, config, batch_size=batch_size),
        peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        hw_decoder_images_per_s={f"{k:.2f}": v for k, v in measure_decoder_shares(decoding).items()}
        if options.sweep
        else None,
    )


def _measure(
    name: str, source: Callable[[], Iterator[Any]], size_bytes: float, batch_size: int, options: BenchOptions
) -> StageResult:
    begin_s = time.perf_counter()
    batches = source()
    next(batches)
    first_batch_s = time.perf_counter() - begin_s
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    begin_cpu_s = time.process_time()
    runs = [_run(batches, options) for _ in range(options.repeats)]
    cpu_s = time.process_time() - begin_cpu_s
    rates = [count * batch_size / elapsed_s for count, elapsed_s in runs]
    median = statistics.median(rates)
    return StageResult(
        name=name,
        images_per_s=median,
        images_per_s_min=min(rates),
        images_per_s_max=max(rates),
        mb_per_s=median * size_bytes / 1e6,
        cores=cpu_s / sum(elapsed_s for _, elapsed_s in runs),
        cpu_us_per_image=cpu_s * 1e6 / (batch_size * sum(count for count, _ in runs)),
        first_batch_s=first_batch_s,
    )


def _run(batches: Iterator[Any], options: BenchOptions) -> tuple[int, float]:
    """Takes batches for at least ``seconds``, at least one, until a GPU has made them: how many, and in how long."""
    begin_s, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - begin_s < options.seconds:
        next(batches)
        count += 1
    if options.device != "cpu":
        torch.cuda.synchronize(options.device)
    return count, time.perf_counter() - begin_s


def compare_orders(first: np.ndarray, second: np.ndarray, batch_size: int) -> ShuffleQuality:
    """Compares two orders of the same samples.

    Args:
        first, second: (n,) sample numbers 0..n-1, each once.
        batch_size: samples per batch, >= 2.
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


def orders(counts: np.ndarray, config: LoaderConfig, *, batch_size: int, seed: int, epochs: int) -> list[np.ndarray]:
    """The orders in which the training samples come in the first epochs, as numbers in stored order.

    Args:
        counts: (num_tars,) samples of each tar.
        config: the recipe.
        batch_size: samples per batch.
        seed: of the order.
        epochs: how many.
    """
    order = Order(counts, batch_size, seed, shuffle=config.shuffle == "epoch", partial=True)
    first = np.cumsum(counts) - counts
    places = [[order.places(epoch, position) for position in range(order.steps)] for epoch in range(epochs)]
    return [np.concatenate([first[batch.tars] + batch.members for batch in epoch]) for epoch in places]


def measure_shuffle(counts: np.ndarray, config: LoaderConfig, *, batch_size: int, seed: int = 0) -> ShuffleQuality:
    """The shuffle between the first two epochs of tars with these numbers of samples."""
    first, second = orders(counts, config, batch_size=batch_size, seed=seed, epochs=2)
    return compare_orders(first, second, batch_size)
