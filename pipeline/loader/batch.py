"""One batch, parts of one, and how keys and labels are read out of what DALI returns.

With ``decode = "sharded"`` each tower decodes half of a batch and the uint8 crops are exchanged. The exchange itself is
the trainer's: it is handed in as a function, so that nothing here knows about process groups.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.errors import ConfigError, DatasetError


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch; the tensors own their memory and stay valid as long as they are held.

    Attributes:
        images: (N, C, S, S) float32 on the loader's device; ten views: (N, 10, C, S, S).
        labels: (N,) int64, 0..num_classes - 1, same device.
        keys: N sample keys.
        draws: (N, 3) int32: crop x, crop y, mirror (0/1). Evaluation: the center crop.
        epoch: 0-based.
        position: batch number inside the epoch, 0-based.
        fingerprint: 63-bit hash of keys, draws and color of the whole batch, also where these are a share's rows:
            equal on all processes if and only if the batch is the same.
    """

    images: torch.Tensor
    labels: torch.Tensor
    keys: tuple[str, ...]
    draws: np.ndarray
    epoch: int
    position: int
    fingerprint: int


@dataclasses.dataclass(frozen=True)
class BatchShare:
    """The rows of every batch that a data-parallel replica takes: an equal part, parts in order.

    All replicas read the same batches, so order, draws and state do not depend on how many they are, and a run can go
    on with another number of them. Each decodes its own rows only, and with ``mmap`` leaves the others' bytes alone.

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
        _check_part(self.part, self.parts)
        if batch_size % self.parts:
            raise ConfigError(f"batch size {batch_size} cannot be divided among {self.parts} replicas: use a multiple")
        size = batch_size // self.parts
        return slice(self.part * size, (self.part + 1) * size)


@dataclasses.dataclass(frozen=True)
class SplitFeed:
    """This process' share of the decoding.

    Attributes:
        part: number of this process, 0-based: it decodes part ``part`` of each batch.
        parts: processes that share a batch; must divide the batch size.
        exchange: gets this part's crops, (N / parts, C, S, S) uint8 on the loader's device, and returns those of all
            rows that this process trains on, parts in order. Called once a batch, by every process.
    """

    part: int
    parts: int
    exchange: Callable[[torch.Tensor], torch.Tensor]

    def check(self, batch_size: int) -> None:
        """Raises ConfigError for a batch that cannot be split evenly."""
        _check_part(self.part, self.parts)
        if batch_size % self.parts:
            raise ConfigError(
                f"batch size {batch_size} cannot be split among {self.parts}: use a multiple, or decode = 'replicated'"
            )


def _check_part(part: int, parts: int) -> None:
    if not 0 <= part < parts:
        raise ConfigError(f"part {part} of {parts}: expected 0..{parts - 1}")


def _texts(padded: Any) -> list[bytes]:
    rows = padded.as_array()
    return rows.view(f"S{rows.shape[1]}").ravel().tolist()


def read_keys(source: Any) -> tuple[str, ...]:
    """Keys out of DALI's source_info, ``PATH:OFFSET:KEY.EXTENSION``, a zero-padded uint8 array."""
    names = (text.rsplit(b":", 1)[1].rsplit(b"/", 1)[-1] for text in _texts(source))
    return tuple(name.split(b".", 1)[0].decode() for name in names)


def read_shards(source: Any, folder: Path) -> tuple[str, ...]:
    """Each sample's shard, as a path inside the data set, out of DALI's source_info."""
    paths = (text.rsplit(b":", 2)[0].decode() for text in _texts(source))
    return tuple(Path(path).relative_to(folder).as_posix() for path in paths)


def read_labels(labels: Any, keys: tuple[str, ...], num_classes: int) -> torch.Tensor:
    """(N,) int64 out of label texts, a zero-padded uint8 array."""
    texts = _texts(labels)[: len(keys)]
    for text, key in zip(texts, keys, strict=True):
        if not text.isdigit() or int(text) >= num_classes:
            raise DatasetError(
                f"sample {key} has label {text.decode(errors='replace')!r}: expected 0..{num_classes - 1}"
            )
    return torch.tensor([int(text) for text in texts], dtype=torch.int64)
