"""What became of every file is printed, recorded and checked; a split may vanish, a count may not."""

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.commands.prepare import print_converted
from pipeline.inspection.verify import check_dataset
from pipeline.manifest import MANIFEST_NAME, read_manifest
from pipeline.sources import reasons
from tests.helpers.odd_trees import picture
from tests.helpers.preparing import KEEP, prepare_here, run, tree


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two splits of two classes, three pictures each, and some files that are none."""
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            for number in range(3):
                write(tmp_path / f"in/{split}/{label}/{number}.jpg", picture(number))
    write(tmp_path / "in/train/cat/.DS_Store", b"x")
    write(tmp_path / "in/train/cat/notes.txt", b"text")
    return tmp_path / "in"


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """A command of the pipeline in this process."""
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["pipeline", *map(str, arguments)])
        return main()


def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: object) -> tuple[int, Path]:
    """Exit code and data set."""
    output = folder.parent / "out"
    words = ("--source", "folder", "--input", folder, "--output", output, *KEEP, *options)
    return prepare_here(monkeypatch, *words), output


SUMMARY = """\
classes: 2
found 14 = 12 stored + 0 left out (quarantine.jsonl) + 2 passed over
passed over: train: 1 hidden (train/cat/.DS_Store)
passed over: train: 1 no picture by its name and content (train/cat/notes.txt)
"""


def test_the_summary_says_it_and_so_do_the_other_commands(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, output = prepare(monkeypatch, folder)
    assert SUMMARY in capsys.readouterr().out
    for command in (("inspect", output), ("status", output)):
        assert run_here(monkeypatch, *command) == 0
        assert SUMMARY.removeprefix("classes: 2\n") in capsys.readouterr().out
    assert run_here(monkeypatch, "verify", output) == 0
    assert "found 14 = 12 stored" in capsys.readouterr().out
    prepare(monkeypatch, folder, "--dry-run")
    printed = capsys.readouterr().out
    assert "source folder: 2 classes" in printed
    assert "found 14 = 12 to be stored + 2 passed over\n" in printed
    assert SUMMARY.partition("passed over\n")[2] in printed


def test_splits_and_limit_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, output = prepare(monkeypatch, folder, "--splits", "train", "--limit", 2)
    manifest = read_manifest(output)
    assert {(row.split, row.reason): row.count for row in manifest.passed_over} == {
        ("train", reasons.HIDDEN): 1,
        ("train", reasons.NO_PICTURE): 1,
        ("train", reasons.OVER_LIMIT): 4,
        ("val", reasons.NOT_CHOSEN): 6,
    }
    assert manifest.num_found == 14
    assert check_dataset(output, manifest) == []


def test_classes_that_only_one_split_has_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "train/emu/1.jpg", picture(1))
    for name in "uvwxyz":
        write(folder / f"val/{name}/1.jpg", picture(1))
    prepare(monkeypatch, folder, "--dry-run")
    assert capsys.readouterr().err == (
        "warning: classes that only train has: emu\nwarning: classes that only val has: u, v, w, x, y, ... (6)\n"
    )


def test_a_split_without_a_usable_image_is_dropped_with_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (folder / "val").rglob("*.jpg"):
        path.write_bytes(b"text")
    code, output = prepare(monkeypatch, folder)
    captured = capsys.readouterr()
    assert code == 3
    assert captured.err == "warning: val is left out: none of its 6 images can be used\n"
    assert "found 14 = 6 stored + 6 left out (quarantine.jsonl) + 2 passed over" in captured.out
    manifest = read_manifest(output)
    assert set(manifest.splits) == {"train"}
    assert manifest.dropped_splits == {"val": 6}
    assert len((output / "quarantine.jsonl").read_text().splitlines()) == 6
    assert not (output / "val").exists()
    assert check_dataset(output, manifest, level="full") == []
    before = tree(output)
    for damaged in (None, "train/train-000000.tar", "statistics.npz"):
        if damaged:
            (output / damaged).unlink()
        assert prepare(monkeypatch, folder)[0] == 3
        assert tree(output) == before


def test_a_train_split_without_a_usable_image_is_dropped_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (folder / "train").rglob("*.jpg"):
        path.write_bytes(b"text")
    code, output = prepare(monkeypatch, folder)
    assert (code, set(read_manifest(output).splits)) == (3, {"val"})
    assert not (output / "statistics.npz").exists()
    assert check_dataset(output, read_manifest(output)) == []


def test_no_usable_image_at_all_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"text")
    code, output = prepare(monkeypatch, folder)
    assert code == 2
    assert "no image can be used; the first reason: not an image" in capsys.readouterr().err
    assert not (output / MANIFEST_NAME).exists()


def test_what_was_counted_stands_when_files_are_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is passed over, and comes later, makes no other data set."""
    _, output = prepare(monkeypatch, folder)
    before = tree(output)
    write(folder / "train/.DS_Store", b"x")
    for name in ("statistics.npz", "quarantine.jsonl", "val/val-000000.tar"):
        (output / name).unlink()
        assert prepare(monkeypatch, folder)[0] == 0
        assert tree(output) == before


