"""Reads ``statistics.npz``, whoever made it: the members that are known, of the sizes that the manifest implies.

An .npz is a zip: a member may claim any size, unpack to a thousand times its own, or hold a pickle. Ours are stored as
they are, so their size is known before a byte of them is read.
"""

import ast
import hashlib
import io
import math
import struct
import zipfile
from pathlib import Path

import numpy as np

from pipeline.errors import DatasetError
from pipeline.manifest import STATISTICS_NAME, Manifest, path_inside
from twotower.untrusted import read_regular

MAX_BYTES = 2**27  # the mean image of a million positions takes a fifth of it
HEADER_BYTES = 256  # of an array in the file; numpy writes 128
MAX_LEVEL, ROUNDING = 255.0, 1e-6
REPAIR = "run python -m pipeline verify on it, then prepare again to repair it"


def read_statistics_file(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The arrays of a data set's statistics, float64 and int64, by their names in the file.

    Raises:
        DatasetError: there is no such file, it is not the one that the manifest records, or says what none can be.
    """
    if STATISTICS_NAME not in manifest.files:
        raise DatasetError(f"{folder} has no train split, so it has no statistics")
    path = path_inside(folder, STATISTICS_NAME)
    try:
        data = read_regular(path, MAX_BYTES)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): {REPAIR}") from None
    if hashlib.sha256(data).hexdigest() != manifest.files[STATISTICS_NAME]["sha256"]:
        raise DatasetError(f"{path} is not the file that the manifest records: {REPAIR}")
    try:
        arrays = _read_members(data, _expected(manifest))
        _check_values(arrays)
    except (ValueError, LookupError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile, SyntaxError) as error:
        why = f" ({error})" if isinstance(error, ValueError) else ""  # the words of a library are of no use
        raise DatasetError(f"{path} is damaged{why}: {REPAIR}") from None
    return arrays


def _expected(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Name and shape of each array."""
    image, channels = manifest.image, manifest.image.channels
    shapes: dict[str, tuple[int, ...]] = {
        "mean": (channels,),
        "covariance": (channels, channels),
        "eigenvalues": (channels,),
        "eigenvectors": (channels, channels),
        "num_pictures": (),
        "num_pixels": (),
    }
    if image.height_px is not None and image.width_px is not None:
        shapes["mean_image"] = (image.height_px, image.width_px, channels)
    return shapes


def _read_members(data: bytes, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name not in shapes or name in arrays:
                raise ValueError(f"it holds {member.filename[:40]!a}, which is none of its arrays, or is there twice")
            size = 8 * math.prod(shapes[name])
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise ValueError(f"{name} is packed or encrypted, and prepare stores it as it is")
            if not size < member.file_size <= size + HEADER_BYTES:
                raise ValueError(f"{name} has {member.file_size:,} bytes, expected {size:,} and a header")
            arrays[name] = _read_array(archive.read(member), name, shapes[name])
    missing = shapes.keys() - arrays.keys() - {"mean_image"}  # none of images of more than a million pixels
    if missing:
        raise ValueError(f"it has no {min(missing)}")
    return arrays


def _read_array(data: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array; its header is read before anything is made of it."""
    kind = "<i8" if name.startswith("num_") else "<f8"
    size = struct.unpack_from("<H", data, 8)[0] if data[:8] == b"\x93NUMPY\x01\x00" else HEADER_BYTES
    header = ast.literal_eval(data[10 : 10 + size].decode("ascii")) if size < HEADER_BYTES else None
    if header != {"descr": kind, "fortran_order": False, "shape": shape}:
        raise ValueError(f"{name} is no array of shape {shape} of numbers of type {kind}")
    return np.frombuffer(data, kind, math.prod(shape), 10 + size).reshape(shape).astype(kind[1:])


def _check_values(arrays: dict[str, np.ndarray]) -> None:
    """Refuses what no images have: levels lie on 0..255, and a vector's length is 1."""
    highest = {"mean": MAX_LEVEL, "mean_image": MAX_LEVEL, "covariance": MAX_LEVEL**2, "eigenvectors": 1.0}
    for name, values in arrays.items():
        high = highest.get(name, 4 * MAX_LEVEL**2)
        low = 0.0 if name.startswith("mean") else -high
        if name.startswith("num_"):
            if values < 1:
                raise ValueError(f"{name} is {values}, expected 1 or more")
        elif not np.isfinite(values).all() or (values < low - ROUNDING).any() or (values > high + ROUNDING).any():
            raise ValueError(f"{name} has values outside {low:,.0f} to {high:,.0f}")
    if (np.diag(arrays["covariance"]) < 0).any():
        raise ValueError("covariance has a variance below 0")
