"""Batches for the network, made by DALI: what the trainer uses. The operators are in :mod:`pipeline.loader.graph`.

The reader (webdataset tars with index) owns the order of the samples; every other random decision comes from
:mod:`pipeline.loader.augmentation` through an external source, as a function of (seed, epoch, position). Both survive a
restart: the reader through DALI's checkpoint (60 bytes of it), the draws because the iteration number says it all.
One graph serves CPU and GPU; DALI's default executor hands its buffers over, so outputs reach torch without a copy.
"""

import base64
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.errors import ConfigError, DatasetError
from pipeline.loader.augmentation import Augmentation, Draws, centre_geometry, colour_steps, fingerprint
from pipeline.loader.batch import Batch, read_keys, read_labels
from pipeline.loader.config import LoaderConfig
from pipeline.loader.dali_state import strip
from pipeline.loader.graph import Normaliser, Reader, evaluation_graph, positions, split_graph, training_graph
from pipeline.loader.image_reader import PictureReader
from pipeline.loader.limits import check_limits
from pipeline.loader.mean_image import MeanImage
from pipeline.loader.open_split import OpenSplit, open_split, read_statistics
from pipeline.loader.running import QueueFill, RunningPipeline, describe_memory
from pipeline.loader.share import BatchShare, SplitFeed, TorchNormaliser
from pipeline.loader.skip_list import read_skip_list, skip_samples
from pipeline.loader.staging import stage
from pipeline.loader.sweep import with_decoder_share

__all__ = [
    "Batch",
    "BatchShare",
    "EvaluationLoader",
    "LoaderConfig",
    "PictureReader",
    "QueueFill",
    "SplitFeed",
    "TrainingLoader",
    "stage",
]

_LOGGER = logging.getLogger(__name__)
_STATE_FORMAT = 2


class _Opened:
    """A split that is ready to be read, with what lives as long as the loader."""

    def __init__(self, data: Path, split: str, config: LoaderConfig, skip_list: Path | None, verify: bool) -> None:
        self.split: OpenSplit = open_split(stage(data), split, verify=verify)
        check_limits(len(self.split.tars), mmap=config.mmap)
        self.indexes: tempfile.TemporaryDirectory[str] | None = None
        if skip_list is not None:
            self.indexes = tempfile.TemporaryDirectory(prefix="twotower-index-")
            self.split = skip_samples(self.split, read_skip_list(skip_list), Path(self.indexes.name))
        self.statistics = read_statistics(self.split.folder, self.split.manifest)


