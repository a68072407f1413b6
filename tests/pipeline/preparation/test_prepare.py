"""``prepare`` as users run it: the same bytes for any number of workers, again after kills, and clear errors."""

import fcntl
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from pipeline.__main__ import main
from pipeline.manifest import read_manifest
from tests.helpers.preparing import run, tree

Arguments = tuple[object, ...]


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_more_workers_make_the_same_bytes_as_one(
    arguments: Arguments, undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    run(*arguments, "--workers", workers, "--output", tmp_path / "data")
    assert tree(tmp_path / "data") == tree(undisturbed)  # the manifest among them


def test_input_at_a_url_gives_the_same_bytes_as_in_a_folder(
    images: Path, arguments: Arguments, undisturbed: Path, tmp_path: Path
) -> None:
    at_url = [f"file://{images}" if argument == images else argument for argument in arguments]
    run(*at_url, "--workers", 2, "--output", tmp_path / "data")
    assert tree(tmp_path / "data") == tree(undisturbed)


def test_every_image_is_there_once(undisturbed: Path) -> None:
    manifest = read_manifest(undisturbed)
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 54, "val": 6}
    assert [shard.num_samples for shard in manifest.splits["train"].shards] == [9] * 6
    assert not (undisturbed / ".work").exists()
    run("verify", undisturbed, "--full")


def test_again_on_a_whole_data_set_does_nothing(arguments: Arguments, undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    done = run(*arguments, "--output", undisturbed)
    assert "complete already" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()} == before


def test_a_killed_worker_costs_nothing(arguments: Arguments, undisturbed: Path, tmp_path: Path) -> None:
    marker = tmp_path / "killed"
    run(*arguments, "--workers", 2, "--output", tmp_path / "data", fault=f"tar-half@train-000002:{marker}")
    assert marker.exists()
    assert tree(tmp_path / "data") == tree(undisturbed)


