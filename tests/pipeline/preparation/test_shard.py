"""One shard: deterministic, complete or absent, and read alike by tarfile, webdataset, DALI's index tool and DALI."""

import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.errors import OutputError, SourceError
from pipeline.preparation import faults, statistics
from pipeline.preparation.shard import build_shard, read_result, seal_holds, sealed_json
from pipeline.preparation.tar_writer import header
from tests.helpers.odd_images import KINDS_EXPECTED
from tests.helpers.shard_data import MemorySource, image, make_job, make_tasks

WORKER_POINTS = faults.POINTS[: faults.POINTS.index("driver-shard-done")]


def tree(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_headers_equal_those_of_the_standard_library() -> None:
    for name, size in (("train-00000000.jpg", 0), ("a", 1), ("x" * 100, 8**11 - 1)):
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o644, 0
        theirs = tarfile.TarInfo.frombuf(info.tobuf(tarfile.USTAR_FORMAT), "ascii", "strict").get_info()
        ours = tarfile.TarInfo.frombuf(header(name, size), "ascii", "strict").get_info()  # raises on a wrong checksum
        assert ours | {"chksum": 0} == theirs | {"chksum": 0}


def test_same_task_gives_the_same_bytes_and_leaves_no_temporary(tmp_path: Path) -> None:
    task = make_tasks(9, 5)[0]
    trees = []
    for name in ("one", "two"):
        build_shard(make_job(tmp_path / name), task)
        trees.append(tree(tmp_path / name))
    assert trees[0] == trees[1]
    assert sorted(trees[0]) == [
        ".work/records/train-000000.json",
        ".work/records/train-000000.sums",
        "train/train-000000.idx",
        "train/train-000000.tar",
    ]


def test_tarfile_and_webdataset_read_every_sample(tmp_path: Path) -> None:
    task = make_tasks(7, 7)[0]
    result = build_shard(make_job(tmp_path), task)
    with tarfile.open(tmp_path / task.name) as tar:
        members = tar.getmembers()
        assert all((m.mtime, m.uid, m.gid, m.uname, m.isreg()) == (0, 0, 0, "", True) for m in members)
        contents = {member.name: tar.extractfile(member).read() for member in members}
    samples = list(webdataset.WebDataset(str(tmp_path / task.name), shardshuffle=False))
    assert len(samples) == result.shard.num_samples == 7
    for position, (sample, item) in enumerate(zip(samples, task.items, strict=True)):
        assert sample["__key__"] == f"train-{position:08d}"
        assert sample["cls"] == b"%d" % item.label == contents[f"{sample['__key__']}.cls"]
        assert sample["png"] == contents[f"{sample['__key__']}.png"]
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), image(item.offset))
        about = json.loads(sample["json"])
        assert (about["source"], about["width"], about["height"]) == (item.name, 12, 12)
        assert about["class"] == ("ant", "bee", "cat")[item.label]


def test_index_equals_the_one_dalis_tool_makes(tmp_path: Path) -> None:
    task = make_tasks(7, 7)[0]
    build_shard(make_job(tmp_path), task)
    theirs = tmp_path / "theirs.idx"
    tool = Path(sys.executable).parent / "wds2idx"
    subprocess.run([sys.executable, tool, tmp_path / task.name, theirs], check=True, capture_output=True)
    assert (tmp_path / task.name).with_suffix(".idx").read_text() == theirs.read_text()


