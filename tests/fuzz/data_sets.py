"""Tars, indexes, manifests, statistics, records, label files and archives that nobody meant."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import random
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.__main__ import main
from pipeline.config import PrepareOptions
from pipeline.errors import PipelineError
from pipeline.inspection.inspect import read_contents, read_statistics, spread_samples
from pipeline.inspection.status import read_status
from pipeline.inspection.verify import check_dataset
from pipeline.loader import staging
from pipeline.loader.open_split import open_split
from pipeline.loader.state import strip
from pipeline.manifest import (
    INFO_NAME,
    MANIFEST_NAME,
    QUARANTINE_NAME,
    STATISTICS_NAME,
    _canonical,
    read_manifest,
)
from pipeline.preparation.output import read_plan
from pipeline.preparation.shard import read_result
from pipeline.preparation.statistics import to_npz
from pipeline.preparation.tar_writer import make_index
from pipeline.quarantine import read_quarantine
from pipeline.sources import open_source
from pipeline.sources.cifar10 import read_batch
from pipeline.sources.devkit import find_devkit
from pipeline.sources.idx import read_idx
from pipeline.sources.labels import read_labels
from pipeline.statistics_file import read_statistics_file
from tests.helpers.fuzzing import Target, mutate_bytes, mutate_json, mutate_text
from tests.helpers.ilsvrc import devkit
from tests.helpers.shard_data import MemorySource, make_dataset, make_job, make_tasks
from tests.helpers.tars import sample, special, write_tar
from twotower.words import one_line

Files = dict[str, bytes]
FORMS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
PICTURES = ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/deep/x y.png")
LABELS = (
    "name,class\ncat/1.jpg,a\ncat/2.jpg,b\nx y,c\n",
    "1.jpg\tn1\t0\t0\t9\t9\n2.jpg\tn2\t0\t0\t9\t9\n",
    "ImageId,PredictionString\n2,n1 1 2 3 4\nx y,n2 1 2 3 4\n",
    "cat/1.jpg one\ncat/2.jpg two words\n",
)


def _read_all(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _write_all(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@functools.cache
def data_set() -> Files:
    """A small data set whose images have one size."""
    with tempfile.TemporaryDirectory() as folder:
        make_dataset(Path(folder), count=5, shard_size=3, source=MemorySource(bad=1))
        return _read_all(Path(folder))


@functools.cache
def begun() -> Files:
    """The records of a data set that is not finished."""
    from pipeline.preparation.shard import build_shard

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in make_tasks(5, 3):
            build_shard(make_job(folder, MemorySource(bad=1)), task)
        plan = {"settings": {"seed": 0}, "totals": {"train": 5}}
        (folder / ".work/plan.json").write_text(json.dumps(plan))
        return {name: data for name, data in _read_all(folder).items() if name.startswith(".work")}


@functools.cache
def tars() -> tuple[bytes, ...]:
    """Tars in all three forms, with long names, folders and what is no file."""
    made = []
    with tempfile.TemporaryDirectory() as name:
        for form in FORMS:
            long = "" if form == tarfile.USTAR_FORMAT else "d/" * 60
            members = [*sample("a"), *sample(f"{long}b\u00e9", 1), special("folder", tarfile.DIRTYPE), *sample("c", 1)]
            made.append(write_tar(Path(name) / "a.tar", members, form).read_bytes())
    return tuple(made)


def _sealed(raw: dict[str, Any]) -> bytes:
    """A manifest with the sha256 that its content has: who changes one changes the other."""
    raw = {name: value for name, value in raw.items() if name != "sha256"}
    try:
        text = _canonical(raw | {"sha256": hashlib.sha256(_canonical(raw).encode()).hexdigest()})
        return text.encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError, TypeError):
        return b"{}"


def _with(files: Files, name: str, data: bytes) -> Files:
    """A data set with another file, and a manifest that says so."""
    raw = json.loads(files[MANIFEST_NAME])
    found = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if name in raw["files"]:
        raw["files"][name] = found
    for split in raw["splits"].values():
        for shard in split["shards"]:
            if name == shard["name"]:
                shard |= found
            elif name == shard["name"].removesuffix(".tar") + ".idx":
                shard |= {f"index_{key}": value for key, value in found.items()}
    return files | {name: data, MANIFEST_NAME: _sealed(raw)}


def make_manifest(rng: random.Random, outside: Path) -> Files:
    """Something of the manifest, or several things; or its text."""
    if rng.random() < 0.1:
        return data_set() | {MANIFEST_NAME: mutate_text(rng, data_set()[MANIFEST_NAME].decode()).encode()}
    raw = json.loads(data_set()[MANIFEST_NAME])
    for _ in range(rng.choice((1, 1, 2))):
        raw = mutate_json(rng, raw, outside)
        raw = raw if isinstance(raw, dict) else {"format": 2}
    return data_set() | {MANIFEST_NAME: _sealed(raw)}


def make_index_file(rng: random.Random, _: Path) -> Files:
    """An index, whose hash the manifest states."""
    name = rng.choice([name for name in data_set() if name.endswith(".idx")])
    text = data_set()[name]
    made = mutate_bytes(rng, text) if rng.random() < 0.3 else mutate_text(rng, text.decode()).encode()
    return _with(data_set(), name, made)


def make_statistics(rng: random.Random, _: Path) -> Files:
    """statistics.npz: its bytes, its arrays, its kinds of numbers, packed, with strangers in it."""
    data = data_set()[STATISTICS_NAME]
    arrays = dict(np.load(io.BytesIO(data)))
    kind = rng.randrange(5)
    if kind == 0:
        return _with(data_set(), STATISTICS_NAME, mutate_bytes(rng, data))
    name = rng.choice(sorted(arrays))
    if kind == 1:
        arrays[name] = arrays[name] * rng.choice((np.nan, np.inf, -1, 1e300, 0))
    elif kind == 2:
        arrays[name] = np.zeros(rng.choice(((), (0,), (3,), (1, 1), (300, 300), (10**5,))), rng.choice("bfdiO?U"))
    elif kind == 3:
        del arrays[name]
    else:
        arrays[rng.choice(("../x", "mean.npy", "a" * 300, ""))] = arrays[name]
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        np.savez_compressed(buffer, **{key or "x": value for key, value in arrays.items()})
    else:
        with contextlib.suppress(ValueError):
            return _with(data_set(), STATISTICS_NAME, to_npz(arrays))
    return _with(data_set(), STATISTICS_NAME, buffer.getvalue())


def make_tar_of_data_set(rng: random.Random, _: Path) -> Files:
    """The images, labels and descriptions of a tar, whose hash the manifest states."""
    name = rng.choice([name for name in data_set() if name.endswith(".tar")])
    return _with(data_set(), name, mutate_bytes(rng, data_set()[name]))


def make_begun(rng: random.Random, outside: Path) -> Files:
    """The plan and the records of a run of prepare."""
    name = rng.choice(sorted(begun()))
    data = begun()[name]
    if name.endswith(".json") and rng.random() < 0.8:
        data = json.dumps(mutate_json(rng, json.loads(data), outside)).encode()
    else:
        data = mutate_bytes(rng, data)
    return begun() | {name: data}


def make_quarantine(rng: random.Random, outside: Path) -> Files:
    """Lines of quarantine.jsonl, and _info.json."""
    name = rng.choice((QUARANTINE_NAME, QUARANTINE_NAME, INFO_NAME))
    lines = data_set()[name].decode().splitlines() or ["{}"]
    at = rng.randrange(len(lines))
    with contextlib.suppress(ValueError):
        lines[at] = json.dumps(mutate_json(rng, json.loads(lines[at]), outside))
    return _with(data_set(), name, "\n".join(lines).encode() + rng.choice((b"", b"\n", b"\xff\n", b"[" * 9999)))


def use_data_set(folder: Path, files: Files) -> None:
    """All that the other commands and the loader do with a data set before DALI."""
    data = _write_all(folder / "data", files)
    manifest = read_manifest(data)
    errors: list[PipelineError] = []

    def attempt(work: Callable[[], Any]) -> None:
        try:
            work()
        except PipelineError as error:
            errors.append(error)

    attempt(lambda: check_dataset(data, manifest, level="full"))
    attempt(lambda: read_statistics(data, manifest))
    attempt(lambda: read_statistics_file(data, manifest))
    attempt(lambda: list(read_quarantine(data)))
    attempt(lambda: read_status(data))
    for split in manifest.splits:
        attempt(lambda split=split: open_split(data, split))  # type: ignore[misc]
        attempt(lambda split=split: read_contents(data, manifest, split))  # type: ignore[misc]
        attempt(lambda split=split: list(spread_samples(data, manifest, split, 3)))  # type: ignore[misc]
    if errors:
        raise errors[0]


def use_remotely(folder: Path, files: Files) -> None:
    """Fetches a data set from an address, as --data does."""
    data = _write_all(folder / "data", files)
    staging._STAGED.clear()
    staging.stage(f"file://{data}", folder / "cache")


def use_command(folder: Path, files: Files) -> None:
    """A command as people call it: no line of what it says holds what is not seen, and its status is one of ours."""
    import sys

    data = _write_all(folder / "data", files)
    words = random.Random(len(files[MANIFEST_NAME])).choice(
        (["verify", data], ["verify", data, "--full"], ["inspect", data], ["status", data], ["statistics", data])
    )
    out, before = io.StringIO(), sys.argv
    sys.argv = ["pipeline", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = main()
    finally:
        sys.argv = before
    lines = out.getvalue().splitlines()
    assert status in (0, 2), status
    assert all(one_line(line) == line for line in lines), lines
    assert status == 0 or lines[-1].startswith("error: ") or lines[0].startswith("error: "), lines


def use_begun(folder: Path, files: Files) -> None:
    """status, and a prepare that goes on."""
    data = _write_all(folder / "data", files)
    plan = read_plan(data)
    for path in (data / ".work/records").glob("*.json"):
        read_result(data / ".work", path.stem, with_positions=True)
    if plan is not None:
        read_status(data)


def make_tar(rng: random.Random, _: Path) -> bytes:
    """A tar of others; its header fields more often than its data."""
    data = bytearray(rng.choice(tars()))
    if rng.random() < 0.5:
        block = rng.randrange(len(data) // 512) * 512
        start, length = rng.choice(((124, 12), (124, 12), (148, 8), (156, 1), (0, 100), (257, 8), (345, 155)))
        field = rng.choice(
            (
                b"-0000001000",
                b"77777777777\0",
                b"\xff" * 12,
                b"\x80" + b"\xff" * 11,
                b"0_1",
                b"+7",
                b" ",
                rng.randbytes(12),
            )
        )
        data[block + start : block + start + length] = field[:length].ljust(length, b"\0")
        header = data[block : block + 512]
        header[148:156] = b"        "
        data[block + 148 : block + 156] = b"%06o\0 " % sum(header)
    if rng.random() < 0.6:
        data[:] = mutate_bytes(rng, bytes(data), tars())
    return bytes(data)


def use_tar(folder: Path, data: bytes) -> None:
    """prepare's listing of it, and reindex."""
    (folder / "in").mkdir()
    (folder / "in/a.tar").write_bytes(data)
    with contextlib.suppress(PipelineError):
        make_index(folder / "in/a.tar")
    source = open_source(PrepareOptions("webdataset", folder / "out", folder / "in", val_fraction=0.0))
    listing = source.listing()
    for rows in listing.splits.values():
        for item in rows.items(np.arange(min(len(rows), 4))):
            source.read(item)


