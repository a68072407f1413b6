"""A layer's values for many images as a file: ``.npz`` for NumPy, ``.parquet`` for tables."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.manifest import write_atomic
from trainer.errors import RunError
from trainer.inference.trained_net import FeatureRow

SUFFIXES = (".npz", ".parquet")


def check_features_file(path: Path) -> None:
    """Refuses, before any work, a file that could not be written.

    Raises:
        RunError: another suffix, or the package that writes it is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise RunError(f"--output {path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise RunError(
                f"--output {path}: parquet needs the package pyarrow: pip install pyarrow -c constraints.txt, or give "
                "a name that ends in .npz"
            ) from None


def write_features(path: Path, rows: Sequence[FeatureRow], layer: str) -> None:
    """Writes the rows that have values, in their order.

    ``.npz``: ``features`` float32 (N, units) or (N, maps, H, W), ``paths`` (N,) text, ``layer``. ``.parquet``: columns
    ``path`` and ``features`` (float32 lists, flattened), the layer and the shape of one row in the schema's metadata.

    Raises:
        RunError: no row has values, or the file cannot be written.
    """
    used = [row for row in rows if row.values is not None]
    if not used:
        raise RunError("none of the images could be used: nothing is written")
    values = np.stack([row.values for row in used if row.values is not None])
    paths = [
        str(row.path).encode("utf-8", "replace").decode() for row in used
    ]  # a name may hold bytes that are no text
    content = _npz(values, paths, layer) if path.suffix == ".npz" else _parquet(values, paths, layer)
    try:
        write_atomic(path, content)
    except OSError as error:
        raise RunError(f"--output {path} cannot be written: {error.strerror}") from None


def _npz(values: np.ndarray, paths: list[str], layer: str) -> bytes:
    file = io.BytesIO()
    np.savez(file, features=values, paths=np.array(paths), layer=np.array(layer))
    return file.getvalue()


def _parquet(values: np.ndarray, paths: list[str], layer: str) -> bytes:
    import pyarrow
    from pyarrow import parquet

    flat = pyarrow.array(values.reshape(-1))
    lists = pyarrow.FixedSizeListArray.from_arrays(flat, values[0].size)
    metadata = {"layer": layer, "shape": json.dumps(values.shape[1:])}
    table = pyarrow.table({"path": paths, "features": lists}).replace_schema_metadata(metadata)
    file = io.BytesIO()
    parquet.write_table(table, file)
    return file.getvalue()
