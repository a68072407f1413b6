"""Reading samples: mapped tars and files give the same, a replica opens its own tars, a damaged index is one line."""

import dataclasses
import hashlib
import itertools
from pathlib import Path

import pytest
import torch

from pipeline.errors import DatasetError
from pipeline.loader import samples as loader_samples
from pipeline.loader.batch import BatchShare
from pipeline.loader.batches import EvaluationLoader, TrainingLoader
from pipeline.loader.config import LoaderConfig
from pipeline.loader.open_split import open_split
from pipeline.loader.order import Order
from pipeline.loader.samples import SampleReader
from pipeline.loader.shards import read_index
from pipeline.manifest import ShardRecord
from tests.helpers.loader_data_set import load_reference, make_data_set
from tests.pipeline.loader.test_faults import damage_image

CONFIG = LoaderConfig(crop_px=12, threads=1, color="deviation")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    return make_data_set(folder, encoding="png", size=(16, 16), train=48, val=13, shard_size=4)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The tars that are opened, as they are."""
    found: list[Path] = []

    class Noted(loader_samples.TarFile):
        def __init__(self, path: Path, *, mapped: bool) -> None:
            found.append(path)
            super().__init__(path, mapped=mapped)

    monkeypatch.setattr(loader_samples, "TarFile", Noted)
    return found


def test_files_give_what_mapped_tars_give(data: Path) -> None:
    """Into the third epoch, also from its middle."""
    state = None
    for _ in range(2):
        loaders = [
            TrainingLoader(data, dataclasses.replace(CONFIG, mmap=mmap), batch_size=5, seed=1, state=state)
            for mmap in (True, False)
        ]
        for _ in range(14):
            mapped, read = (loader.next() for loader in loaders)
            assert mapped.fingerprint == read.fingerprint and torch.equal(mapped.labels, read.labels)
            assert torch.equal(mapped.images, read.images)
        state = loaders[1].state()
    evaluated = [
        list(EvaluationLoader(data, dataclasses.replace(CONFIG, mmap=mmap), batch_size=5)) for mmap in (True, False)
    ]
    for mapped, read in zip(*evaluated, strict=True):
        assert mapped.keys == read.keys and torch.equal(mapped.images, read.images)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_replica_opens_its_own_tars_each_once(data: Path, opened: list[Path], mmap: bool) -> None:
    split = open_split(data, "train")
    share, size = BatchShare(1, 4), 8
    order = Order(split.counts, size, 1, True, False, share.rows(size))
    loader = TrainingLoader(data, dataclasses.replace(CONFIG, mmap=mmap), batch_size=size, seed=1, share=share)
    expected = [split.tars[number] for number in order.tars(0)]
    assert sorted(map(str, opened)) == expected and len(expected) <= 12 // 4 + 1
    for _ in range(3 * loader.steps_per_epoch):
        loader.next()
    kept: set[int] = set()
    count = 0
    for epoch in range(4):  # the next epoch's are opened in the second half of one
        ours = set(order.tars(epoch).tolist())
        count += len(ours - kept)
        kept = ours
    assert len(opened) <= count


def test_one_process_opens_every_tar_once(data: Path, opened: list[Path]) -> None:
    loader = TrainingLoader(data, CONFIG, batch_size=8, seed=1)
    for _ in range(3 * loader.steps_per_epoch):
        loader.next()
    assert sorted(map(str, opened)) == list(open_split(data, "train").tars)


@pytest.mark.parametrize("parts", [3, 5])
def test_replicas_evaluate_every_image_once(data: Path, parts: int, opened: list[Path]) -> None:
    whole = list(EvaluationLoader(data, CONFIG, batch_size=4))
    del opened[:]
    loaders = [EvaluationLoader(data, CONFIG, batch_size=4, share=BatchShare(part, parts)) for part in range(parts)]
    assert len(opened) < 4 + parts
    batches = [list(loader) for loader in loaders]
    for loader, mine in zip(loaders, batches, strict=True):
        assert loader.num_samples == 13 and len(mine) == loader.num_batches <= loader.most_batches
    assert max(map(len, batches)) == loaders[0].most_batches
    for one, other in zip(whole, itertools.chain(*batches), strict=True):
        assert one.keys == other.keys and one.position == other.position and torch.equal(one.images, other.images)


def test_a_mapped_sample_is_a_view(data: Path) -> None:
    split = open_split(data, "train")
    reader = SampleReader(split, Order(split.counts, 5), mapped=True)
    samples = reader.read(0)
    assert all(not image.flags.owndata and not image.flags.writeable for image in samples.images)
    stored = load_reference(data)
    assert [int(label) for label in samples.labels()] == [stored[key][1] for key in samples.keys]


def record(data: Path, text: bytes) -> tuple[Path, ShardRecord]:
    """The first training shard with another index, whose hash is right."""
    shard = open_split(data, "train").record.shards[0]
    (data / shard.index_name).write_bytes(text)
    return data, dataclasses.replace(shard, index_sha256=hashlib.sha256(text).hexdigest())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b" 512 ", b" 513 ", "begins at byte 513"),
        (b" 512 ", b" -512 ", "has an offset or a size that is no number"),
        (b" 512 ", b"  ", "that is no number of 1 to 15 digits"),
        (b"png 512", b"jpg 512", "has a line whose file 1 is no 'png'"),
        (b"train-00000000.png", b"train-00000000.gif", "has a line whose file 1 is no 'png'"),
        (b" cls ", b" txt ", "has a line whose file 2 is no 'cls'"),
        (b" json ", b"\njson ", "has a line that has not 12 fields"),
        (b"train-00000000.png", b"train 00000000.png", "has 49 fields, expected 12 for each of 4 samples"),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    """Its hash is right, so it was written so: DALI's own reader aborted the process."""
    data = make_data_set(tmp_path, encoding="png", size=(16, 16), train=4, val=1, shard_size=4)
    text = (data / "train/train-000000.idx").read_bytes()
    assert old in text
    folder, shard = record(data, text.replace(old, new, 1))
    with pytest.raises(DatasetError, match=message) as caught:
        read_index(folder, shard, "png")
    assert "train-000000.idx" in str(caught.value) and "\n" not in str(caught.value)


