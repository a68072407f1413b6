"""verify finds a flip anywhere, a missing or truncated file, a wrong index, and names file and sample."""

from pathlib import Path

import pytest

from pipeline.inspection.verify import check_dataset
from pipeline.manifest import Manifest
from pipeline.preparation.output import file_damage
from pipeline.preparation.tar_writer import BLOCK
from tests.helpers.shard_data import make_dataset

TAR, INDEX = "train/train-000000.tar", "train/train-000000.idx"


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_dataset(tmp_path)


def problems(folder: Path, manifest: Manifest, level: str = "hashes") -> list[str]:
    return [f"{problem.file}: {problem.reason}" for problem in check_dataset(folder, manifest, level=level)]


@pytest.mark.parametrize("level", ["fast", "hashes", "full"])
def test_a_sound_data_set_has_no_problems(tmp_path: Path, manifest: Manifest, level: str) -> None:
    assert problems(tmp_path, manifest, level) == []


def test_a_flip_at_any_place_of_a_tar_is_found_and_named(tmp_path: Path, manifest: Manifest) -> None:
    path = tmp_path / TAR
    whole = path.read_bytes()
    for position in range(0, len(whole), 37):
        flipped = bytearray(whole)
        flipped[position] ^= 16
        path.write_bytes(flipped)
        found = problems(tmp_path, manifest, "full")
        assert f"{TAR}: its sha256 differs" in found
        assert any(
            "sample train-0" in line or "header at byte" in line or "end of the tar" in line for line in found
        ), position
    path.write_bytes(whole)


def test_a_flip_in_a_image_names_its_sample(tmp_path: Path, manifest: Manifest) -> None:
    path = tmp_path / TAR
    flipped = bytearray(path.read_bytes())
    flipped[BLOCK + 100] ^= 1
    path.write_bytes(flipped)
    assert f"{TAR}: sample train-00000000 is damaged (its checksum does not match)" in problems(tmp_path, manifest)
    assert problems(tmp_path, manifest, "fast") == []  # fast reads headers only, and says so


def test_a_flip_at_any_place_of_an_index_is_found(tmp_path: Path, manifest: Manifest) -> None:
    path = tmp_path / INDEX
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        assert any(line.startswith(INDEX) for line in problems(tmp_path, manifest, "fast"))


@pytest.mark.parametrize("name", ["statistics.npz", "_info.json"])
def test_a_flip_at_any_place_of_the_other_files_is_found(tmp_path: Path, manifest: Manifest, name: str) -> None:
    path = tmp_path / name
    whole = path.read_bytes()
    for position in range(0, len(whole), 13):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert file_damage(tmp_path, manifest) == {name: "its sha256 differs"}, position
    assert f"{name}: its sha256 differs" in problems(tmp_path, manifest, "full")


@pytest.mark.parametrize("name", [TAR, INDEX, "statistics.npz", "_info.json", "quarantine.jsonl", "val/val-000001.tar"])
def test_a_missing_file_is_named(tmp_path: Path, manifest: Manifest, name: str) -> None:
    (tmp_path / name).unlink()
    assert problems(tmp_path, manifest, "fast") == [f"{name}: is missing"]


@pytest.mark.parametrize("cut", [1, BLOCK, 2 * BLOCK, 3000])
def test_a_torn_tar_is_found_without_hashes(tmp_path: Path, manifest: Manifest, cut: int) -> None:
    path = tmp_path / TAR
    path.write_bytes(path.read_bytes()[:-cut])
    found = problems(tmp_path, manifest, "fast")
    assert len(found) >= 2
    assert all(line.startswith(TAR) for line in found)


def test_another_tars_index_and_strangers_are_found(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / INDEX).write_bytes((tmp_path / "train/train-000001.idx").read_bytes())
    (tmp_path / "train" / "train-000099.tar").write_bytes(b"")
    found = problems(tmp_path, manifest)
    assert "train/train-000099.tar: is not in the manifest" in found
    assert any(line.startswith(INDEX) for line in found)
