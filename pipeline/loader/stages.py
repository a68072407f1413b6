"""The loader cut short after a stage, for measuring: reading; reading and decoding; everything.

Each contains those before it, so a stage's own cost is a difference. The trainer's benchmark and ``python -m pipeline
bench`` use these.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.loader.batches import TrainingLoader
from pipeline.loader.config import LoaderConfig
from pipeline.loader.graph import Feed, crops_graph
from pipeline.loader.open_split import open_split
from pipeline.loader.order import Order
from pipeline.loader.samples import SampleReader

STAGES = ("read", "decode", "whole")
PAGE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class StoredImages:
    """What a data set's training split holds.

    Attributes:
        encoding: ``jpeg``, ``png``, ``raw`` or ``original``.
        height_px, width_px, channels: of every image.
        num_samples: images.
        sample_bytes: bytes of the tars an image.
        tars: the files.
        fingerprint: of the data set.
    """

    encoding: str
    height_px: int
    width_px: int
    channels: int
    num_samples: int
    sample_bytes: float
    tars: tuple[str, ...]
    fingerprint: str


def describe_images(data: Path) -> StoredImages:
    """What the training split of a prepared data set holds.

    Raises:
        DatasetError: it is not complete.
    """
    split = open_split(data, "train")
    image = split.manifest.image
    return StoredImages(
        encoding=image.encoding,
        height_px=split.height_px,
        width_px=split.width_px,
        channels=image.channels,
        num_samples=split.num_samples,
        sample_bytes=split.sample_bytes,
        tars=split.tars,
        fingerprint=split.manifest.fingerprint,
    )


class _Cropped(TrainingLoader):
    """The loader up to the decoder: the crops that training uses, uint8."""

    def _graph(self, feed: Feed) -> tuple[Any, ...]:
        return crops_graph(self._decoding, feed)

    def run(self) -> None:
        """Decodes the next batch."""
        self._running.run()


def open_stage(
    stage: str, data: Path, config: LoaderConfig, *, batch_size: int, device: str = "cpu", seed: int = 0
) -> Iterator[None]:
    """Endless batches of the loader up to and with one stage.

    Args:
        stage: one of :data:`STAGES`: ``read``: every encoded byte copied out of the files, of raw images in mapped
            files the crops, for nothing else of them is ever touched; ``decode``: and decoded; ``whole``: what
            :class:`pipeline.loader.batches.TrainingLoader` gives the trainer.
        data: a prepared data set on this machine.
        config: the recipe.
        batch_size: samples per batch.
        device: ``cpu`` or ``cuda:N``.
        seed: of order and draws.

    Raises:
        ConfigError, DatasetError: as the loader.
    """
    split = open_split(data, "train")
    config = dataclasses.replace(config, last_batch="drop")  # every batch measured is a whole one
    loader: SampleReader | TrainingLoader
    if stage == "read" and not (config.mmap and split.manifest.image.encoding == "raw"):
        # Mapped files that nobody decodes are never read, so this stage reads them as files.
        order = Order(split.counts, batch_size, seed, shuffle=config.shuffle == "epoch", partial=False)
        loader = reader = SampleReader(split, order, mapped=False)
        numbers = itertools.count()
        take: Callable[[], Any] = lambda: reader.read(next(numbers))  # noqa: E731
    elif stage != "whole":
        loader = cropped = _Cropped(data, config, batch_size=batch_size, seed=seed, device=device)
        take = cropped.run
    else:
        loader = TrainingLoader(data, config, batch_size=batch_size, seed=seed, device=device)
        take = loader.next
    try:
        while True:
            take()
            yield
    finally:
        loader.close()


def cached_share(paths: tuple[str, ...], samples_a_file: int = 64) -> float | None:
    """Share of a data set's pages that are in memory, from samples of every file; None where that cannot be told."""
    found = total = 0
    buffer = bytearray(1)
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            for number in range(min(samples_a_file, max(1, size // PAGE_BYTES))):
                total += 1
                try:
                    found += os.preadv(descriptor, [buffer], size * number // samples_a_file, os.RWF_NOWAIT) == 1
                except BlockingIOError:
                    pass
                except OSError:
                    return None
        finally:
            os.close(descriptor)
    return found / total if total else None
