"""What goes wrong while reading: images that DALI refuses, skip lists, limits, data sets at a URL, the queue."""

import dataclasses
import hashlib
import logging
import re
import resource
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pipeline.errors import DatasetError
from pipeline.loader import open_split as loader_open_split
from pipeline.loader import running as loader_running
from pipeline.loader import samples as loader_samples
from pipeline.loader import staging
from pipeline.loader.batch import BatchShare
from pipeline.loader.batches import EvaluationLoader, TrainingLoader
from pipeline.loader.config import LoaderConfig
from pipeline.loader.graph import Decoding
from pipeline.loader.open_split import check_limits, open_split
from pipeline.loader.running import Fed, RunningPipeline
from pipeline.loader.samples import Samples
from pipeline.loader.staging import stage
from pipeline.manifest import MANIFEST_NAME, STATISTICS_NAME, read_manifest
from pipeline.preparation.statistics import to_npz
from tests.helpers.loader_data_set import make_data_set

CONFIG = LoaderConfig(crop_px=12, mean="channel", threads=1)
BAD = ("train-00000003", "train-00000016")


def make(folder: Path, **arguments: Any) -> Path:
    return make_data_set(folder, **{"size": (16, 16), "train": 20, "val": 6, **arguments})


def damage_image(folder: Path, key: str, replacement: bytes | None = None) -> None:
    """Overwrites an image inside its tar and makes manifest and hashes agree, as if it had been prepared so."""
    manifest = read_manifest(folder)
    split = manifest.splits[key.split("-")[0]]
    shards = list(split.shards)
    for number, shard in enumerate(shards):
        line = next((row for row in (folder / shard.index_name).read_text().splitlines() if f"{key}." in row), None)
        if line is None:
            continue
        offset, size = (int(text) for text in line.split()[1:3])
        path = folder / shard.name
        data = bytearray(path.read_bytes())
        content = bytes(data[offset : offset + size])
        damaged = replacement if replacement is not None else content[: size // 2]
        data[offset : offset + size] = damaged.ljust(size, b"\0")[:size]
        path.write_bytes(data)
        shards[number] = dataclasses.replace(shard, sha256=hashlib.sha256(data).hexdigest())
    splits = {**manifest.splits, key.split("-")[0]: dataclasses.replace(split, shards=tuple(shards))}
    (folder / MANIFEST_NAME).write_text(dataclasses.replace(manifest, splits=splits).to_json())


def read_until_error(folder: Path, **arguments: Any) -> str:
    opened = TrainingLoader(folder, CONFIG, batch_size=4, seed=1, **arguments)
    with pytest.raises(DatasetError) as caught:
        for _ in range(10):
            opened.next()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("replacement", [None, b"no image at all", b"GIF89a", b""])
@pytest.mark.parametrize("encoding", ["jpeg", "png"])
def test_a_image_that_dali_rejects_is_named_with_its_shard(
    tmp_path: Path, encoding: str, replacement: bytes | None
) -> None:
    folder = make(tmp_path, encoding=encoding)
    damage_image(folder, BAD[1], replacement)
    message = read_until_error(folder)
    assert f"train/train-000003.tar: image {BAD[1]} " in message and "--skip-list" in message
    assert message.count("image train-") == 1


def test_a_bad_image_in_evaluation_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path)
    damage_image(folder, "val-00000005", b"text")
    with pytest.raises(DatasetError, match=r"val/val-000001\.tar: image val-00000005 "):
        list(EvaluationLoader(folder, CONFIG, batch_size=4))


def test_a_skip_list_lets_the_run_go_on(tmp_path: Path) -> None:
    folder = make(tmp_path / "data")
    for key in BAD:
        damage_image(folder, key)
    skip = tmp_path / "skip.txt"
    skip.write_text(f"# found by the first run\n{BAD[0]}\n\n{BAD[1]}   # truncated\n")
    opened = TrainingLoader(folder, CONFIG, batch_size=3, seed=1, skip_list=skip)
    assert opened.steps_per_epoch == 18 // 3
    for _ in range(3):
        keys = [key for _ in range(6) for key in opened.next().keys]
        assert len(set(keys)) == 18 and not set(keys) & set(BAD)
    resumed = TrainingLoader(folder, CONFIG, batch_size=3, seed=1, skip_list=skip, state=opened.state())
    assert resumed.next().keys == opened.next().keys
    with pytest.raises(DatasetError, match="saved with skipped keys "):
        TrainingLoader(folder, CONFIG, batch_size=3, seed=1, state=opened.state())


