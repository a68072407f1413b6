"""Measures the loader by stages: reading only, reading and decoding, everything; each contains those before it."""

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.loader.config import LoaderConfig
from pipeline.loader.graph import Reader
from pipeline.loader.limits import check_limits
from pipeline.loader.open_split import open_split
from pipeline.loader.shuffle_quality import ShuffleQuality, measure_shuffle
from pipeline.loader.stages import STAGES, open_stage, sample_bytes
from pipeline.loader.staging import stage
from pipeline.loader.sweep import measure_shares

WARM_UP_BATCHES = 3


@dataclasses.dataclass(frozen=True)
class StageResult:
    """One stage.

    Attributes:
        name: ``read``: every encoded byte copied out of the files; ``decode``: and decoded to uint8 crops;
            ``whole``: what :class:`pipeline.loader.batches.TrainingLoader` gives the trainer.
        images_per_s: median over the repeats.
        images_per_s_min, images_per_s_max: slowest and fastest repeat.
        mb_per_s: stored megabytes (10**6) a second at the median; of raw pictures in mapped files only crops are read.
        cores: processor seconds a second, over the repeats.
        cpu_us_per_image: processor microseconds an image: what is left to compare on a machine that others use too.
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
class BenchResult:
    """A whole run.

    Attributes:
        data: fingerprint of the data set.
        pictures: what is stored, in words.
        device: ``cpu`` or ``cuda:N``.
        batch_size: samples a batch.
        repeats: measurements a stage.
        stages: one result a stage.
        shuffle: how well two epochs are mixed, see :class:`pipeline.loader.shuffle_quality.ShuffleQuality`.
        peak_memory_mb: most memory of this process, 10**6 bytes.
        hw_decoder_images_per_s: reading and decoding by hw_decoder_load, if it was swept.
    """

    data: str
    pictures: str
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
        device: ``cpu`` or ``cuda:N``.
        batch_size: samples a batch; 0: 128, or all samples where there are fewer.
        seconds: length of one repeat.
        repeats: repeats a stage, >= 1.
        sweep: measure every share of the GPU's hardware decoder too.
        threads: decoding threads, instead of the recipe's.
    """

    device: str = "cpu"
    batch_size: int = 0
    seconds: float = 2.0
    repeats: int = 5
    sweep: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.seconds <= 0 or self.batch_size < 0:
            raise ConfigError("--repeats must be 1 or more, --seconds more than 0, --batch-size 0 or more")


def run_bench(data: Path, config: LoaderConfig | None, options: BenchOptions) -> BenchResult:
    """Measures every stage on the training split.

    Args:
        data: a prepared data set.
        config: the recipe; None: the paper's, with a smaller crop where the pictures are smaller than 224 px.
        options: how to measure.

    Raises:
        ConfigError, DatasetError: as the loader.
    """
    folder = stage(data)
    split = open_split(folder, "train")
    config = config or LoaderConfig(crop_px=min(224, split.height_px, split.width_px))
    if options.threads is not None:
        config = dataclasses.replace(config, threads=options.threads)
    batch_size = options.batch_size or min(128, split.num_samples)
    check_limits(len(split.tars), mmap=False)
    reader = Reader(split, config, batch_size, options.device, 0, config.shuffle == "epoch")
    if config.hw_decoder_load < 0:
        reader = dataclasses.replace(reader, config=dataclasses.replace(config, hw_decoder_load=0.65))

    def opener(name: str) -> Callable[[], Iterator[Any]]:
        return lambda: open_stage(name, folder, config, batch_size=batch_size, device=options.device)

    picture = split.manifest.picture
    return BenchResult(
        data=split.manifest.fingerprint,
        pictures=f"{split.num_samples} {picture.encoding} {picture.width_px}x{picture.height_px}x{picture.channels}",
        device=options.device,
        batch_size=batch_size,
        repeats=options.repeats,
        stages=tuple(_measure(name, opener(name), sample_bytes(split), batch_size, options) for name in STAGES),
        shuffle=measure_shuffle(folder, config, batch_size=batch_size),
        peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        hw_decoder_images_per_s={f"{k:.2f}": v for k, v in measure_shares(reader).items()} if options.sweep else None,
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
    runs = [_run(batches, options.seconds) for _ in range(options.repeats)]
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


def _run(batches: Iterator[Any], seconds: float) -> tuple[int, float]:
    """Takes batches for at least ``seconds``, at least one: how many, in how many seconds."""
    begin_s, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - begin_s < seconds:
        next(batches)
        count += 1
    return count, time.perf_counter() - begin_s
