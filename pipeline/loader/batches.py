"""Batches for the network: what the trainer uses. The way of an image:

    order -> samples -> decode -> crop, mirror, mean, color, scale  ->  mean image, standardize  ->  Batch    CPU
                        decode -> crop -> mirror, mean image, color, scale, standardize, layout  ->  Batch    GPU
    `-- here ------'    `-- DALI: graph'  `-- normalize (CPU), net_input (GPU): here and in DALI ---'

Which samples make a batch is arithmetic (:mod:`pipeline.loader.order`), and so is every other random decision
(:mod:`pipeline.loader.augmentation`): functions of (seed, epoch, position). So a restart needs two numbers, and a
replica reads its own rows only. The stored bytes are mapped tars (:mod:`pipeline.loader.samples`), which DALI reads in
place. DALI's default executor hands its buffers over, so outputs reach torch without a copy.
"""

import hashlib
import json
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
from pipeline.loader.batch import Batch, BatchShare, SplitFeed, read_labels, shares_decoding
from pipeline.loader.config import LoaderConfig
from pipeline.loader.graph import (
    Decoding,
    Feed,
    check_device,
    crops_graph,
    evaluation_crops_graph,
    evaluation_graph,
    positions,
    split_graph,
    training_graph,
    with_decoder_share,
)
from pipeline.loader.image_reader import ImageReader
from pipeline.loader.net_input import NetInput, to_device
from pipeline.loader.normalize import Normalizer, check_statistics
from pipeline.loader.open_split import OpenSplit, open_split, read_statistics
from pipeline.loader.order import Order
from pipeline.loader.running import HELD, Fed, QueueFill, RunningPipeline, describe_memory
from pipeline.loader.samples import SampleReader
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
        split_feed: this tower's share of the decoding, where it is shared (``data.decode``); without one (a single
            process holds both towers) the whole batch is decoded here.
        share: the rows of each batch that this process trains on; None for all.
        dtype: of the images: float32, or bfloat16 for a net that would round them to it.

    Attributes:
        shares_decoding: whether this process decodes its part of the rows only.
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
        dtype: torch.dtype = torch.float32,
    ) -> None:
        split, statistics = _open(data, "train", config, skip_list)
        _check_batch_size(batch_size)
        self._share = share or BatchShare()
        self._rows = self._share.rows(batch_size)
        count = self._rows.stop - self._rows.start
        self.shares_decoding = split_feed is not None and shares_decoding(
            config, split.manifest.image.encoding, count, split_feed
        )
        self._split_feed = split_feed if self.shares_decoding else None
        self._decoded = self._split_feed.rows(count) if self._split_feed else slice(0, count)
        self._augmentation = Augmentation(
            config, seed, split.height_px, split.width_px, color_steps(config, statistics)
        )
        self._normalizer, self._dtype = Normalizer(config, statistics), dtype
        self._order = Order(
            split.counts, batch_size, seed, config.shuffle == "epoch", config.last_batch == "partial", self._rows
        )
        self.steps_per_epoch = self._check_steps(config)
        self.num_classes = len(split.manifest.classes)
        self.channels = split.manifest.image.channels
        self._identity = loader_state.identity(split, config, self._order)
        epoch, position = 0, 0
        if state is not None:
            epoch, position = loader_state.restore(self._identity, split, self.steps_per_epoch, state)
        decoding = Decoding(split, config, self._decoded.stop - self._decoded.start, device)
        self._decoding = with_decoder_share(decoding)
        self._net_input = make_net_input(self._normalizer, self._decoding, dtype)
        held = config.prefetch + HELD + 1
        self._samples = SampleReader(split, self._order, mapped=config.mmap, held=held, epoch=epoch)
        number = epoch * self.steps_per_epoch + position
        self._running = RunningPipeline(self._decoding, self._graph, self._feed, number=number)
        _LOGGER.info("%s", describe_memory(self._decoding, self._samples))

    def _check_steps(self, config: LoaderConfig) -> int:
        samples, batch_size = self._order.num_samples, self._order.batch_size
        if config.last_batch == "partial":
            if self._share.parts > 1:
                raise ConfigError("data.last_batch is 'partial': expected 'drop' with more than one replica")
        elif batch_size > samples:
            raise ConfigError(f"batch size {batch_size} is more than the {pluralize(samples, 'training sample')}")
        return self._order.steps

    def _graph(self, feed: Feed) -> tuple[Any, ...]:
        if self._net_input:
            return crops_graph(self._decoding, feed)
        return (split_graph if self._split_feed else training_graph)(self._decoding, feed)

    def _feed(self, number: int) -> Fed:
        """What DALI needs for a batch: see :func:`pipeline.loader.graph.training_graph`.

        DALI asks for it some batches ahead; all of it follows from the number, also the end of the color noise.
        """
        epoch, position = divmod(number, self.steps_per_epoch)
        samples = self._samples.read(number)
        first = position * self._order.batch_size + self._rows.start
        draws = self._augmentation.draw(epoch, first, len(samples.keys))
        decoded = self._decoded
        geometry, shift = draws.geometry[decoded], draws.shift[decoded]
        x, y = positions(geometry, self._decoding)
        mirror = np.ascontiguousarray(geometry[:, 2])
        mean, std = self._normalizer.affine(shift, self._augmentation.divisor(epoch))
        return Fed(samples, draws, (samples.images[decoded], x, y, mirror, mean, std))

    def next(self) -> Batch:
        """The next batch.

        Raises:
            DatasetError: an image cannot be decoded; names shard and key.
        """
        epoch, position = self._place()
        fed, pixels = self._running.run()
        assert fed.draws is not None
        images, divisor = torch.from_dlpack(pixels.as_tensor()), self._augmentation.divisor(epoch)
        if self._split_feed:
            images = self._split_feed.exchange(images)
        if self._net_input:
            images = self._net_input(images, fed.draws, divisor)
        elif self._split_feed:
            images = self._normalizer(images, fed.draws, divisor)
        else:
            images = self._normalizer.finish(images, fed.draws.geometry, divisor)
        keys = fed.samples.keys
        return Batch(
            images=images.to(self._dtype),
            labels=to_device(read_labels(fed.samples.labels(), keys, self.num_classes), self._decoding.device),
            keys=keys,
            draws=fed.draws.geometry,
            epoch=epoch,
            position=position,
            fingerprint=fingerprint(keys, fed.draws, epoch=epoch, position=position),
            order_fingerprint=_hash(self._identity | {"epoch": epoch, "position": position}),
        )

    def _place(self) -> tuple[int, int]:
        """Epoch and position of the next batch."""
        return divmod(self._running.number, self.steps_per_epoch)

    @property
    def queue_fill(self) -> QueueFill:
        """How often a batch was ready when it was asked for: a low ready_share means that the trainer starves."""
        return self._running.queue_fill

    def state(self) -> dict[str, Any]:
        """The position after the last batch that :meth:`next` returned, JSON-able; prefetching does not show in it."""
        epoch, position = self._place()
        return self._identity | {"epoch": epoch, "position": position}

    def close(self) -> None:
        """Stops DALI's threads, frees its buffers, lets go of the tars; batches handed out stay valid."""
        self._samples.close()
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
        share: of several replicas: each gets an equal part of the batches, the first replica the first ones.

    Attributes:
        num_samples: images of the split that are seen, by all replicas together.
        num_batches: batches that come here.
        most_batches: batches that come to the replica that gets most of them.
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
        share: BatchShare | None = None,
    ) -> None:
        if views not in ("center", "ten"):
            raise ConfigError(f"views is {views!r}: expected center or ten")
        opened, subtracted = _open(data, split, config, skip_list, statistics)
        _check_batch_size(batch_size)
        check_crop(config, opened.height_px, opened.width_px)
        size = {"height_px": opened.height_px, "width_px": opened.width_px, "crop_px": config.crop_px}
        self._center = center_geometry(1, **size)
        self._views = ten_views(**size) if views == "ten" else self._center
        self._decoding = with_decoder_share(Decoding(opened, config, batch_size, device))
        share = share or BatchShare()
        self._order = Order(opened.counts, batch_size, part=share.part, parts=share.parts)
        self.num_batches, self.most_batches = len(self._order.positions), -(-self._order.steps // share.parts)
        held = config.prefetch + HELD + 1
        self._samples = SampleReader(opened, self._order, mapped=config.mmap, held=held)
        self._normalizer = Normalizer(config, subtracted)
        self._net_input = make_net_input(self._normalizer, self._decoding)
        self.num_samples = opened.num_samples
        self.num_classes = len(opened.manifest.classes)
        self.channels = opened.manifest.image.channels

    def __iter__(self) -> Iterator[Batch]:
        (mean,), (std,) = self._normalizer.affine(np.zeros((1, self.channels), np.float32))

        def graph(feed: Feed) -> tuple[Any, ...]:
            if self._net_input:
                return evaluation_crops_graph(self._decoding, feed, self._views)
            return evaluation_graph(self._decoding, feed, self._views, mean, std)

        running = RunningPipeline(self._decoding, graph, self._feed)
        try:
            for position in self._order.positions:
                yield self._batch(*running.run(), position)
        finally:
            running.close()

    def _feed(self, number: int) -> Fed:
        if number >= self.num_batches:
            raise StopIteration
        samples = self._samples.read(number)
        return Fed(samples, None, (samples.images,))

    def _batch(self, fed: Fed, pixels: Any, position: int) -> Batch:
        keys = fed.samples.keys
        count = len(keys)
        views = torch.from_dlpack(pixels.as_tensor()).flatten(0, -4)  # (N * V, C, S, S), or uint8 (N * V, S, S, C)
        geometry = np.tile(self._views, (count, 1))
        if self._net_input:
            images = self._net_input(views, Draws(geometry, np.zeros((len(geometry), self.channels), np.float32)))
        else:
            images = self._normalizer.finish(views, geometry)
        draws = Draws(np.repeat(self._center, count, 0), np.zeros((count, self.channels), np.float32))
        return Batch(
            images=images.unflatten(0, (count, -1)) if len(self._views) > 1 else images,
            labels=to_device(read_labels(fed.samples.labels(), keys, self.num_classes), self._decoding.device),
            keys=keys,
            draws=draws.geometry,
            epoch=0,
            position=position,
            fingerprint=fingerprint(keys, draws, epoch=0, position=position),
        )


def make_net_input(normalizer: Normalizer, decoding: Decoding, dtype: torch.dtype = torch.float32) -> NetInput | None:
    """What makes the net's input of a GPU's crops; None on a CPU, where DALI's graph and the normalizer do."""
    if decoding.device_id is None:
        return None
    check_device(decoding)
    return NetInput(normalizer, device=decoding.device, dtype=dtype)


def _hash(facts: dict[str, Any]) -> int:
    """63-bit hash of what JSON can hold."""
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _open(
    data: Path, split: str, config: LoaderConfig, skip_list: Path | None, statistics: Path | None = None
) -> tuple[OpenSplit, Statistics]:
    refuse_url(data)
    opened = open_split(data, split, skip_list=skip_list)
    if statistics is not None:
        known = read_statistics(statistics, read_manifest(statistics))
        check_statistics(config, known, (opened.height_px, opened.width_px, opened.manifest.image.channels))
        return opened, known
    return opened, read_statistics(opened.folder, opened.manifest)


def _check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch size is {batch_size!r}: expected 1 or more")