@pytest.mark.slow
def test_a_killed_driver_is_continued(arguments: Arguments, undisturbed: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    run(*arguments, "--workers", 1, "--output", data, fault=f"driver-shard-done:{tmp_path / 'killed'}", expect=-9)
    assert not (data / "manifest.json").exists()
    left = tree(data)
    assert {name: left[name] for name in left if not name.startswith(".work")}.items() <= tree(undisturbed).items()
    run("verify", data, expect=2)
    run(*arguments, "--workers", 1, "--output", data)
    assert tree(data) == tree(undisturbed)


def test_an_odd_folder_gives_a_data_set_that_dali_reads_whole(tmp_path: Path) -> None:
    bad, good = make_odd_folder(tmp_path / "odd")
    data = tmp_path / "data"
    done = run(
        *("prepare", "--source", "folder", "--input", tmp_path / "odd", "--output", data),
        *("--resize", 48, "--workers", 2, "--val-fraction", 0),
        expect=3,
    )
    assert f"left out: {len(bad)} images" in done.stdout
    assert "converted: 9 images (1 " in done.stdout
    lines = [json.loads(line) for line in (data / "quarantine.jsonl").read_text().splitlines()]
    left_out = {line["source"]: line["reason"] for line in lines if line["action"] == "left_out"}
    assert left_out.keys() == bad
    assert all(left_out.values())
    assert {line["source"] for line in lines if line["action"] == "converted"} == {
        name for name in good if "exif" in name or "cmyk" in name or "moving" in name
    }
    run("verify", data, "--full")
    assert read_with_dali(data) == len(good)


def make_odd_folder(folder: Path) -> tuple[set[str], set[str]]:
    """Writes odd files; returns the names of those to be left out and of those to be kept."""
    photo = Image.fromarray(skimage.data.astronaut()[:120, :160])
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    (folder / "a").mkdir(parents=True)
    bad = {"empty.jpg": b"", "text.jpg": b"I am text", "cut.jpg": jpeg[: len(jpeg) // 2], "half.png": jpeg[:-2]}
    for name, data in bad.items():
        (folder / "a" / name).write_bytes(data)
    photo.save(folder / "a" / "moving.gif")
    photo.save(folder / "a" / "good.jpg")
    photo.save(folder / "a" / "a png.JPEG", "PNG")
    photo.convert("CMYK").save(folder / "a" / "cmyk.jpg")
    photo.crop((0, 0, 1, 1)).save(folder / "a" / "one pixel.jpg")
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        photo.save(folder / "a" / f"exif {orientation}.jpg", exif=exif)
    good = {f"a/{path.name}" for path in (folder / "a").iterdir()} - {f"a/{name}" for name in bad}
    return {f"a/{name}" for name in bad}, good


def read_with_dali(data: Path) -> int:
    """Decodes every train image with DALI; returns how many there were."""
    dali = pytest.importorskip("nvidia.dali")
    shards = read_manifest(data).splits["train"].shards

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read() -> tuple:
        image, label = dali.fn.readers.webdataset(
            paths=[str(data / shard.name) for shard in shards],
            index_paths=[str(data / shard.index_name) for shard in shards],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
            name="reader",
        )
        return dali.fn.decoders.image(image), label

    pipe = read()
    pipe.build()
    size = pipe.epoch_size("reader")
    for _ in range(size):
        images, labels = pipe.run()
        assert np.asarray(images[0]).shape == (48, 48, 3)
        assert bytes(np.asarray(labels[0])) == b"0"
    return size


def test_a_second_run_into_one_folder_is_refused(arguments: Arguments, tmp_path: Path) -> None:
    work = tmp_path / "data" / ".work"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run(*arguments, "--output", tmp_path / "data", expect=2)
    assert_one_line(done.stderr, "in use by another prepare")


def test_other_settings_are_refused_by_name(arguments: Arguments, undisturbed: Path) -> None:
    done = run(*arguments, "--seed", 5, "--encoding", "raw", "--output", undisturbed, expect=2)
    assert_one_line(done.stderr, 'encoding: "png" there, "raw" asked', "seed: 0 there, 5 asked")
    assert not (undisturbed / ".work").exists()


def test_user_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    digits = ("prepare", "--source", "digits", "--output")
    for given, words in [
        ((*digits, tmp_path / "mine"), "holds something else (thesis.txt)"),
        ((*digits, tmp_path / "mine" / "thesis.txt"), "is not a folder"),
        ((*digits, tmp_path / "x", "--shard-size", 0), "--shard-size 0"),
        (("prepare", "--source", "nothing", "--output", tmp_path / "x"), "--source nothing"),
        (("prepare", "--source", "folder", "--output", tmp_path / "x", "--input", tmp_path / "none"), "no such folder"),
        (("verify", tmp_path / "none"), "no data set folder"),
        (("verify", tmp_path / "mine"), "has no manifest.json"),
    ]:
        monkeypatch.setattr("sys.argv", ["pipeline", *map(str, given)])
        assert main() == 2
        assert_one_line(capsys.readouterr().err, words)
    assert not (tmp_path / "x").exists()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def assert_one_line(text: str, *words: str) -> None:
    assert text.startswith("error: "), text
    assert text.count("\n") == 1, text
    for word in words:
        assert word in text, text


def test_a_damaged_index_is_made_again_without_its_images(
    arguments: Arguments, undisturbed: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(undisturbed, data)
    (data / "train/train-000001.idx").write_text("v1.2 0\n")
    (data / "train/train-000003.idx").unlink()
    before = {path: path.stat().st_ino for path in data.rglob("*.tar")}
    done = run(*arguments, "--output", data)
    assert "2 damaged indexes regenerated" in done.stdout
    assert "images/s" not in done.stdout
    assert {path: path.stat().st_ino for path in data.rglob("*.tar")} == before
    assert tree(data) == tree(undisturbed)
