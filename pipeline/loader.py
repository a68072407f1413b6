"""Batches for the network, made by DALI: what the trainer uses. The operators are in :mod:`pipeline.loader_graph`.

The reader (webdataset tars with index) owns the order of the samples; every other random decision comes from
:mod:`pipeline.augmentation` through an external source, as a function of (seed, epoch, position). Both survive a
restart: the reader through DALI's checkpoint (about 260 bytes), the draws because the iteration number says it all.
One graph serves CPU and GPU; DALI's default executor hands its buffers over, so outputs reach torch without a copy.
"""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.augmentation import Augmentation, Draws, centre_geometry, colour_steps, fingerprint, ten_views
from pipeline.errors import ConfigError, DatasetError
from pipeline.loader_batch import Batch, read_keys, read_labels
from pipeline.loader_config import LoaderConfig
from pipeline.loader_data import open_split, read_statistics
from pipeline.loader_graph import (
    Normaliser,
    Reader,
    build_pipeline,
    evaluation_graph,
    last_line,
    positions,
    training_graph,
)

__all__ = ["Batch", "EvaluationLoader", "LoaderConfig", "TrainingLoader"]

_STATE_FORMAT = 1


class TrainingLoader:
    """Endless training batches: shuffled anew each epoch, the last partial batch of an epoch dropped.

    Args:
        data: a prepared data set.
        config: the recipe.
        batch_size: samples a batch of this replica, >= 1.
        seed: 0..2**63 - 1; decides order and draws. The same on both towers and on all replicas.
        replica: number of this data-parallel replica.
        replicas: how many there are; each sees its own part of every epoch.
        device: ``cpu`` or ``cuda:N``.
        state: what :meth:`state` returned, to continue after it.

    Attributes:
        steps_per_epoch: batches in an epoch, the same for every replica.
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
    ) -> None:
        split = open_split(data, "train")
        _check_batch(batch_size, replica, replicas)
        statistics = read_statistics(split.folder, split.manifest)
        self._reader = Reader(split, config, batch_size, device, seed, True, replica, replicas)
        self._augmentation = Augmentation(
            config, seed, split.height_px, split.width_px, colour_steps(config, statistics)
        )
        self.num_classes = len(split.manifest.classes)
        self.channels = split.manifest.picture.channels
        self.steps_per_epoch = split.num_samples // replicas // batch_size
        if not self.steps_per_epoch:
            raise ConfigError(
                f"batch size {batch_size} x {replicas} replica(s) is more than the {split.num_samples} training samples"
            )
        self._normaliser = Normaliser(config, statistics, self._reader)
        self._iteration = 0  # batches that DALI has handed out, the dropped ones included
        self._restored = state
        checkpoint = None if state is None else self._check_state(state)
        self._pipeline = build_pipeline(
            self._reader,
            lambda: training_graph(self._reader, self._normaliser, self._feed),
            checkpointing=True,
            checkpoint=checkpoint,
        )

    def _feed(self, info: Any) -> tuple[np.ndarray, ...]:
        """The draws of DALI's iteration ``info.iteration``, for the external source."""
        epoch, position = divmod(info.iteration, self._reader.batches_per_epoch)
        size, replica, replicas = self._reader.batch_size, self._reader.replica, self._reader.replicas
        draws = self._augmentation.draw(epoch, (position * replicas + replica) * size, size)
        x, y = positions(draws.geometry, self._reader)
        mirror = np.ascontiguousarray(draws.geometry[:, 2])
        return draws.geometry, x, y, mirror, draws.shift, self._normaliser.mean - draws.shift

    def next(self) -> Batch:
        """The next batch.

        Raises:
            DatasetError: a picture cannot be decoded; names shard and key.
        """
        while True:
            epoch, position = divmod(self._iteration, self._reader.batches_per_epoch)
            outputs = self._run()
            self._iteration += 1
            self._restored = None
            if position < self.steps_per_epoch:
                return self._batch(outputs, epoch, position)

    def _run(self) -> Any:
        try:
            return self._pipeline.run()
        except RuntimeError as error:
            raise DatasetError(f"reading {self._reader.split.folder} failed: {last_line(error)}") from error

    def _batch(self, outputs: Any, epoch: int, position: int) -> Batch:
        images, labels, source, geometry, shift = outputs
        keys = read_keys(source)
        draws = Draws(np.array(geometry.as_array()), np.array(shift.as_array()))
        return Batch(
            images=torch.from_dlpack(images.as_tensor()),
            labels=read_labels(labels, keys, self.num_classes).to(self._reader.device),
            keys=keys,
            draws=draws.geometry,
            epoch=epoch,
            position=position,
            fingerprint=fingerprint(keys, draws, epoch=epoch, position=position),
        )

    def state(self) -> dict[str, Any]:
        """The position after the last batch that :meth:`next` returned, JSON-able; prefetching does not show in it."""
        if self._restored is not None:  # nothing read since: DALI has no checkpoint of a restored iteration yet
            return dict(self._restored)
        epoch, position = divmod(self._iteration, self._reader.batches_per_epoch)
        if position >= self.steps_per_epoch:
            epoch, position = epoch + 1, 0
        checkpoint = self._pipeline.checkpoint()
        return {
            **self._identity(),
            "epoch": epoch,
            "position": position,
            "iteration": self._iteration,
            "dali": base64.b64encode(checkpoint).decode(),
        }

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a state to mean the same samples."""
        return {
            "format": _STATE_FORMAT,
            "data set": self._reader.split.manifest.fingerprint,
            "batch size": self._reader.batch_size,
            "seed": self._reader.seed,
            "replica": self._reader.replica,
            "replicas": self._reader.replicas,
            "shuffle_buffer": self._reader.config.shuffle_buffer,
        }

    def _check_state(self, state: dict[str, Any]) -> bytes:
        for name, expected in self._identity().items():
            if state.get(name) != expected:
                raise DatasetError(
                    f"the loader's state was saved with {name} {state.get(name)!r}, and this run has {expected!r}: "
                    "continue with the same, or start a new run"
                )
        try:
            self._iteration = int(state["iteration"])
            return base64.b64decode(state["dali"], validate=True)
        except (KeyError, ValueError, TypeError) as error:
            raise DatasetError(f"the loader's state is damaged ({type(error).__name__}: {error})") from None

    def close(self) -> None:
        """Stops DALI's threads and frees its buffers; batches handed out stay valid."""
        self._pipeline = None