def test_an_index_is_read_as_written(data: Path) -> None:
    """Against a plain loop over its lines."""
    for shard in open_split(data, "train").record.shards:
        index = read_index(data, shard, "png")
        rows = [line.split(" ") for line in (data / shard.index_name).read_text().splitlines()[1:]]
        assert index.offsets.tolist() == [int(row[1]) for row in rows]
        assert index.sizes.tolist() == [int(row[2]) for row in rows]
        assert index.label_offsets.tolist() == [int(row[5]) for row in rows]
        assert index.label_sizes.tolist() == [int(row[6]) for row in rows]
        assert index.keys.tolist() == [row[3].removesuffix(".png").encode() for row in rows]
        assert index.num_bytes < 50 * len(rows)


def test_a_file_that_became_shorter_is_one_line(data: Path, tmp_path: Path) -> None:
    copy = make_data_set(tmp_path, encoding="png", size=(16, 16), train=8, val=1, shard_size=4)
    split = open_split(copy, "train")
    reader = SampleReader(split, Order(split.counts, 4), mapped=False)
    tar = Path(split.tars[1])
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(DatasetError, match=r"train-000001\.tar ends at 600 bytes, inside a sample"):
        for number in range(2):
            reader.read(number)


def test_a_refused_image_is_told_without_reading_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Late in a replica's run, by the replica that met it: the bytes are still there, so nothing is looked for."""
    folder = make_data_set(tmp_path, size=(16, 16), train=48, val=1, shard_size=4)
    key = "train-00000017"
    damage_image(folder, key, b"no image")
    (one,) = (part for part in range(4) if key in part_keys(folder, part))
    loaders = [TrainingLoader(folder, CONFIG, batch_size=8, seed=1, share=BatchShare(part, 4)) for part in range(4)]
    asked: list[int] = []
    read = SampleReader.read
    monkeypatch.setattr(SampleReader, "read", lambda reader, number: asked.append(number) or read(reader, number))
    with pytest.raises(DatasetError, match=f"cannot decode train/train-000004.tar: image {key} "):
        for _ in range(6):
            loaders[one].next()
    assert asked == list(range(len(asked)))
    for other in set(range(4)) - {one}:  # they never see it
        for _ in range(6 - CONFIG.prefetch):  # nor anything of the next epoch
            loaders[other].next()


def part_keys(folder: Path, part: int) -> set[str]:
    """What a replica of four reads in the first epoch."""
    split = open_split(folder, "train")
    order = Order(split.counts, 8, 1, True, False, BatchShare(part, 4).rows(8))
    reader = SampleReader(split, order, mapped=True)
    return {key for number in range(order.steps) for key in reader.read(number).keys}
