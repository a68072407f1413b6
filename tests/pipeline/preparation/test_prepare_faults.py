"""Faults on real processes: afterwards the bytes are those of an undisturbed run, or the error is one clear line."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.preparation import faults
from tests.helpers.frozen import hold, release
from tests.helpers.preparing import command, environment, make_images, prepare_here, run, start, tree
from tests.helpers.small_disk import remount, small_disk

pytestmark = pytest.mark.slow

Arguments = tuple[object, ...]
WORKER_POINTS = faults.POINTS[: faults.POINTS.index("driver-shard-done")]
DRIVER_POINTS = faults.POINTS[faults.POINTS.index("driver-shard-done") :]


def final(folder: Path) -> dict[str, str]:
    """The files under final names."""
    return {name: sha for name, sha in tree(folder).items() if not name.startswith((".work/", "."))}


@pytest.mark.parametrize("point", WORKER_POINTS)
def test_a_worker_killed_at_any_point_costs_nothing(
    arguments: Arguments, undisturbed: Path, tmp_path: Path, point: str
) -> None:
    marker = tmp_path / "killed"
    run(*arguments, "--workers", 2, "--output", tmp_path / "data", fault=f"{point}@train-000003:{marker}")
    assert marker.exists()
    assert tree(tmp_path / "data") == tree(undisturbed)


@pytest.mark.parametrize("point", DRIVER_POINTS)
def test_a_driver_killed_at_any_point_is_continued(
    arguments: Arguments, undisturbed: Path, tmp_path: Path, point: str
) -> None:
    data = tmp_path / "data"
    run(*arguments, "--workers", 2, "--output", data, fault=f"{point}:{tmp_path / 'killed'}", expect=-9)
    assert final(data).items() <= tree(undisturbed).items()
    assert (data / "manifest.json").exists() == (point == "manifest-renamed")
    run(*arguments, "--workers", 2, "--output", data)
    assert tree(data) == tree(undisturbed)


def test_a_killed_driver_leaves_a_state_that_is_told_and_continued(
    arguments: Arguments, undisturbed: Path, tmp_path: Path
) -> None:
    """SIGKILL while shards are done and one is in work; of signals that are heard, see test_stages."""
    data, marker = tmp_path / "data", tmp_path / "held"
    words = (*arguments, "--workers", 2, "--output", data)
    process = start(*words, fault=f"hold-tar-half@train-000003:{marker}")
    wait_for(lambda: marker.exists() and len(list((data / ".work" / "records").glob("*.json"))) >= 3, process)
    process.kill()
    process.communicate(timeout=60)
    assert not (data / "manifest.json").exists()
    status = json.loads(run("status", data, "--json").stdout)
    assert status["stage"] == "stopped"
    assert 0 < status["splits"]["train"]["done"] < 54
    run(*words)
    assert tree(data) == tree(undisturbed)


def test_of_two_runs_into_one_folder_the_second_is_refused(
    arguments: Arguments, undisturbed: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    first = start(*arguments, "--workers", 1, "--output", data)
    held = hold(lambda: [first.pid] if (data / ".work" / "plan.json").exists() else [], "a run that has begun")
    second = run(*arguments, "--output", data, expect=2)
    assert second.stderr.startswith("error: ")
    assert "in use by another prepare" in second.stderr
    assert json.loads(run("status", data, "--json").stdout)["stage"] == "running"
    release(held)
    first.communicate(timeout=120)
    assert first.returncode == 0
    assert tree(data) == tree(undisturbed)


def wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    with small_disk(tmp_path / "disk", "300k") as folder:
        yield folder


def test_a_full_disk_is_one_line_and_is_continued(arguments: Arguments, undisturbed: Path, disk: Path) -> None:
    filler = disk / "data" / ".work"
    filler.mkdir(parents=True)
    (filler / "filler").write_bytes(bytes(200_000))
    done = run(*arguments, "--workers", 2, "--output", disk / "data", expect=2)
    assert_one_error(done.stderr, "No space left on device")
    assert final(disk / "data").items() <= tree(undisturbed).items()
    remount(disk, "size=20m")
    run(*arguments, "--workers", 2, "--output", disk / "data")
    assert tree(disk / "data") == tree(undisturbed)


def test_an_output_that_is_read_only_is_one_line(arguments: Arguments, disk: Path) -> None:
    remount(disk, "ro")
    done = run(*arguments, "--output", disk / "data", expect=2)
    assert_one_error(done.stderr, "Read-only file system")


def assert_one_error(text: str, words: str) -> None:
    """One line says what is wrong; lines of progress may come before it."""
    *before, last = text.splitlines()
    assert all(line.startswith("prepared ") for line in before), text
    assert last.startswith("error: "), text
    assert words in last, text


DAMAGES = {
    "deleted tar": ("train/train-000001.tar", lambda path: path.unlink()),
    "deleted index": ("train/train-000001.idx", lambda path: path.unlink()),
    "truncated tar": ("train/train-000001.tar", lambda path: os.truncate(path, 5000)),
    "flipped tar": ("train/train-000001.tar", lambda path: flip(path)),
    "flipped index": ("train/train-000001.idx", lambda path: flip(path)),
    "flipped info": ("_info.json", lambda path: flip(path)),
    "deleted statistics": ("statistics.npz", lambda path: path.unlink()),
    "flipped quarantine": ("quarantine.jsonl", lambda path: path.write_text("x")),
    "flipped manifest": ("manifest.json", lambda path: flip(path)),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_later_damage_is_found_and_repaired(
    arguments: Arguments,
    undisturbed: Path,
    tmp_path: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By Ray's workers where a tar is at stake; what else is made again is made by whoever makes it."""
    data = tmp_path / "data"
    shutil.copytree(undisturbed, data)
    name, change = DAMAGES[damage]
    change(data / name)
    monkeypatch.setattr("sys.argv", ["pipeline", "verify", str(data), "--full"])
    assert main() == 2
    assert name in capsys.readouterr().err
    words = (*arguments[1:], "--workers", 2, "--output", data)
    if damage.endswith(" tar"):
        run("prepare", *words)
    else:
        assert prepare_here(monkeypatch, *words) == 0
    assert tree(data) == tree(undisturbed)