def make_labels(rng: random.Random, _: Path) -> bytes:
    """A label file."""
    text = rng.choice(LABELS)
    for _ in range(rng.choice((1, 2, 4))):
        text = mutate_text(rng, text)
    return mutate_bytes(rng, text.encode()) if rng.random() < 0.3 else text.encode()


def use_labels(folder: Path, data: bytes) -> None:
    """Reads it."""
    (folder / "labels").write_bytes(data)
    read_labels(folder / "labels", PICTURES)


@functools.cache
def archives() -> tuple[tuple[str, bytes], ...]:
    """An IDX file plain and packed, CIFAR-10's archive, ILSVRC's kit."""
    idx = bytes([0, 0, 8, 3]) + np.array([2, 3, 4], ">u4").tobytes() + bytes(24)
    with tempfile.TemporaryDirectory() as name:
        cifar = write_tar(Path(name) / "c.tar", [("cifar-10-batches-bin/test_batch.bin", bytes(3073))]).read_bytes()
        kit = devkit()
    return ("idx", idx), ("idx", gzip.compress(idx)), ("cifar", gzip.compress(cifar)), ("devkit", kit)


def make_archive(rng: random.Random, _: Path) -> tuple[str, bytes]:
    """One of them; what is packed is mutated before it is packed, or after."""
    kind, data = rng.choice(archives())
    if data[:2] == b"\x1f\x8b" and rng.random() < 0.8:
        return kind, gzip.compress(mutate_bytes(rng, gzip.decompress(data)))
    return kind, mutate_bytes(rng, data)