class TrainingLoader:
    """Endless training batches. By default each epoch is shuffled anew, and its last partial batch dropped.

    Args:
        data: a prepared data set; a URL is staged to the local cache first.
        config: the recipe.
        batch_size: samples a batch of this replica, >= 1.
        seed: 0..2**63 - 1; decides order and draws. The same on both towers and on all replicas.
        replica: number of this data-parallel replica.
        replicas: how many there are; each sees its own part of every epoch, as DALI's reader deals it out.
        device: ``cpu`` or ``cuda:N``.
        state: what :meth:`state` returned, to continue after it.
        skip_list: text file of sample keys to leave out, one a line.
        verify: hash every tar before reading it.
        split_feed: this tower's share of the decoding, for ``feed = "split"``.
        share: the rows of each batch that this process trains on; None for all. Unlike with ``replicas``, the batches
            are then the same for any number of processes.

    Attributes:
        steps_per_epoch: batches in an epoch, the same for every replica; a partial one counts.
        num_classes: rows of the class table.
        channels: of the pictures.

    Raises:
        ConfigError: a setting that cannot be used with this data set.
        DatasetError: the data set is not whole, or ``state`` belongs to another run; names what differs.
    """

    def __init__(
        self,
        data: Path,
        config: LoaderConfig,
        *,
        batch_size: int,
        seed: int,
        replica: int = 0,
        replicas: int = 1,
        device: str = "cpu",
        state: dict[str, Any] | None = None,
        skip_list: Path | None = None,
        verify: bool = False,
        split_feed: SplitFeed | None = None,
        share: BatchShare | None = None,
    ) -> None:
        self._opened = _Opened(data, "train", config, skip_list, verify)
        split, statistics = self._opened.split, self._opened.statistics
        _check_batch(batch_size, replica, replicas)
        self._share = share or BatchShare()
        self._rows = self._share.rows(batch_size)
        steps = colour_steps(config, statistics)
        self._augmentation = Augmentation(config, seed, split.height_px, split.width_px, steps)
        shuffle = config.shuffle == "epoch"
        self._reader = with_decoder_share(Reader(split, config, batch_size, device, seed, shuffle, replica, replicas))
        self.num_classes = len(split.manifest.classes)
        self.channels = split.manifest.picture.channels
        if config.last_batch == "partial":
            if replicas * self._share.parts > 1:
                raise ConfigError("data.last_batch is 'partial': expected 'drop' with more than one replica")
            self.steps_per_epoch = self._reader.batches_per_epoch
        else:
            self.steps_per_epoch = split.num_samples // replicas // batch_size
        if not self.steps_per_epoch:
            raise ConfigError(
                f"batch size {batch_size} x {replicas} replica(s) is more than the {split.num_samples} training samples"
            )
        self._normaliser = Normaliser(config, statistics, self._reader, defer_mean_image=True)
        self._mean_image: MeanImage | None = None
        self._mean_image_divisor = 0.0
        self._split_feed = _check_feed(config, split_feed, batch_size)
        self._torch_normaliser = TorchNormaliser(self._normaliser, statistics, device) if self._split_feed else None
        self._restored = state
        checkpoint, iteration = (None, 0) if state is None else self._check_state(state)
        self._running = RunningPipeline(
            self._reader, self._graph, checkpointing=True, checkpoint=checkpoint, iteration=iteration
        )
        _LOGGER.info("%s", describe_memory(self._reader))

    def _graph(self) -> tuple[Any, ...]:
        feed = self._split_feed
        if feed:
            return split_graph(self._reader, self._feed, part=feed.part, parts=feed.parts)
        share = self._share
        return training_graph(self._reader, self._normaliser, self._feed, part=share.part, parts=share.parts)

    def _feed(self, info: Any) -> tuple[np.ndarray, ...]:
        """The draws of DALI's iteration ``info.iteration``, for the external source."""
        epoch, position = divmod(info.iteration, self._reader.batches_per_epoch)
        size, replica, replicas = self._reader.batch_size, self._reader.replica, self._reader.replicas
        draws = self._augmentation.draw(epoch, (position * replicas + replica) * size, size)
        x, y = positions(draws.geometry, self._reader)
        mirror = np.ascontiguousarray(draws.geometry[:, 2])
        std = np.tile(self._normaliser.std * np.float32(self._augmentation.divisor(epoch)), (size, 1))
        return draws.geometry, x, y, mirror, draws.shift, self._normaliser.mean - draws.shift, std

    def next(self) -> Batch:
        """The next batch.

        Raises:
            DatasetError: a picture cannot be decoded; names shard and key.
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
        size, divisor = self._reader.batch_size, self._augmentation.divisor(epoch)
        count = min(size, self._reader.split.num_samples - position * size * self._reader.replicas)
        keys = read_keys(source)[:count]  # what follows in a partial batch is padding
        whole = Draws(np.array(geometry.as_array())[:count], np.array(shift.as_array())[:count])
        draws = Draws(whole.geometry[self._rows], whole.shift[self._rows])
        images = torch.from_dlpack(pixels.as_tensor())[:count]
        if self._split_feed and self._torch_normaliser:
            images = self._torch_normaliser(self._split_feed.exchange(images), draws, divisor)
        elif self._normaliser.deferred_mean_image is not None:
            self._deferred(divisor).subtract(images.numpy(), draws.geometry, out=images.numpy())
        return Batch(
            images=images,
            labels=read_labels(labels, keys, self.num_classes)[self._rows].to(self._reader.device),
            keys=keys[self._rows],
            draws=draws.geometry,
            epoch=epoch,
            position=position,
            fingerprint=fingerprint(keys, whole, epoch=epoch, position=position),
        )

    def _deferred(self, divisor: float) -> MeanImage:
        """The mean image, scaled as DALI has scaled the crops; made anew when the colour noise ends."""
        if self._mean_image is None or self._mean_image_divisor != divisor:
            image, config = self._normaliser.deferred_mean_image, self._normaliser.config
            assert image is not None
            std = self._normaliser.std * np.float32(divisor)
            self._mean_image = MeanImage(image, std, config.crop_px, centre=config.mean == "centre")
            self._mean_image_divisor = divisor
        return self._mean_image

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
        return {
            **self._identity(),
            "epoch": epoch,
            "position": position,
            "iteration": self._running.iteration,
            "dali": base64.b64encode(self._running.checkpoint()).decode(),
        }

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a state to mean the same samples."""
        return {
            "format": _STATE_FORMAT,
            "data set": self._reader.split.manifest.fingerprint,
            "skipped keys": list(self._reader.split.skipped),
            "batch size": self._reader.batch_size,
            "seed": self._reader.seed,
            "replica": self._reader.replica,
            "replicas": self._reader.replicas,
            "shuffle": self._reader.config.shuffle,
            "shuffle_buffer": self._reader.config.shuffle_buffer,
            "last_batch": self._reader.config.last_batch,
        }

    def _check_state(self, state: dict[str, Any]) -> tuple[bytes, int]:
        for name, expected in self._identity().items():
            if state.get(name) != expected:
                raise DatasetError(
                    f"the loader's state was saved with {name} {state.get(name)!r}, and this run has {expected!r}: "
                    "continue with the same, or start a new run"
                )
        try:
            return strip(base64.b64decode(state["dali"], validate=True)), int(state["iteration"])
        except (KeyError, ValueError, TypeError) as error:
            raise DatasetError(f"the loader's state is damaged ({type(error).__name__}: {error})") from None

    def close(self) -> None:
        """Stops DALI's threads and frees its buffers; batches handed out stay valid."""
        self._running.close()