def test_a_data_set_of_another_version_is_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, output = prepare(monkeypatch, folder)
    (output / MANIFEST_NAME).write_text(json.dumps({"format": 1}))
    before = tree(output)
    for options in ((), ("--seed", 5)):
        assert prepare(monkeypatch, folder, *options)[0] == 2
        assert "manifest format 1 is not supported (expected 2): prepare the data set again" in capsys.readouterr().err
        assert tree(output) == before


def test_a_file_that_is_too_large_is_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (folder / "train/cat/sparse.jpg").open("wb") as file:
        file.truncate(2**33)  # claims 8 GiB, and has no block on the disk
    monkeypatch.setattr(Path, "read_bytes", lambda path: path.open("rb").read(2**20))
    prepare(monkeypatch, folder, "--dry-run")
    assert "1 of them unusable" in capsys.readouterr().out
    code, output = prepare(monkeypatch, folder)
    lines = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert code == 3
    assert [line["reason"] for line in lines] == ["8,589,934,592 bytes, more than --max-bytes 268,435,456"]


def test_verify_notices_counts_that_do_not_add_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "val/cat/bad.jpg", b"text")
    _, output = prepare(monkeypatch, folder)
    manifest = read_manifest(output)
    val = manifest.splits["val"]
    for change, file in (
        ({"num_found": 14}, MANIFEST_NAME),
        ({"passed_over": manifest.passed_over[1:]}, MANIFEST_NAME),
        ({"dropped_splits": {"test": 1}}, MANIFEST_NAME),
        ({"splits": manifest.splits | {"val": dataclasses.replace(val, num_quarantined=0)}}, "quarantine.jsonl"),
    ):
        problems = check_dataset(output, dataclasses.replace(manifest, **change))
        assert file in {problem.file for problem in problems}, change


@pytest.mark.parametrize(
    ("given", "output", "words"),
    [
        ("in", "in", "lies inside --input"),
        ("in", "in/shards", "lies inside --input"),
        ("in", "in/../in/a/b", "lies inside --input"),
        ("in", "link/shards", "lies inside --input"),
        ("link", "in/shards", "lies inside --input"),
        ("in", "inner/shards", "lies inside --input"),
        ("in/train", "in", "lies inside --output"),
        ("link/train", "in", "lies inside --output"),
        ("file://{root}/in", "in/shards", "lies inside --input"),
        ("in", "file://{root}/in/shards", "lies inside --input"),
        ("in", "caf\udce9/out", r"caf\xe9/out: its path is no UTF-8"),
    ],
)
def test_one_inside_the_other_is_refused_before_any_work(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: str,
    output: str,
    words: str,
) -> None:
    root = folder.parent
    (root / "link").symlink_to("in")
    (root / "inner").symlink_to("in/train")
    monkeypatch.setenv("TWOTOWER_CACHE", str(root / "cache"))
    monkeypatch.chdir(root)
    before = tree(root)
    for more in ((), ("--dry-run",)):
        places = ("--input", given.format(root=root), "--output", output.format(root=root))
        assert prepare_here(monkeypatch, "--source", "folder", *places, *KEEP, *more) == 2
        text = capsys.readouterr().err
        assert words in text
        assert text.count("\n") == 1
    assert tree(root) == before
    assert not (root / "cache").exists()