def test_dali_reads_every_sample(tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    task = make_tasks(7, 7)[0]
    build_shard(make_job(tmp_path), task)

    @dali.pipeline_def(batch_size=7, num_threads=1, device_id=None)
    def read() -> tuple:
        data, label, _ = dali.fn.readers.webdataset(
            paths=[str(tmp_path / task.name)],
            index_paths=[str((tmp_path / task.name).with_suffix(".idx"))],
            ext=["png", "cls", "json"],
            missing_component_behavior="error",
        )
        return dali.fn.decoders.image(data), label

    pipe = read()
    pipe.build()
    images, labels = pipe.run()
    for position, item in enumerate(task.items):
        np.testing.assert_array_equal(np.asarray(images[position]), image(item.offset))
        assert int(bytes(np.asarray(labels[position]))) == item.label


def test_bad_images_are_left_out_and_listed(tmp_path: Path) -> None:
    tasks = make_tasks(10, 10)
    result = build_shard(make_job(tmp_path, MemorySource(bad=3)), tasks[0])
    assert result.shard.num_samples == 9
    assert result.num_left_out == 1
    line = {"split": "train", "source": "images/0003.png", "class": "ant", "action": "left_out"}
    assert [dict(row) for row in result.quarantine] == [
        line | {"reason": f"not an image by its content: {KINDS_EXPECTED}"}
    ]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(str(tmp_path / tasks[0].name), shardshuffle=False)]
    missing = next(position for position, item in enumerate(tasks[0].items) if item.offset == 3)
    assert f"train-{missing:08d}" not in keys


def test_asked_to_fail_it_fails_and_leaves_nothing(tmp_path: Path) -> None:
    job = dataclasses.replace(make_job(tmp_path, MemorySource(bad=3)), fail_on_error=True)
    with pytest.raises(SourceError, match=r"images/0003\.png: not an image"):
        build_shard(job, make_tasks(10, 10)[0])
    assert tree(tmp_path) == {}


def test_a_shard_of_nothing_but_bad_images_has_a_record_only(tmp_path: Path) -> None:
    result = build_shard(make_job(tmp_path, MemorySource(bad=0)), make_tasks(1, 1)[0])
    assert result.shard.num_samples == 0
    assert sorted(tree(tmp_path)) == [".work/records/train-000000.json"]


def test_an_output_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    (tmp_path / "train").rmdir()
    with pytest.raises(OutputError, match=r"cannot write .*train-000000\.tar: No such file"):
        build_shard(job, make_tasks(3, 3)[0])
    assert list((tmp_path / ".work" / "tmp").iterdir()) == []


@pytest.mark.parametrize("point", WORKER_POINTS)
def test_killed_at_any_point_nothing_torn_has_a_final_name(tmp_path: Path, point: str) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    task = make_tasks(9, 9)[0]
    build_shard(make_job(undisturbed), task)
    job = make_job(killed)
    if (child := os.fork()) == 0:
        os.environ[faults.VARIABLE] = f"{point}@train-000000:{tmp_path / 'marker'}"
        statistics.multiplies_bytes = lambda torch: False  # torch's threads do not outlive a fork; workers have one
        build_shard(job, task)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    whole = tree(undisturbed)
    left = {name: sha for name, sha in tree(killed).items() if not name.startswith(".work/tmp/")}
    assert left.items() <= whole.items()
    assert ("train/train-000000.tar" in left) == (point in WORKER_POINTS[2:])
    build_shard(job, task)
    assert {name: sha for name, sha in tree(killed).items() if not name.startswith(".work/tmp/")} == whole


@pytest.mark.parametrize("cut", ["json", "sums"])
def test_a_damaged_record_counts_as_none(tmp_path: Path, cut: str) -> None:
    built = build_shard(make_job(tmp_path), make_tasks(3, 3)[0])
    work = tmp_path / ".work"
    again = read_result(work, "train-000000", with_positions=True)
    assert again is not None
    assert again.shard == built.shard
    record = work / "records" / f"train-000000.{cut}"
    record.write_bytes(record.read_bytes()[:-3])
    assert read_result(work, "train-000000", with_positions=True) is None


def test_seal_notices_every_flipped_byte() -> None:
    sealed = sealed_json({"source": "é", "label": 1}, b"image", b"1")
    assert json.loads(sealed)["source"] == "é"
    assert seal_holds(sealed, b"image", b"1")
    assert not seal_holds(sealed, b"pictura", b"1")
    assert not seal_holds(sealed, b"image", b"2")
    for position in range(len(sealed)):
        flipped = bytearray(sealed)
        flipped[position] ^= 1
        assert not seal_holds(bytes(flipped), b"image", b"1")
