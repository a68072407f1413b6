"""The manifest: canonical, sealed, complete or absent."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from pipeline.errors import DatasetError
from pipeline.manifest import MANIFEST_NAME, from_json, read_manifest, write_atomic
from tests.helpers.shard_data import make_dataset


def test_round_trip_and_fingerprint(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert from_json(manifest.to_json()).fingerprint == manifest.fingerprint
    assert dataclasses.replace(manifest, source="other").fingerprint != manifest.fingerprint


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    text = make_dataset(tmp_path, count=2, shard_size=2).to_json().encode()
    for position in range(len(text)):
        flipped = bytearray(text)
        flipped[position] ^= 4
        (tmp_path / MANIFEST_NAME).write_bytes(flipped)
        with pytest.raises(DatasetError):
            read_manifest(tmp_path)


def test_missing_torn_and_foreign_manifests_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no data set folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="never ended"):
        read_manifest(tmp_path)
    text = make_dataset(tmp_path).to_json()
    with pytest.raises(DatasetError, match="is damaged"):
        from_json(text[:100])
    with pytest.raises(DatasetError, match="format 99 is not supported"):
        from_json(json.dumps({"format": 99}))


def test_a_manifest_that_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST_NAME
    for make in (os.mkfifo, os.mkdir):
        make(path)
        with pytest.raises(DatasetError, match=r"manifest\.json is no file: remove it"):
            read_manifest(tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()


def test_write_atomic_replaces_or_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space"):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
