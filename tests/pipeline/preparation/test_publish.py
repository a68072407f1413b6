"""Data sets put to a URL: manifest last, continued after a failure, never over something else."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline.config import PrepareOptions
from pipeline.errors import OutputError
from pipeline.files import is_url
from pipeline.manifest import MANIFEST_NAME, Manifest, from_json
from pipeline.preparation.publish import MARK_NAME, Remote, staging_folder
from tests.helpers.shard_data import make_dataset

URL = "memory://bucket/data"


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    """An empty store in memory."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.rm("/", recursive=True)  # the folders too, of which one would change where another test's files are put


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_dataset(tmp_path / "data")


def names(store: fsspec.AbstractFileSystem) -> set[str]:
    return {name.removeprefix("/bucket/data/") for name in store.find("/bucket/data")}


def test_everything_is_there_and_nothing_else(
    tmp_path: Path, store: fsspec.AbstractFileSystem, manifest: Manifest
) -> None:
    Remote(URL).publish(tmp_path / "data", manifest)
    local = {
        path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*") if path.is_file()
    }
    assert names(store) == local
    for name in local:
        assert store.cat_file(f"/bucket/data/{name}") == (tmp_path / "data" / name).read_bytes()


def test_a_failure_leaves_no_manifest_and_is_continued(
    tmp_path: Path, store: fsspec.AbstractFileSystem, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, count = type(store).put_file, [0]

    def failing(self: object, source: str, target: str, **options: object) -> None:
        count[0] += 1
        if count[0] == 5:
            raise OSError("the network is gone")
        put(self, source, target, **options)

    monkeypatch.setattr(type(store), "put_file", failing)
    with pytest.raises(OutputError, match="the network is gone; run the same command again"):
        Remote(URL).publish(tmp_path / "data", manifest)
    assert MANIFEST_NAME not in names(store)
    assert MARK_NAME in names(store)
    Remote(URL).publish(tmp_path / "data", manifest)
    assert from_json(store.cat_file(f"/bucket/data/{MANIFEST_NAME}").decode()) == manifest
    assert MARK_NAME not in names(store)
    files = sum(2 * len(split.shards) for split in manifest.splits.values()) + len(manifest.files) + 1
    assert count[0] == files + 1  # only the file that failed was put twice


def test_something_else_is_refused(tmp_path: Path, store: fsspec.AbstractFileSystem, manifest: Manifest) -> None:
    options = PrepareOptions(source="digits", output=tmp_path)
    store.pipe_file("/bucket/data/thesis.txt", b"years of work")
    with pytest.raises(OutputError, match=r"holds something else \(thesis\.txt\)"):
        Remote(URL).published(options)
    store.store.clear()
    store.pipe_file(f"/bucket/data/{MARK_NAME}", b"0123456789abcdef")
    with pytest.raises(OutputError, match="another data set is being published there"):
        Remote(URL).publish(tmp_path / "data", manifest)


def test_other_settings_are_refused_by_name(
    tmp_path: Path, store: fsspec.AbstractFileSystem, manifest: Manifest
) -> None:
    other = dataclasses.replace(manifest, settings={"seed": 1, "libraries": {}})
    (tmp_path / "data" / MANIFEST_NAME).write_text(other.to_json())
    Remote(URL).publish(tmp_path / "data", other)
    with pytest.raises(OutputError, match="seed: 1 there, 0 asked"):
        Remote(URL).published(PrepareOptions(source="digits", output=tmp_path))


def test_urls_are_told_from_paths_and_unknown_ones_are_one_line() -> None:
    assert is_url("s3://bucket/x")
    assert not is_url("/data/x")
    assert staging_folder("s3://a/b") == staging_folder("s3://a/b/") != staging_folder("s3://a/c")
    with pytest.raises(OutputError, match="--output nothing://x") as caught:
        Remote("nothing://x")
    assert "\n" not in str(caught.value)