def test_a_skip_list_can_empty_a_shard_but_not_the_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path / "data")
    skip = tmp_path / "skip.txt"
    skip.write_text("\n".join(f"val-{number:08d}" for number in range(5)) + "\nval-99999999\n")
    with caplog.at_level(logging.WARNING):
        opened = EvaluationLoader(folder, CONFIG, batch_size=4, skip_list=skip)
    assert "1 of 6 keys" in caplog.text
    assert opened.num_samples == 1 and [batch.keys for batch in opened] == [("val-00000005",)]
    skip.write_text("\n".join(f"val-{number:08d}" for number in range(6)))
    with pytest.raises(DatasetError, match="leaves nothing"):
        EvaluationLoader(folder, CONFIG, batch_size=4, skip_list=skip)
    with pytest.raises(DatasetError, match="cannot be read"):
        EvaluationLoader(folder, CONFIG, batch_size=4, skip_list=tmp_path / "none.txt")


def test_a_raw_image_of_another_size_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path, encoding="raw")
    manifest = read_manifest(folder)
    image = dataclasses.replace(manifest.image, height_px=17)
    arrays = {name: array for name, array in np.load(folder / STATISTICS_NAME).items() if name != "mean_image"}
    (folder / STATISTICS_NAME).write_bytes(data := to_npz(arrays))
    record = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    files = manifest.files | {STATISTICS_NAME: record}
    (folder / MANIFEST_NAME).write_text(dataclasses.replace(manifest, image=image, files=files).to_json())
    assert "image train-" in read_until_error(folder)


@pytest.fixture
def few_descriptors() -> Any:
    """A soft limit so low that 100 tars cannot be open, put back afterwards."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_descriptor_limit_is_raised_for_many_shards(
    tmp_path: Path, few_descriptors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path, train=100, shard_size=1)
    config = dataclasses.replace(CONFIG, mmap=False)
    with monkeypatch.context() as context:
        context.setattr(loader_samples, "check_limits", lambda *_, **__: None)
        with pytest.raises(DatasetError, match="Too many open files"):  # what it is there for
            TrainingLoader(folder, config, batch_size=4, seed=1)
    assert len(TrainingLoader(folder, config, batch_size=4, seed=1).next().keys) == 4


def test_too_many_shards_for_the_hard_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    check_limits(700, mmap=False)
    assert raised == []
    check_limits(3000, mmap=False)
    assert raised == [(3256, 4096)]
    with pytest.raises(
        DatasetError, match="4000 shards read as files need 4256 open files and this system allows 4096"
    ):
        check_limits(4000, mmap=False)


def test_too_many_mappings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "max_map_count"
    limit.write_text("65530\n")
    monkeypatch.setattr(loader_open_split, "_MAX_MAPS", limit)
    check_limits(50_000, mmap=True)
    with pytest.raises(DatasetError, match=r"70000 shards need 74096 memory mappings and this system allows 65530"):
        check_limits(70_000, mmap=True)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A data set in fsspec's in-memory store, and a process that has staged nothing yet."""
    monkeypatch.setattr(staging, "_STAGED", {})
    folder = make(tmp_path / "origin")
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/bucket/data", recursive=True)
    yield store
    store.rm("/bucket", recursive=True)


def test_a_data_set_at_a_url_is_staged_and_equal(remote: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path / "cache"))
    local = TrainingLoader(tmp_path / "origin", CONFIG, batch_size=4, seed=1).next()
    # pathlib folds the two slashes of a URL; a loader must not care
    staged = TrainingLoader(stage(Path("memory://bucket/data")), CONFIG, batch_size=4, seed=1).next()
    assert local.fingerprint == staged.fingerprint and local.images.equal(staged.images)


