"""Batches for the network: what the trainer uses. The way of an image:

    reader -> decode -> crop, mirror, mean, color, scale  ->  mean image, standardize  ->  Batch
    `-- DALI, in threads of its own: loader.graph -------'     `-- loader.normalize --'

The reader (webdataset tars with index) owns the order of the samples; every other random decision comes from
:mod:`pipeline.loader.augmentation` through an external source, as a function of (seed, epoch, position). Both survive a
restart: the reader through DALI's checkpoint (60 bytes of it), the draws because the iteration number says it all.
One graph serves CPU and GPU; DALI's default executor hands its buffers over, so outputs reach torch without a copy.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.errors import ConfigError
from pipeline.loader import state as loader_state
from pipeline.loader.augmentation import (
    Augmentation,
    Draws,
    Statistics,
    center_geometry,
    check_crop,
    color_steps,
    fingerprint,
    ten_views,
)
from pipeline.loader.batch import Batch, BatchShare, SplitFeed, read_keys, read_labels
from pipeline.loader.config import LoaderConfig
from pipeline.loader.graph import Reader, evaluation_graph, positions, split_graph, training_graph, with_decoder_share
from pipeline.loader.image_reader import ImageReader
from pipeline.loader.normalize import Normalizer
from pipeline.loader.open_split import OpenSplit, check_limits, open_split, read_statistics
from pipeline.loader.running import QueueFill, RunningPipeline, describe_memory
from pipeline.loader.staging import refuse_url, stage
from pipeline.manifest import read_manifest
from twotower.words import pluralize

__all__ = [
    "Batch",
    "BatchShare",
    "EvaluationLoader",
    "ImageReader",
    "LoaderConfig",
    "QueueFill",
    "SplitFeed",
    "TrainingLoader",
    "stage",
]

_LOGGER = logging.getLogger(__name__)


class TrainingLoader:
    """Endless training batches. By default each epoch is shuffled anew, and its last partial batch dropped.

    Args:
        data: a prepared data set on this machine; one at a URL is fetched by :func:`stage` first.
        config: the recipe.
        batch_size: samples per batch, >= 1.
        seed: 0..2**63 - 1; decides order and draws. The same on both towers and on all replicas.
        device: ``cpu`` or ``cuda:N``.
        state: what :meth:`state` returned, to continue after it.
        skip_list: text file of sample keys to leave out, one a line.
        split_feed: this tower's share of the decoding, for ``decode = "sharded"``; without one (a single process holds
            both towers) the whole batch is decoded here.
        share: the rows of each batch that this process trains on; None for all.

    Attributes:
        steps_per_epoch: batches in an epoch; a partial one counts.
        num_classes: rows of the class table.
        channels: of the images.

    Raises:
        ConfigError: a setting that cannot be used with this data set.
        DatasetError: the data set is not complete, or ``state`` belongs to another run; names what differs.
    """

    def __init__(
        self,
        data: Path,
        config: LoaderConfig,
        *,
        batch_size: int,
        seed: int,
        device: str = "cpu",
        state: dict[str, Any] | None = None,
        skip_list: Path | None = None,
        split_feed: SplitFeed | None = None,
        share: BatchShare | None = None,
    ) -> None:
        split, statistics = _open(data, "train", config, skip_list)
        _check_batch_size(batch_size)
        self._share = share or BatchShare()
        self._rows = self._share.rows(batch_size)
        self._split_feed = split_feed if config.decode == "sharded" else None
        if self._split_feed:
            self._split_feed.check(batch_size)
        shuffle = config.shuffle == "epoch"
        self._reader = with_decoder_share(Reader(split, config, batch_size, device, seed, shuffle))
        self.steps_per_epoch = self._count_steps()
        self.num_classes = len(split.manifest.classes)
        self.channels = split.manifest.image.channels
        steps = color_steps(config, statistics)
        self._augmentation = Augmentation(config, seed, split.height_px, split.width_px, steps)
        self._normalizer = Normalizer(config, statistics, device=device)
        self._restored = state
        checkpoint, iteration = (None, 0) if state is None else loader_state.restore(self._reader, state)
        self._running = RunningPipeline(
            self._reader, self._graph, checkpointing=True, checkpoint=checkpoint, iteration=iteration
        )
        _LOGGER.info("%s", describe_memory(self._reader))

    def _count_steps(self) -> int:
        samples, batch_size = self._reader.split.num_samples, self._reader.batch_size
        if self._reader.config.last_batch == "partial":
            if self._share.parts > 1:
                raise ConfigError("data.last_batch is 'partial': expected 'drop' with more than one replica")
            return self._reader.batches_per_epoch
        if batch_size > samples:
            raise ConfigError(f"batch size {batch_size} is more than the {pluralize(samples, 'training sample')}")
        return samples // batch_size

    def _graph(self) -> tuple[Any, ...]:
        feed, share = self._split_feed, self._share
        if feed:
            return split_graph(self._reader, self._draw, part=feed.part, parts=feed.parts)
        return training_graph(self._reader, self._draw, part=share.part, parts=share.parts)

    def _draw(self, info: Any) -> tuple[np.ndarray, ...]:
        """What DALI's iteration ``info.iteration`` needs, for the external source: see :func:`training_graph`.

        DALI asks for it some batches ahead; all of it follows from the number, also the end of the color noise.
        """
        epoch, position = divmod(info.iteration, self._reader.batches_per_epoch)
        size = self._reader.batch_size
        draws = self._augmentation.draw(epoch, position * size, size)
        x, y = positions(draws.geometry, self._reader)
        mirror = np.ascontiguousarray(draws.geometry[:, 2])
        mean, std = self._normalizer.affine(draws.shift, self._augmentation.divisor(epoch))
        return draws.geometry, x, y, mirror, draws.shift, mean, std

    def next(self) -> Batch:
        """The next batch.

        Raises:
            DatasetError: an image cannot be decoded; names shard and key.
        """
        while True:
            epoch, position = self._place()
            outputs = self._running.run()
            self._restored = None
            if position < self.steps_per_epoch:
                return self._batch(outputs, epoch, position)

    def _place(self) -> tuple[int, int]:
        """Epoch and position of DALI's next batch; the position can be that of a batch to be dropped."""
        return divmod(self._running.iteration, self._reader.batches_per_epoch)

    def _batch(self, outputs: Any, epoch: int, position: int) -> Batch:
        pixels, labels, source, geometry, shift = outputs
        size = self._reader.batch_size
        count = min(size, self._reader.split.num_samples - position * size)  # of a partial batch the rest is padding
        keys = read_keys(source)[:count]
        whole = Draws(np.array(geometry.as_array())[:count], np.array(shift.as_array())[:count])
        draws = Draws(whole.geometry[self._rows], whole.shift[self._rows])
        images, divisor = torch.from_dlpack(pixels.as_tensor())[:count], self._augmentation.divisor(epoch)
        if self._split_feed:
            images = self._normalizer(self._split_feed.exchange(images), draws, divisor)
        else:
            images = self._normalizer.finish(images, draws.geometry, divisor)
        return Batch(
            images=images,
            labels=read_labels(labels, keys, self.num_classes)[self._rows].to(self._reader.device),
            keys=keys[self._rows],
            draws=draws.geometry,
            epoch=epoch,
            position=position,
            fingerprint=fingerprint(keys, whole, epoch=epoch, position=position),
        )

    @property
    def queue_fill(self) -> QueueFill:
        """How often a batch was ready when it was asked for: a low ready_share means that the trainer starves."""
        return self._running.queue_fill

    def state(self) -> dict[str, Any]:
        """The position after the last batch that :meth:`next` returned, JSON-able; prefetching does not show in it."""
        if self._restored is not None:  # nothing read since: DALI has no checkpoint of a restored iteration yet
            return dict(self._restored)
        epoch, position = self._place()
        if position >= self.steps_per_epoch:
            epoch, position = epoch + 1, 0
        iteration, checkpoint = self._running.iteration, self._running.checkpoint()
        return loader_state.save(
            self._reader, epoch=epoch, position=position, iteration=iteration, checkpoint=checkpoint
        )

    def close(self) -> None:
        """Stops DALI's threads and frees its buffers; batches handed out stay valid."""
        self._running.close()


