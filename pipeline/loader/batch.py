"""One batch, parts of one, and what the labels' texts say.

Where decoding is shared (``data.decode``) each tower decodes half of a batch and the uint8 crops are exchanged. The
exchange itself is the trainer's: it is handed in as a function, so that nothing here knows about process groups.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from pipeline.errors import ConfigError, DatasetError
from pipeline.loader.config import LoaderConfig


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch; the tensors own their memory and stay valid as long as they are held.

    Attributes:
        images: (N, C, S, S) float32 (or the dtype that was asked for) on the loader's device; on a GPU channels_last.
            Ten views: (N, 10, C, S, S).
        labels: (N,) int64, 0..num_classes - 1, same device.
        keys: N sample keys.
        draws: (N, 3) int32: crop x, crop y, mirror (0/1). Evaluation: the center crop.
        epoch: 0-based.
        position: batch number inside the epoch, 0-based.
        fingerprint: 63-bit hash of these rows' keys, draws and color: equal on both towers of a pair if and only if
            they have the same.
        order_fingerprint: 63-bit hash of all that decides the whole batch (data set, seed, batch size, epoch,
            position...): equal on all replicas if and only if these are rows of the same batch. 0 in evaluation.
    """

    images: torch.Tensor
    labels: torch.Tensor
    keys: tuple[str, ...]
    draws: np.ndarray
    epoch: int
    position: int
    fingerprint: int
    order_fingerprint: int = 0


@dataclasses.dataclass(frozen=True)
class BatchShare:
    """The rows of every batch that a data-parallel replica takes: an equal part, parts in order.

    Batches, draws and state do not depend on how many replicas there are, and a run can go on with another number of
    them. Each reads its own rows only (:mod:`pipeline.loader.order`). In evaluation a replica takes an equal part of
    the batches instead.

    Attributes:
        part: number of this replica, 0-based.
        parts: how many there are; must divide the batch size.
    """

    part: int = 0
    parts: int = 1

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch of ``batch_size``.

        Raises:
            ConfigError: it cannot be divided evenly.
        """
        return _equal_part(
            batch_size,
            self.part,
            self.parts,
            f"batch size {batch_size} cannot be divided among {self.parts} replicas: use a multiple",
        )


@dataclasses.dataclass(frozen=True)
class SplitFeed:
    """This process' share of the decoding, where several processes train on the same rows.

    Attributes:
        part: number of this process, 0-based: it decodes part ``part`` of the rows.
        parts: processes that share them; must divide their number.
        exchange: gets this part's crops, uint8 on the loader's device, (N / parts, C, S, S) of a CPU and
            (N / parts, S, S, C) of a GPU, and returns those of all rows that this process trains on, parts in order.
            Called once a batch, by every process.
        between_gpus: the crops go from one GPU to another without passing the host.
    """

    part: int
    parts: int
    exchange: Callable[[torch.Tensor], torch.Tensor]
    between_gpus: bool = False

    def rows(self, count: int) -> slice:
        """Which of ``count`` rows are decoded here.

        Raises:
            ConfigError: they cannot be split evenly.
        """
        return _equal_part(
            count,
            self.part,
            self.parts,
            f"batch size {count} cannot be split among {self.parts}: use a multiple, or decode = 'replicated'",
        )


def shares_decoding(config: LoaderConfig, encoding: str, count: int, feed: SplitFeed) -> bool:
    """Whether processes that train on the same ``count`` rows share their decoding: ``data.decode``.

    ``auto`` shares it where it pays: between GPUs, whose decoders are slower than the net, and not of raw images, of
    which nothing is decoded. All processes decide the same.
    """
    if config.decode != "auto":
        return config.decode == "sharded"
    fits = count % feed.parts == 0 and config.last_batch == "drop"
    return feed.between_gpus and encoding != "raw" and fits


def _equal_part(count: int, part: int, parts: int, refusal: str) -> slice:
    """One of equal parts of ``count`` rows; raises ConfigError with ``refusal`` where they are not equal."""
    if not 0 <= part < parts:
        raise ConfigError(f"part {part} of {parts}: expected 0..{parts - 1}")
    if count % parts:
        raise ConfigError(refusal)
    size = count // parts
    return slice(part * size, (part + 1) * size)


def read_labels(texts: Sequence[bytes], keys: Sequence[str], num_classes: int) -> torch.Tensor:
    """(N,) int64 out of label texts.

    Raises:
        DatasetError: one is no class; names the sample.
    """
    for text, key in zip(texts, keys, strict=True):
        if not text.isdigit() or int(text) >= num_classes:
            raise DatasetError(
                f"sample {key} has label {text.decode(errors='replace')!r}: expected 0..{num_classes - 1}"
            )
    return torch.tensor([int(text) for text in texts], dtype=torch.int64)