class EvaluationLoader:
    """Every picture of a split exactly once, in stored order; the last batch may be smaller. Can be iterated again.

    Args:
        data: a prepared data set.
        config: the recipe; its random parts are off.
        batch_size: pictures a batch, >= 1.
        split: name of the split.
        views: ``centre``, or ``ten`` for corners and centre, then the same mirrored.
        device: ``cpu`` or ``cuda:N``.

    Attributes:
        num_samples: pictures in the split.
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
    ) -> None:
        if views not in ("centre", "ten"):
            raise ConfigError(f"views is {views!r}: expected centre or ten")
        opened = open_split(data, split)
        _check_batch(batch_size, 0, 1)
        statistics = read_statistics(opened.folder, opened.manifest)
        Augmentation(config, 0, opened.height_px, opened.width_px, statistics.eigenvectors)  # checks the crop
        self._views = views
        self._reader = Reader(opened, config, batch_size, device, 0, False)
        self._normaliser = Normaliser(config, statistics, self._reader)
        self.num_samples = opened.num_samples
        self.num_classes = len(opened.manifest.classes)
        self.channels = opened.manifest.picture.channels

    def _geometry(self, count: int) -> np.ndarray:
        split = self._reader.split
        size = {"height_px": split.height_px, "width_px": split.width_px, "crop_px": self._reader.config.crop_px}
        return ten_views(**size) if self._views == "ten" else centre_geometry(count, **size)

    def __iter__(self) -> Iterator[Batch]:
        pipeline = build_pipeline(self._reader, lambda: evaluation_graph(self._reader, self._normaliser, self._views))
        left = self.num_samples
        for position in range(self._reader.batches_per_epoch):
            try:
                images, labels, source = pipeline.run()
            except RuntimeError as error:
                raise DatasetError(f"reading {self._reader.split.folder} failed: {last_line(error)}") from error
            count = min(left, self._reader.batch_size)  # the rest of the last batch is padding
            left -= count
            keys = read_keys(source)[:count]
            split = self._reader.split
            geometry = centre_geometry(
                count, height_px=split.height_px, width_px=split.width_px, crop_px=self._reader.config.crop_px
            )
            draws = Draws(geometry, np.zeros((count, self.channels), np.float32))
            yield Batch(
                images=torch.from_dlpack(images.as_tensor())[:count],
                labels=read_labels(labels, keys, self.num_classes).to(self._reader.device),
                keys=keys,
                draws=geometry,
                epoch=0,
                position=position,
                fingerprint=fingerprint(keys, draws, epoch=0, position=position),
            )


def _check_batch(batch_size: int, replica: int, replicas: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch size is {batch_size!r}: expected 1 or more")
    if not 0 <= replica < replicas:
        raise ConfigError(f"replica {replica} of {replicas}: expected 0..{replicas - 1}")
