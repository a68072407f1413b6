"""One batch, and how keys and labels are read out of what DALI returns."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.errors import DatasetError


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch; the tensors own their memory and stay valid as long as they are held.

    Attributes:
        images: (N, C, S, S) float32 on the loader's device; ten views: (N, 10, C, S, S).
        labels: (N,) int64, 0..num_classes - 1, same device.
        keys: N sample keys.
        draws: (N, 3) int32: crop x, crop y, mirror (0/1). Evaluation: the centre crop.
        epoch: 0-based.
        position: batch number inside the epoch, 0-based.
        fingerprint: 63-bit hash of keys, draws and colour of the whole batch, also where these are a share's rows:
            equal on all processes if and only if the batch is the same.
    """

    images: torch.Tensor
    labels: torch.Tensor
    keys: tuple[str, ...]
    draws: np.ndarray
    epoch: int
    position: int
    fingerprint: int


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