def test_another_working_folder_and_names_of_all_kinds(tmp_path: Path) -> None:
    source = tmp_path / "in"
    names = ["a b/c d.png", "Ähre/ü.png", "ähre/ü.png", "CAT/x.png", "cat/x.png", "cat/same.png", "CAT/same.png"]
    made = sorted(make_images(tmp_path / "made", count=len(names)).rglob("*.png"))
    for name, path in zip(names, made, strict=True):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, source / name)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = Path(faults.__file__).resolve().parents[2]
    done = subprocess.run(
        command("prepare", "--source", "folder", "--input", "../in", "--output", "out", "--val-fraction", 0),
        cwd=elsewhere,
        env=environment() | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run("verify", elsewhere / "out", "--full")
    assert "train: 7 images" in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-errors", "1"), "2 images cannot be used, more than --max-errors 1"),
        (("--max-errors", "2%"), "images cannot be used, more than --max-errors 2%"),
        (("--on-error", "fail"), "bad.png: not an image"),
    ],
)
def test_too_many_bad_images_stop_the_run(tmp_path: Path, options: tuple[str, str], words: str) -> None:
    source = make_images(tmp_path / "in", count=30)
    for name in ("ant", "bee"):
        (source / name / "bad.png").write_text("text")
    arguments = ("prepare", "--source", "folder", "--input", source, "--shard-size", 40, "--val-fraction", 0)
    data = tmp_path / "data"
    done = run(*arguments, "--resize", "none", "--encoding", "png", "--output", data, *options, expect=2)
    assert_one_error(done.stderr, words)
    assert not (data / "manifest.json").exists()
    run(*arguments, "--resize", "none", "--encoding", "png", "--output", data, "--max-errors", "2", expect=3)