def test_staging_repairs_what_differs_and_fetches_nothing_else(
    remote: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    folder = stage("memory://bucket/data", cache)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.name != MANIFEST_NAME}
    bad = folder / "train/train-000001.tar"
    bad.write_bytes(bad.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(staging, "_STAGED", {})  # another process
    assert stage("memory://bucket/data/", cache) == folder
    changed = [path for path, before in times.items() if path.stat().st_mtime_ns != before]
    assert changed == [bad]
    assert hashlib.sha256(bad.read_bytes()).hexdigest() == read_manifest(folder).splits["train"].shards[1].sha256


def test_a_url_that_is_damaged_or_empty_is_refused(remote: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"has no manifest\.json"):
        stage("memory://bucket/nothing", tmp_path)
    with pytest.raises(DatasetError, match="cannot be opened"):
        stage("nosuchprotocol://bucket/nothing", tmp_path)
    remote.pipe_file("/bucket/data/train/train-000000.tar", b"short")
    cache = tmp_path / "cache"
    with pytest.raises(DatasetError, match=r"train-000000\.tar is not the file .* \(5 of "):
        stage("memory://bucket/data", cache)
    assert not list(cache.rglob("manifest.json")) and not list(cache.rglob("*.tmp"))


class FakePipeline:
    """Answers like DALI's pipeline, after delays that a fake clock shows."""

    def __init__(self, delays_s: list[float]) -> None:
        self.delays_s, self.now_s = delays_s, 0.0
        self.give, self.given = None, 0

    def perf_counter(self) -> float:
        return self.now_s

    def schedule_run(self) -> None:
        self.now_s += 0.5  # the trainer's own work, which is no waiting
        self.give(self.given)
        self.given += 1

    def outputs(self, _stream: object) -> tuple[None]:
        self.now_s += self.delays_s.pop(0)
        return (None,)


def test_the_queue_tells_how_often_the_trainer_starved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePipeline([3.0, 0.0001, 0.25, 0.0002, 0.0])
    monkeypatch.setattr(loader_running, "build_pipeline", lambda _, graph: graph() and fake)
    monkeypatch.setattr(loader_running.time, "perf_counter", fake.perf_counter)
    split = open_split(make(tmp_path), "train")

    def graph(give: Any) -> tuple[Any]:
        fake.give = give
        return (None,)

    samples = Samples((), (), (), list)
    running = RunningPipeline(Decoding(split, CONFIG, 4, "cpu"), graph, lambda _: Fed(samples, None, ()))
    for _ in range(5):
        running.run()
    fill = running.queue_fill
    assert (fill.batches, fill.ready, fill.ready_share) == (4, 3, 0.75)
    assert fill.first_s == 3.5 and fill.wait_s == pytest.approx(0.2503)


def test_every_batch_is_counted(tmp_path: Path) -> None:
    opened = TrainingLoader(make(tmp_path), CONFIG, batch_size=4, seed=1)
    assert opened.queue_fill.ready_share == 1.0
    for _ in range(5):
        opened.next()
    assert opened.queue_fill.batches == 4 and opened.queue_fill.first_s > 0


def test_a_closed_loader_says_so(tmp_path: Path) -> None:
    opened = TrainingLoader(make(tmp_path), CONFIG, batch_size=4, seed=1)
    opened.close()
    with pytest.raises(DatasetError, match="closed"):
        opened.next()


def test_the_bound_of_memory_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path, encoding="raw", train=50, size=(100, 80))
    config = LoaderConfig(crop_px=50, mean="channel", threads=1, prefetch=3)
    with caplog.at_level(logging.INFO):
        TrainingLoader(folder, config, batch_size=10, seed=1, share=BatchShare(1, 5)).close()
    batches_mb = 4 * 2 * 3 * (100 * 80 + 4 * 50 * 50) / 1e6
    assert re.search(r"opened \d of 10 shards with 1\d samples in \d+\.\d s; their index takes 0\.0 MB", caplog.text)
    assert "50 samples in 10 shards, 2 of them mapped here; " in caplog.text or "shards, 3 of them" in caplog.text
    assert f"about {batches_mb:.0f} MB in batches prepared ahead" in caplog.text