class EvaluationLoader:
    """Every image of a split exactly once, in stored order; the last batch may be smaller. Can be iterated again.

    Args:
        data: a prepared data set on this machine; one at a URL is fetched by :func:`stage` first.
        config: the recipe; its random parts are off.
        batch_size: images per batch, >= 1.
        split: name of the split.
        views: ``center``, or ``ten`` for corners and center, then the same mirrored.
        device: ``cpu`` or ``cuda:N``.
        skip_list: text file of sample keys to leave out, one a line.
        statistics: folder whose manifest and statistics.npz say what is subtracted: of the data set that the net was
            trained on, where that is another one. None for ``data``.

    Attributes:
        num_samples: images that will be seen.
        num_classes: rows of the class table.
        channels: of the images.

    Raises:
        ConfigError, DatasetError: as :class:`TrainingLoader`.
    """

    def __init__(
        self,
        data: Path,
        config: LoaderConfig,
        *,
        batch_size: int,
        split: str = "val",
        views: str = "center",
        device: str = "cpu",
        skip_list: Path | None = None,
        statistics: Path | None = None,
    ) -> None:
        if views not in ("center", "ten"):
            raise ConfigError(f"views is {views!r}: expected center or ten")
        opened, subtracted = _open(data, split, config, skip_list, statistics)
        _check_batch_size(batch_size)
        check_crop(config, opened.height_px, opened.width_px)
        size = {"height_px": opened.height_px, "width_px": opened.width_px, "crop_px": config.crop_px}
        self._center = center_geometry(1, **size)
        self._views = ten_views(**size) if views == "ten" else self._center
        self._reader = with_decoder_share(Reader(opened, config, batch_size, device, 0, False))
        self._normalizer = Normalizer(config, subtracted, device=device)
        self.num_samples = opened.num_samples
        self.num_classes = len(opened.manifest.classes)
        self.channels = opened.manifest.image.channels

    def __iter__(self) -> Iterator[Batch]:
        (mean,), (std,) = self._normalizer.affine(np.zeros((1, self.channels), np.float32))
        running = RunningPipeline(self._reader, lambda: evaluation_graph(self._reader, self._views, mean, std))
        for position in range(self._reader.batches_per_epoch):
            begin = position * self._reader.batch_size
            count = min(self.num_samples - begin, self._reader.batch_size)  # the rest of the last batch is padding
            yield self._batch(running.run(), position, count)
        running.close()

    def _batch(self, outputs: Any, position: int, count: int) -> Batch:
        pixels, labels, source = outputs
        keys = read_keys(source)[:count]
        views = torch.from_dlpack(pixels.as_tensor())[:count].flatten(0, -4)  # (N * V, C, S, S)
        images = self._normalizer.finish(views, np.tile(self._views, (count, 1)))
        draws = Draws(np.repeat(self._center, count, 0), np.zeros((count, self.channels), np.float32))
        return Batch(
            images=images.unflatten(0, (count, -1)) if len(self._views) > 1 else images,
            labels=read_labels(labels, keys, self.num_classes).to(self._reader.device),
            keys=keys,
            draws=draws.geometry,
            epoch=0,
            position=position,
            fingerprint=fingerprint(keys, draws, epoch=0, position=position),
        )


def _open(
    data: Path, split: str, config: LoaderConfig, skip_list: Path | None, statistics: Path | None = None
) -> tuple[OpenSplit, Statistics]:
    refuse_url(data)
    opened = open_split(data, split, skip_list=skip_list)
    check_limits(len(opened.tars), mmap=config.mmap)
    if statistics is not None:
        return opened, read_statistics(statistics, read_manifest(statistics))
    return opened, read_statistics(opened.folder, opened.manifest)


def _check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch size is {batch_size!r}: expected 1 or more")
