"""Files of weights that a stranger made: none of them runs code, or takes more memory than it has itself."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainer.errors import ExportError
from trainer.model.weight_files import read_weight_file

ARRAY = np.arange(4, dtype=np.float32).reshape(2, 2)


class _Calls:
    """A pickle of it makes a file wherever it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self._path),)


class _Numpy:
    """A pickle of it calls one of numpy's own constructors, with what the stranger chose."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self._call, self._arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call, self._arguments


def layers_of(array: object) -> dict[str, object]:
    row = {"name": "conv1a", "inputs": ["data"], "weights": [array], "biases": ARRAY[0], "filterSize": [1]}
    return {"model_state": {"layers": [row]}}


def refused(path: Path) -> str:
    with pytest.raises(ExportError) as error:
        read_weight_file(path)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("name", ["ckpt", "net.pth", "net.npz", "zipped"])
def test_no_file_runs_code(tmp_path: Path, name: str) -> None:
    path, evil = tmp_path / name, _Calls(tmp_path / "made")
    if name == "net.pth":
        torch.save({"features.0.weight": torch.zeros(2), "x": evil}, path)
    elif name == "net.npz":
        np.savez(path, **{"conv1.weight": np.array([evil], dtype=object)})
    elif name == "zipped":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("ckpt", pickle.dumps(layers_of(evil), protocol=2))
    else:
        path.write_bytes(pickle.dumps(layers_of(evil), protocol=2))
    refused(path)
    assert not (tmp_path / "made").exists()


NUMPYS = [
    lambda: _Numpy(np.ndarray, (1 << 40,)),  # 8 TiB
    lambda: _Numpy(np.ndarray, (2,), "O", b"\x41" * 16),  # two objects at addresses of the stranger's
    lambda: _Numpy(np.dtype, "O"),
    lambda: np.array([1, "x"], dtype=object),
    lambda: np.zeros(2, dtype=[("a", "f4"), ("b", "O")]),
]


@pytest.mark.parametrize("make", NUMPYS)
def test_only_arrays_of_numbers_are_made(tmp_path: Path, make: Callable[[], object]) -> None:
    """Numpy's constructors believe a pickle; they are not called."""
    (tmp_path / "ckpt").write_bytes(pickle.dumps(layers_of(make()), protocol=2))
    refused(tmp_path / "ckpt")


def test_a_zip_that_grows_is_not_unpacked(tmp_path: Path) -> None:
    """80 MiB of zeros in a tenth of a megabyte, as .npz, as torch's, and as a checkpoint of 2012."""
    with (
        zipfile.ZipFile(tmp_path / "net.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("conv1.weight.npy", "w") as member,
    ):
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (20 << 20,)})
        for _ in range(20):
            member.write(bytes(1 << 22))
    assert (tmp_path / "net.npz").stat().st_size < 1 << 18
    for name in ("net.npz", "net.pth", "ckpt"):
        path = tmp_path / name
        if not path.exists():
            os.link(tmp_path / "net.npz", path)
        assert "no weights shrink so" in refused(path) or name != "net.npz"


def test_a_tensor_of_more_values_than_its_file(tmp_path: Path) -> None:
    """One number, 10^12 times: strides of zero."""
    torch.save({"features.0.weight": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "net.pth")
    assert "values, and the file has fewer" in refused(tmp_path / "net.pth")


def test_numbers_that_are_none(tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.full((2, 2), float("nan"))}, tmp_path / "net.safetensors")
    assert "NaN or infinite" in refused(tmp_path / "net.safetensors")


@pytest.mark.parametrize("name", ["pipe", "zero", "sparse"])
def test_files_that_are_none(tmp_path: Path, name: str) -> None:
    """Neither waited for, nor read without end."""
    path = tmp_path / name
    if name == "pipe":
        os.mkfifo(path)
    elif name == "zero":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    assert "no regular file" in refused(path) or name == "sparse"


def test_an_array_of_2012_is_still_read(tmp_path: Path) -> None:
    """The reader's own stand-ins make the same arrays, of both byte orders and both orders of memory."""
    from trainer.model.files_2012 import _Unpickler

    for array in (ARRAY, np.asfortranarray(ARRAY), ARRAY.astype(">f8"), ARRAY.astype(np.int64)):
        for protocol in (0, 2, 4):
            found = _Unpickler(io.BytesIO(pickle.dumps(array, protocol=protocol)), encoding="latin1").load()
            assert np.array_equal(np.asarray(found), array), (array.dtype, protocol)
