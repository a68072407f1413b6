"""Sources of pixels (CIFAR-10, IDX) and of tars that others wrote, read back equal to what was put in."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, SourceError
from pipeline.manifest import read_manifest
from pipeline.sources import open_source, reasons
from pipeline.sources.listing import Source
from tests.helpers.ilsvrc import jpeg, tar_of
from tests.helpers.shard_data import make_dataset

RNG = np.random.default_rng(0)


def source_of(name: str, folder: Path | None, **values: object) -> Source:
    return open_source(PrepareOptions(source=name, output=Path("out"), input=folder, **values))


def write_idx(folder: Path, compress: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    arrays = {}
    for split, stem, count in (("train", "train", 30), ("val", "t10k", 10)):
        images = RNG.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = RNG.integers(0, 10, count).astype(np.uint8)
        arrays[split] = (images, labels)
        header = np.array([0x803, count, 28, 28], ">u4").tobytes()
        for name, data in (
            (f"{stem}-images-idx3-ubyte", header + images.tobytes()),
            (f"{stem}-labels-idx1-ubyte", np.array([0x801, count], ">u4").tobytes() + labels.tobytes()),
        ):
            (folder / f"{name}{'.gz' if compress else ''}").write_bytes(gzip.compress(data) if compress else data)
    return arrays


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_images_and_labels(tmp_path: Path, name: str, compress: bool) -> None:
    arrays = write_idx(tmp_path, compress)
    source = source_of(name, tmp_path)
    listing = source.listing()
    assert (listing.encoded, listing.channels, len(listing.classes)) == (False, 1, 10)
    for split, (images, labels) in arrays.items():
        rows = listing.splits[split]
        assert rows.labels.tolist() == labels.tolist()
        for item, image in zip(rows.items(np.arange(len(rows))), images, strict=True):
            np.testing.assert_array_equal(source.read(item)[..., 0], image)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("train-images-idx3-ubyte", lambda data: b"\1" + data[1:], "not an IDX file"),
        ("train-images-idx3-ubyte", lambda data: data[:-1], "its header states"),
        ("train-images-idx3-ubyte", lambda data: data[:10], "not an IDX file"),
        ("train-labels-idx1-ubyte", lambda data: data[:8] + b"\x0a" * 30, "label 10"),
        ("train-labels-idx1-ubyte", lambda data: data[:7] + b"\x1d" + data[8:-1], "29 labels for 30 images"),
        ("t10k-labels-idx1-ubyte", lambda data: b"\x1f\x8b" + data, "cannot be read"),
    ],
)
def test_damaged_idx_is_one_clear_error(tmp_path: Path, name: str, change: object, words: str) -> None:
    write_idx(tmp_path, compress=False)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(SourceError, match=words):
        source_of("mnist", tmp_path).listing()


def test_missing_idx_file_is_named(tmp_path: Path) -> None:
    write_idx(tmp_path, compress=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(SourceError, match="t10k-labels-idx1-ubyte"):
        source_of("mnist", tmp_path).listing()


def write_cifar(folder: Path, archive: bool) -> dict[str, list[tuple[int, np.ndarray]]]:
    written: dict[str, list[tuple[int, np.ndarray]]] = {"train": [], "val": []}
    files = {}
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        rows = [(int(RNG.integers(10)), RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8)) for _ in range(4)]
        written["val" if name.startswith("test") else "train"] += rows
        files[name] = b"".join(bytes([label]) + image.transpose(2, 0, 1).tobytes() for label, image in rows)
    if archive:
        with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    else:
        (folder / "cifar-10-batches-bin").mkdir()
        for name, data in files.items():
            (folder / "cifar-10-batches-bin" / name).write_bytes(data)
    return written


@pytest.mark.parametrize("archive", [False, True])
def test_cifar_images_and_labels(tmp_path: Path, archive: bool) -> None:
    written = write_cifar(tmp_path, archive)
    source = source_of("cifar10", tmp_path)
    listing = source.listing()
    for split, pairs in written.items():
        rows = listing.splits[split]
        for item, (label, image) in zip(rows.items(np.arange(len(rows))), pairs, strict=True):
            assert item.label == label
            np.testing.assert_array_equal(source.read(item), image)


def test_pickled_cifar_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps({}))
    with pytest.raises(SourceError, match="pickled version, which can run any code"):
        source_of("cifar10", tmp_path).listing()


def test_torn_cifar_is_one_clear_error(tmp_path: Path) -> None:
    write_cifar(tmp_path, archive=False)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError, match="no multiple of 3,073"):
        source_of("cifar10", tmp_path).listing()


def write_tars(folder: Path, names: list[str], classes: int = 3) -> list[tuple[int, bytes]]:
    written = []
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with webdataset.TarWriter(str(folder / name)) as sink:
            for number in range(8):
                data = jpeg(len(written))
                sink.write({"__key__": f"{number:03d}", "jpg": data, "cls": len(written) % classes, "json": {"x": 1}})
                written.append((len(written) % classes, data))
    return written


@pytest.mark.parametrize("names", [["train/a.tar", "val/b.tar"], ["x-train-0.tar", "x-validation-0.tar"]])
def test_tars_of_webdataset_keep_their_splits(tmp_path: Path, names: list[str]) -> None:
    written = write_tars(tmp_path, names)
    source = source_of("webdataset", tmp_path)
    listing = source.listing()
    for split, pairs in (("train", written[:8]), ("val", written[8:])):
        rows = listing.splits[split]
        assert [(item.label, source.read(item)) for item in rows.items(np.arange(8))] == pairs


def test_tars_without_splits_are_split_by_seed(tmp_path: Path) -> None:
    write_tars(tmp_path, ["0.tar", "1.tar", "2.tar"])
    listing = source_of("webdataset", tmp_path, val_fraction=0.25).listing()
    assert {split: len(rows) for split, rows in listing.splits.items()} == {"train": 18, "val": 6}


def test_our_own_data_set_can_be_sharded_again(tmp_path: Path) -> None:
    make_dataset(tmp_path, count=10)
    source = source_of("webdataset", tmp_path)
    listing = source.listing()
    assert listing.classes == read_manifest(tmp_path).classes
    assert {split: len(rows) for split, rows in listing.splits.items()} == {"train": 10, "val": 10}


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"__key__": "a", "jpg": b"x"}, "sample a has jpg only: expected KEY.jpg .* and KEY.cls"),
        ({"__key__": "a", "cls": 1}, "sample a has cls only: expected KEY.jpg .* and KEY.cls"),
        ({"__key__": "a", "jpg": b"x", "cls": b"dog"}, "its cls is b'dog': expected a label number"),
    ],
)
def test_samples_that_cannot_be_used_are_named(tmp_path: Path, sample: dict[str, object], words: str) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        sink.write(sample)
    with pytest.raises(SourceError, match=words):
        source_of("webdataset", tmp_path).listing()


def test_a_torn_tar_is_noticed_where_webdataset_reads_on(tmp_path: Path) -> None:
    write_tars(tmp_path, ["0.tar"])
    path = tmp_path / "0.tar"
    whole = path.read_bytes().rstrip(b"\0")
    for cut in range(512, len(whole), 1777):
        path.write_bytes(whole[:cut])
        with pytest.raises(SourceError):
            source_of("webdataset", tmp_path).listing()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "webdataset", "imagenet"])
def test_no_input_is_one_clear_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"--source {name} needs --input"):
        open_source(PrepareOptions(source=name, output=tmp_path))
    with pytest.raises(SourceError, match="no such folder"):
        source_of(name, tmp_path / "none").listing()


def counted(source: Source) -> dict[tuple[str, str], int]:
    return {(row.split, row.reason): row.count for row in source.listing().passed_over}


def test_files_beside_arrays_are_counted(tmp_path: Path) -> None:
    write_idx(tmp_path, compress=True)
    write_idx(tmp_path, compress=False)
    for name in ("readme.txt", ".DS_Store", "more/a", "more/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    source = source_of("mnist", tmp_path)
    assert counted(source) == {("", reasons.NOT_READ): 4 + 3, ("", reasons.HIDDEN): 1}
    assert source.listing().num_found == 40 + 8
    assert counted(source_of("digits", None)) == {}


@pytest.mark.parametrize("archive", [False, True])
def test_files_of_cifar_that_nobody_reads_are_counted(tmp_path: Path, archive: bool) -> None:
    write_cifar(tmp_path, archive)
    extra = {"batches.meta.txt": b"airplane\n", "readme.html": b"x", "._x": b""}
    if archive:
        path = tmp_path / "cifar-10-binary.tar.gz"
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        files |= {f"cifar-10-batches-bin/{name}": data for name, data in extra.items()}
        path.write_bytes(gzip.compress(tar_of(files)))
    else:
        for name, data in extra.items():
            (tmp_path / "cifar-10-batches-bin" / name).write_bytes(data)
    (tmp_path / "notes").write_bytes(b"x")
    source = source_of("cifar10", tmp_path)
    assert counted(source) == {("", reasons.NOT_READ): 3, ("", reasons.HIDDEN): 1}
    assert source.listing().num_found == 24 + 4