class EvaluationLoader:
    """Every picture of a split exactly once, in stored order; the last batch may be smaller. Can be iterated again.

    Args:
        data: a prepared data set; a URL is staged to the local cache first.
        config: the recipe; its random parts are off.
        batch_size: pictures a batch, >= 1.
        split: name of the split.
        views: ``centre``, or ``ten`` for corners and centre, then the same mirrored.
        device: ``cpu`` or ``cuda:N``.
        skip_list: text file of sample keys to leave out, one a line.
        verify: hash every tar before reading it.

    Attributes:
        num_samples: pictures that will be seen.
        num_classes: rows of the class table.
        channels: of the pictures.

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
        views: str = "centre",
        device: str = "cpu",
        skip_list: Path | None = None,
        verify: bool = False,
    ) -> None:
        if views not in ("centre", "ten"):
            raise ConfigError(f"views is {views!r}: expected centre or ten")
        self._opened = _Opened(data, split, config, skip_list, verify)
        opened, statistics = self._opened.split, self._opened.statistics
        _check_batch(batch_size, 0, 1)
        Augmentation(config, 0, opened.height_px, opened.width_px, statistics.eigenvectors)  # checks the crop
        self._views = views
        self._reader = with_decoder_share(Reader(opened, config, batch_size, device, 0, False))
        self._normaliser = Normaliser(config, statistics, self._reader)
        self.num_samples = opened.num_samples
        self.num_classes = len(opened.manifest.classes)
        self.channels = opened.manifest.picture.channels

    def __iter__(self) -> Iterator[Batch]:
        running = RunningPipeline(self._reader, lambda: evaluation_graph(self._reader, self._normaliser, self._views))
        for position in range(self._reader.batches_per_epoch):
            begin = position * self._reader.batch_size
            count = min(self.num_samples - begin, self._reader.batch_size)  # the rest of the last batch is padding
            yield self._batch(running.run(), position, count)
        running.close()

    def _batch(self, outputs: Any, position: int, count: int) -> Batch:
        images, labels, source = outputs
        keys = read_keys(source)[:count]
        split = self._reader.split
        size = {"height_px": split.height_px, "width_px": split.width_px, "crop_px": self._reader.config.crop_px}
        draws = Draws(centre_geometry(count, **size), np.zeros((count, self.channels), np.float32))
        return Batch(
            images=torch.from_dlpack(images.as_tensor())[:count],
            labels=read_labels(labels, keys, self.num_classes).to(self._reader.device),
            keys=keys,
            draws=draws.geometry,
            epoch=0,
            position=position,
            fingerprint=fingerprint(keys, draws, epoch=0, position=position),
        )


def _check_batch(batch_size: int, replica: int, replicas: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch size is {batch_size!r}: expected 1 or more")
    if not 0 <= replica < replicas:
        raise ConfigError(f"replica {replica} of {replicas}: expected 0..{replicas - 1}")


def _check_feed(config: LoaderConfig, split_feed: SplitFeed | None, batch_size: int) -> SplitFeed | None:
    """The split feed if the config asks for it.

    Without one (a single process holds both towers) the whole batch is decoded here.
    """
    if config.feed == "each" or split_feed is None:
        return None
    split_feed.check(batch_size)
    return split_feed
