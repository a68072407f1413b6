"""inspect, statistics, reindex and status tell what is there."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.__main__ import main
from pipeline.errors import DatasetError, SourceError
from pipeline.inspection.inspect import (
    MARGIN_PX,
    ROW_LABEL_PX,
    STATISTICS_PX,
    TITLE_PX,
    contact_sheet,
    draw_statistics,
    find_sample,
    read_contents,
    read_statistics,
    spread_samples,
)
from pipeline.inspection.status import read_status
from pipeline.preparation import output
from pipeline.preparation.shard import build_shard
from pipeline.preparation.tar_writer import write_index
from pipeline.statistics_file import REPAIR
from tests.helpers.ilsvrc import tar_of
from tests.helpers.shard_data import MemorySource, image, make_dataset, make_job, make_tasks


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["pipeline", *map(str, arguments)])
    return main()


def test_contents_count_every_sample(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path, count=10)
    contents = read_contents(tmp_path, manifest, "train")
    assert dict(contents.classes) == {0: 4, 1: 3, 2: 3}
    assert set(contents.widths_px) == set(contents.heights_px) == {12}


def test_a_sample_is_found_by_key(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path, count=10)
    sample = find_sample(tmp_path, manifest, "val-00000007")
    assert (sample.key, sample.shard) == ("val-00000007", "val/val-000002.tar")
    assert sample.about["label"] == sample.label
    with pytest.raises(DatasetError, match="no sample x"):
        find_sample(tmp_path, manifest, "x")


def test_sheet_shows_the_images_spread_over_the_shards(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path, count=10)
    samples = list(spread_samples(tmp_path, manifest, "train", 4))
    assert [sample.key[-1] for sample in samples] == ["0", "3", "6", "9"]
    sheet = np.asarray(contact_sheet(samples, manifest))
    number = int(str(samples[1].about["source"]).removeprefix("images/")[:4])
    shown = sheet[4 : 4 + 112, 4 + 116 : 4 + 116 + 112]
    expected = np.asarray(Image.fromarray(image(number)).resize((112, 112), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(shown, expected)


def test_commands_print_and_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "data", count=10)
    assert run(monkeypatch, "inspect", tmp_path / "data", "--sheet", tmp_path / "sheet.png") == 0
    assert "train: 10 samples in 3 shards" in capsys.readouterr().out
    assert run(monkeypatch, "inspect", tmp_path / "data", "--json") == 0
    assert json.loads(capsys.readouterr().out)["val"]["classes"] == [4, 3, 3]
    assert (
        run(monkeypatch, "inspect", tmp_path / "data", "--sample", "train-00000001", "--image", tmp_path / "1.png") == 0
    )
    assert Image.open(tmp_path / "1.png").size == (12, 12)
    assert f"wrote {tmp_path / '1.png'}\n" in capsys.readouterr().err
    assert run(monkeypatch, "statistics", tmp_path / "data") == 0
    assert "10 images, 1,440 pixels" in capsys.readouterr().out
    assert run(monkeypatch, "statistics", tmp_path / "data", "--json", "--image", tmp_path / "s.png") == 0
    said = capsys.readouterr()
    assert said.err == f"wrote {tmp_path / 's.png'}\n"
    numbers = json.loads(said.out)
    assert numbers["num_images"] == 10
    pixels = np.stack([image(number) for number in range(10)]).reshape(-1, 3)
    np.testing.assert_allclose(numbers["mean"], pixels.mean(0))
    assert run(monkeypatch, "inspect", tmp_path / "data", "--split", "test") == 2
    assert run(monkeypatch, "statistics", tmp_path / "none") == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_of_the_statistics_is_labelled(channels: int) -> None:
    """The colors stand where they stood, with words around them; without labels the margins would be white."""
    arrays = {
        "mean": np.full(channels, 120.0),
        "eigenvalues": np.linspace(900, 100, channels),
        "eigenvectors": np.eye(channels),
        "mean_image": np.full((4, 4, channels), 50.0),
        "num_images": np.int64(1),
    }
    pixels = np.asarray(draw_statistics(arrays)).astype(int)
    top, left = MARGIN_PX + TITLE_PX, 2 * MARGIN_PX + STATISTICS_PX + ROW_LABEL_PX
    assert pixels.shape == (top + STATISTICS_PX + MARGIN_PX, left + STATISTICS_PX + MARGIN_PX, 3)
    assert (pixels[top : top + STATISTICS_PX, MARGIN_PX : MARGIN_PX + STATISTICS_PX] == 50).all()
    first = pixels[top + 2, left : left + STATISTICS_PX, 0]
    assert (first[2], first[STATISTICS_PX // 2], first[-3]) == (30, 120, 210)  # -3, 0 and +3 deviations of 30
    column, row = STATISTICS_PX // 7, STATISTICS_PX // channels
    for label in range(7):
        assert pixels[top - 14 : top - 2, left + label * column : left + (label + 1) * column].min() < 128
    for label in range(channels):
        beside = pixels[top + label * row : top + (label + 1) * row, left - ROW_LABEL_PX : left - 4]
        assert beside.min() < 128
    assert pixels[:top, : MARGIN_PX + STATISTICS_PX].min() < 128  # the titles
    assert pixels[MARGIN_PX : MARGIN_PX + 14, left:].min() < 128


@pytest.mark.parametrize("data", [b"", b"text", b"PK\x03\x04 text", b"\x93NUMPY"])
def test_damaged_statistics_are_said_to_be_in_our_own_words(tmp_path: Path, data: bytes) -> None:
    manifest = make_dataset(tmp_path / "data")
    path = tmp_path / "data/statistics.npz"
    path.write_bytes(data)
    with pytest.raises(DatasetError) as caught:
        read_statistics(tmp_path / "data", manifest)
    assert str(caught.value) == f"{path} is not the file that the manifest records: {REPAIR}"
    record = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}  # whoever damaged it did that too
    files = manifest.files | {path.name: record}
    with pytest.raises(DatasetError) as caught:
        read_statistics(tmp_path / "data", dataclasses.replace(manifest, files=files))
    assert str(caught.value) == f"{path} is damaged: {REPAIR}"


def test_reindex_equals_dalis_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        f"{key}.{extension}": bytes(17 * row) for row, key in enumerate("abc") for extension in ("jpg", "cls", "x.y")
    }
    (tmp_path / "a.tar").write_bytes(tar_of(files | {"folder/d.jpg": b"1", ".hidden": b"2"}))
    assert run(monkeypatch, "reindex", tmp_path) == 0
    tool = Path(sys.executable).parent / "wds2idx"
    theirs = tmp_path / "theirs.idx"
    subprocess.run([sys.executable, tool, tmp_path / "a.tar", theirs], check=True, capture_output=True)
    assert (tmp_path / "a.idx").read_text() == theirs.read_text()
    assert theirs.read_text().startswith("v1.2 4\n")


@pytest.mark.parametrize("files", [{"a b.jpg": b"1"}, {}, {".x": b"1"}])
def test_reindex_refuses_what_dali_would_not_read(tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(files))
    with pytest.raises(SourceError):
        write_index(tmp_path / "a.tar")
    assert not (tmp_path / "a.idx").exists()


def test_reindex_refuses_a_torn_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(__file__, "a.jpg")
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1500])
    with pytest.raises(SourceError, match="truncated"):
        write_index(tmp_path / "a.tar")


def test_status_follows_a_run(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no data set"):
        read_status(tmp_path)
    job = make_job(tmp_path, MemorySource(bad=2))
    with output.output_lock(tmp_path):
        assert read_status(tmp_path).stage == "running"
        output.begin(tmp_path, {"seed": 0}, {"train": 10, "val": 10})
        for task in make_tasks(10, 4)[:2]:
            build_shard(job, task)
        status = read_status(tmp_path)
    assert status.stage == "running"
    assert (status.splits["train"].shards, status.splits["val"].done) == (2, 0)
    assert status.splits["train"].done in (6, 7)
    assert read_status(tmp_path).stage == "stopped"
    whole = tmp_path / "whole"
    make_dataset(whole)
    assert read_status(whole).stage == "whole"
    assert read_status(whole).splits["val"].done == 10
