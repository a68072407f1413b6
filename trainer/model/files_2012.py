"""Checkpoints of the 2012 program (cuda-convnet and its two-GPU successor) as merged weights.

A checkpoint is a pickled dict; ``model_state["layers"]`` holds a dict per layer with ``name``, ``inputs`` (names, or
places in the list), ``weights`` (one matrix per input) and ``biases``. Matrices are (inputs, outputs); the inputs of a
convolution run over channels, then rows, then columns of its window, those of a fully connected layer over maps, rows
and columns. Names end in the tower's letter: ``conv3a``, ``fc2048bb`` (fc7 of tower b), ``fc1000`` (one for both).

Order: merged weights want tower a's inputs before tower b's. The program's fc7 of tower b lists its inputs as
``hs1b,hs1a``; here every layer's matrices are put into the order of their inputs' letters.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.config import LAYERS
from trainer.errors import ExportError
from twotower.untrusted import read_regular
from twotower.words import shortened

GROWN_BYTES, MOST_GROWTH = 64 << 20, 20  # a zip may grow to so much, and so many times its size
_TORCH_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9"  # of the files that torch.save wrote before 1.6
_TYPES = {"b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"}  # numbers; no objects
MOST_BYTES = 8 << 30  # of a file, and of what is in a zip; the paper's net has 0.25 GB


class _Inert:
    """Stands for any class that a checkpoint names and that is no array: takes everything, does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _Type:
    """Stands for numpy's dtype, whose own way out of a pickle believes what stands there."""

    def __init__(self, text: str, *_: object) -> None:
        self.text, self.order = text, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "<"

    def numpy(self) -> np.dtype[Any]:
        """The type of numbers; raises ValueError for any other."""
        if self.text not in _TYPES:
            raise ValueError(f"an array of {shortened(self.text)}")
        return np.dtype(self.order + self.text)


class _Array:
    """Stands for numpy's array."""

    values: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        found = np.frombuffer(_as_bytes(content), kind.numpy())
        self.values = found.reshape([int(side) for side in shape], order="F" if fortran else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.values is None:
            raise ValueError("an array without content")
        return np.array(self.values, dtype)


def _as_bytes(content: object) -> bytes:
    """A pickle of Python 2 has bytes as text."""
    return content.encode("latin1") if isinstance(content, str) else bytes(memoryview(content))  # type: ignore[arg-type]


def _scalar(kind: _Type, content: object) -> Any:
    return np.frombuffer(_as_bytes(content), kind.numpy())[0].item()


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Makes arrays of numbers and plain containers only: a pickle may name any function, and none of them is called.

    Python's own reader in Python: that in C takes as much memory as a pickle's bytes say.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy":
            ours = {"_reconstruct": lambda *_: _Array(), "ndarray": _Inert, "dtype": _Type, "scalar": _scalar}
            return ours.get(name, _Inert)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("_codecs", "encode"):  # how a newer Python writes an array's bytes for an older one
            return lambda text, *_: _as_bytes(text)
        return _Inert


def is_checkpoint(path: Path) -> bool:
    """Tells a pickle of the program, bare or in a zip, from torch's and other files."""
    with path.open("rb") as file:
        head = file.read(16)
    if _TORCH_MAGIC in head:
        return False
    if head[:2] == b"PK":
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith(("data.pkl", ".npy")) for name in archive.namelist())
    return head[:1] in (b"\x80", b"(")


def check_zip(archive: zipfile.ZipFile, size_bytes: int) -> None:
    """Refuses a zip that grows to much more than it is: weights are numbers that hardly shrink.

    Raises:
        ValueError: it says so itself; what it says is the most that is read of it.
    """
    grown = sum(member.file_size for member in archive.infolist())
    if grown > min(MOST_BYTES, GROWN_BYTES + MOST_GROWTH * size_bytes):
        raise ValueError(f"a zip of {size_bytes:,} bytes with {grown:,} bytes in it: no weights shrink so")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Reads a checkpoint's weights, in the layout of :mod:`trainer.model.weights`.

    Raises:
        ExportError: it is none, or its layers are not the paper's.
    """
    try:
        data = read_regular(path, MOST_BYTES)
        if data[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                check_zip(archive, len(data))
                data = archive.read(archive.namelist()[0])
        state = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        layers = state["model_state"]["layers"]
        rows = list(layers.values()) if isinstance(layers, dict) else list(layers)
        learned = [row for row in rows if row.get("weights")]
        names = [row["name"] for row in rows]
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a pickle's bytes fail in any way
        raise ExportError(
            f"{path} is no checkpoint of the 2012 program ({type(error).__name__}: {shortened(str(error))}): expected "
            "a pickle with model_state and its layers"
        ) from None
    try:
        return _merge(learned, names)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, MemoryError) as error:
        raise ExportError(f"{path}: its layers are not those of the paper's net ({error})") from None


def _merge(learned: list[Mapping[str, Any]], names: list[str]) -> dict[str, Tensor]:
    """Every layer's matrices side by side, tower a's rows before tower b's."""
    merged: dict[str, Tensor] = {}
    for layer, towers in zip(LAYERS, _by_layer(learned), strict=True):
        weights, biases = [], []
        for row in towers:
            inputs = [names[name] if isinstance(name, int) else str(name) for name in row["inputs"]]
            matrices = [np.asarray(matrix, np.float32).T for matrix in row["weights"]]  # (outputs, inputs)
            ordered = [matrix for _, matrix in sorted(zip(inputs, matrices, strict=True), key=lambda pair: pair[0][-1])]
            side = int(np.ravel(row["filterSize"])[0]) if layer.startswith("conv") else 0
            if side:
                ordered = [matrix.reshape(len(matrix), -1, side, side) for matrix in ordered]
            weights.append(np.concatenate(ordered, axis=1))
            biases.append(np.asarray(row["biases"], np.float32).ravel())
        merged[f"{layer}.weight"] = torch.from_numpy(np.ascontiguousarray(np.concatenate(weights)))
        merged[f"{layer}.bias"] = torch.from_numpy(np.concatenate(biases))
    return merged


def _by_layer(learned: list[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The towers' parts of conv1 ... fc8: parts of one layer have one type and depth, and differ in the last letter."""
    found: list[list[Mapping[str, Any]]] = []
    for row in learned:
        name = str(row["name"])
        last = str(found[-1][0]["name"]) if found else ""
        pair = last.endswith("a") and name == last[:-1] + "b"
        if pair:
            found[-1].append(row)
        else:
            found.append([row])
    if len(found) != len(LAYERS):
        raise ValueError(f"{len(found)} layers with weights: expected {len(LAYERS)}")
    return found