def use_archive(folder: Path, made: tuple[str, bytes]) -> None:
    """Reads it as its source does."""
    kind, data = made
    names = {"idx": "a-idx3-ubyte.gz", "cifar": "cifar-10-binary.tar.gz", "devkit": "ILSVRC2012_devkit_t12.tar.gz"}
    path = folder / names[kind]
    path.write_bytes(data)
    if kind == "idx":
        read_idx(path, dimensions=3)
    elif kind == "cifar":
        read_batch(path / "test_batch.bin")
    else:
        find_devkit(folder)


def make_state(rng: random.Random, _: Path) -> bytes:
    """A checkpoint of DALI's."""
    made = b"\x0a\x10\x0a\x06Reader\x12\x06" + bytes(6) + b"\x12\x04" + bytes(4)
    return mutate_bytes(rng, made)


def use_state(_: Path, data: bytes) -> None:
    """Takes the reader's state out of it."""
    strip(data)


ALLOWED = (PipelineError,)
TARGETS = [
    Target("manifest", make_manifest, use_data_set, ALLOWED, 2.0),
    Target("manifest at an address", make_manifest, use_remotely, ALLOWED, 1.0),
    Target("index", make_index_file, use_data_set, ALLOWED, 1.5),
    Target("statistics", make_statistics, use_data_set, ALLOWED, 1.0),
    Target("tar of a data set", make_tar_of_data_set, use_data_set, ALLOWED, 1.0),
    Target("quarantine list", make_quarantine, use_data_set, ALLOWED, 0.5),
    Target("commands", make_manifest, use_command, (SystemExit,), 0.5),
    Target("records of a run of prepare", make_begun, use_begun, ALLOWED, 1.0),
    Target("tar of others", make_tar, use_tar, ALLOWED, 3.0),
    Target("labels", make_labels, use_labels, ALLOWED, 1.5),
    Target("archives", make_archive, use_archive, ALLOWED, 1.5),
    Target("loader's state", make_state, use_state, (ValueError,), 0.5),
]
assert len({target.name for target in TARGETS}) == len(TARGETS) and dataclasses.is_dataclass(Target)