def test_a_neighbor_whose_name_begins_alike_is_no_inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = folder.parent / "in-shards"
    assert prepare_here(monkeypatch, "--source", "folder", "--input", folder, "--output", output, *KEEP) == 0


def test_a_refusal_leaves_no_output_and_starts_no_ray(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (folder / "val").iterdir():
        path.rename(folder / f"val/{path.name}.x")
    for path in sorted((folder / "val").rglob("*.jpg")):
        path.rename(folder / "val" / f"{path.parent.name}{path.name}")
    for more in ((), ("--dry-run",)):
        code, output = prepare(monkeypatch, folder, *more)
        assert code == 2
        error = capsys.readouterr().err
        assert "pictures in no class folders" in error
        assert error.count("\n") == 1
        assert not output.exists()


@pytest.mark.slow
def test_a_folder_whose_path_is_no_utf8(tmp_path: Path) -> None:
    """By real processes: Ray tells its server the command line and the working folder, which must be UTF-8."""
    place = tmp_path / "caf\udce9"
    for label in ("ca\nt", "do\udce9g"):
        for number in range(4):
            write(place / f"in/{label}/{number}\udcff.jpg", picture(number))
    (place / "in/ca\nt/self").symlink_to(".")
    (place / "in/ca\nt/up").symlink_to("..")
    words = ("prepare", "--source", "folder", *KEEP, "--val-fraction", 0, "--workers", 1)
    done = run(*words, "--input", place / "in", "--output", tmp_path / "a")
    assert "passed over: 2 directory loop" in done.stdout
    assert r"(ca\nt/self, ca\nt/up)" in done.stdout
    run("verify", "--full", tmp_path / "a")
    assert [row["name"] for row in json.loads((tmp_path / "a/manifest.json").read_text())["classes"]] == [
        "ca\nt",
        r"do\xe9g",
    ]
    run(*words, "--input", "in", "--output", tmp_path / "b", cwd=place)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_classes_of_which_a_split_has_no_usable_image_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "train/emu/1.jpg", b"text")
    write(folder / "val/emu/1.jpg", picture(1))
    write(folder / "train/cat/0.jpg", b"text")
    for path in (folder / "val/dog").iterdir():
        path.write_bytes(b"text")
    expected = (
        "warning: classes of which no image of train can be used: emu\n"
        "warning: classes of which no image of val can be used: dog\n"
    )
    for _ in ("made", "complete already"):
        assert prepare(monkeypatch, folder)[0] == 3
        assert capsys.readouterr().err == expected


def test_an_input_that_has_changed_is_said_in_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, output = prepare(monkeypatch, folder)
    before = tree(output)
    write(folder / "train/cat/new.jpg", picture(9))
    capsys.readouterr()
    assert prepare(monkeypatch, folder)[0] == 2
    error = capsys.readouterr().err
    assert "other settings (the input's files: their names, classes or sizes have changed since); give" in error
    assert error.count("\n") == 1
    assert tree(output) == before


def test_conversions_are_counted_one_by_one_and_their_images_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = "stored as PNG: only bytes of JPEGs and PNGs are kept"
    reasons_of = [f"BMP converted; {kept}", f"GIF converted; palette to RGB; {kept}", f"BMP converted; {kept}"]
    about = {"split": "train", "source": "a/1", "class": "a"}
    rows = [about | {"action": "converted", "reason": reason} for reason in reasons_of]
    lines = [json.dumps(row) for row in [*rows, about | {"action": "left_out", "reason": "empty file"}]]
    (tmp_path / "quarantine.jsonl").write_text("\n".join(lines) + "\n")
    print_converted(tmp_path)
    assert capsys.readouterr().out == (
        f"converted: 3 images (3 {kept}, 2 BMP converted, 1 GIF converted, 1 palette to RGB); "
        f"see {tmp_path / 'quarantine.jsonl'}\n"
    )
