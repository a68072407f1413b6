"""Splits and classes as people name them; what is ambiguous is refused with what would help."""

from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline.config import PrepareOptions
from pipeline.errors import SourceError
from pipeline.files import AnyPath, UrlPath
from pipeline.sources import open_source, reasons
from pipeline.sources.listing import Listing

JPEG = b"\xff\xd8\xff\xe0"


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"text" if path.suffix == ".txt" else JPEG)
    return root


def listing_of(root: AnyPath, **options: object) -> Listing:
    given = {"source": "folder", "output": Path("out"), "input": root, "val_fraction": 0.0} | options
    return open_source(PrepareOptions(**given)).listing()


def classes_of(listing: Listing) -> dict[str, dict[str, list[str]]]:
    """Split -> class -> the last parts of its pictures' names."""
    found: dict[str, dict[str, list[str]]] = {}
    for split, rows in listing.splits.items():
        for item in rows.items(np.arange(len(rows))):
            names = found.setdefault(split, {}).setdefault(listing.classes[item.label].name, [])
            names.append(item.name.rpartition("/")[2])
    return found


def counted(listing: Listing) -> dict[tuple[str, str], int]:
    return {(row.split, row.reason): row.count for row in listing.passed_over}


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "val"), ("Train", "Valid"), ("TRAIN", "VAL"), ("Training", "Validation"), ("training", "VALID")],
)
@pytest.mark.parametrize("wrapper", ["", "dataset/", "a/b/"])
@pytest.mark.parametrize("level", ["", "images/"])
def test_splits_in_any_case_and_word_below_any_wrapper(
    tmp_path: Path, train: str, val: str, wrapper: str, level: str
) -> None:
    for split, name in ((train, "1.jpg"), (val, "2.jpg"), ("Testing", "3.jpg")):
        make(tmp_path, *(f"{wrapper}{split}/{label}/{level}{name}" for label in ("cat", "dog")))
    listing = listing_of(tmp_path)
    assert classes_of(listing) == {
        split: {"cat": [name], "dog": [name]}
        for split, name in (("train", "1.jpg"), ("val", "2.jpg"), ("test", "3.jpg"))
    }
    assert not listing.passed_over
    assert not listing.warnings


@pytest.mark.parametrize("wrapper", ["", "dataset/", "a/b/", "images/"])
def test_class_folders_below_any_wrapper(tmp_path: Path, wrapper: str) -> None:
    make(tmp_path, f"{wrapper}cat/1.jpg", f"{wrapper}dog/images/2.jpg")
    assert classes_of(listing_of(tmp_path)) == {"train": {"cat": ["1.jpg"], "dog": ["2.jpg"]}}


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["cat/1.jpg"], {"cat": ["1.jpg"]}),
        (["cat/a/1.jpg"], {"cat": ["1.jpg"]}),
        (["n01443537/images/1.jpg"], {"n01443537": ["1.jpg"]}),
        (["images/cat/1.jpg"], {"cat": ["1.jpg"]}),
        (["bullet_train/1.jpg", "cat/2.jpg"], {"bullet_train": ["1.jpg"], "cat": ["2.jpg"]}),
        (
            ["beach/1.jpg", "test_tube/2.jpg", "train_station/3.jpg", "valley/4.jpg"],
            {"beach": ["1.jpg"], "test_tube": ["2.jpg"], "train_station": ["3.jpg"], "valley": ["4.jpg"]},
        ),
        (["photos/1.jpg", "cat/2.jpg"], {"cat": ["2.jpg"], "photos": ["1.jpg"]}),
        (["train/images/cat/1.jpg", "train/images/dog/2.jpg"], {"cat": ["1.jpg"], "dog": ["2.jpg"]}),
        (["train/cat/a/1.jpg", "train/cat/b/2.jpg"], {"cat": ["1.jpg", "2.jpg"]}),  # folders of a class are the class
    ],
)
def test_one_class_and_folders_named_images(tmp_path: Path, names: list[str], classes: dict[str, list[str]]) -> None:
    assert classes_of(listing_of(make(tmp_path, *names))) == {"train": classes}


FLAT = ["train/cat/1.jpg", "train/dog/2.jpg", "val/3.jpg", "val/4.jpg"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (FLAT, r"val \(2\): .*--labels FILE .*, or leave them out by --splits train"),
        ([*FLAT, "val/val_annotations.txt"], r"--labels .*/val/val_annotations\.txt"),
        ([*FLAT[:2], "val/images/3.jpg", "test/4.jpg"], r"test \(1\) and .*val \(1\)"),
        (["1.jpg", "2.jpg"], r"no class folders: .*\(2\): give their classes by --labels FILE"),
        (["images/1.jpg"], "no class folders"),
        (
            ["images/train/1.jpg", "images/val/2.jpg", "labels/train/1.txt"],
            r"images/train \(1\) and .*images/val \(1\)",
        ),
        (["train/1.jpg", "car/2.jpg", "bus/3.jpg"], "rename a folder that is a class and no split"),
        (["test/1.jpg", "cat/2.jpg", "dog/3.jpg"], r"test/ is named like a split, .*class folders \(cat, dog\)"),
        (["Valid/a/1.jpg", "cat/2.jpg"], "Valid/ is named like a split"),
        (["training_set/cats/1.jpg", "test_set/cats/2.jpg"], "training_set look like splits, not like classes"),
        (["a/train2017/1.jpg", "a/val2017/2.jpg"], "a/train2017, a/val2017 look like splits"),
        (["TrainImages/1.jpg"], "TrainImages look like splits"),
        (
            ["training_set/cats/1.jpg", "test_set/cats/2.jpg", "single_prediction/3.jpg"],
            "test_set, training_set look like splits",
        ),
        (["train2017/a/1.jpg", "val2014/a/2.jpg", "unlabeled2017/3.jpg"], "train2017, val2014 look like splits"),
        (["cat_train/1.jpg", "cat_test/2.jpg", "dog/3.jpg"], "cat_test, cat_train look like splits"),
        (["MyTrain/1.jpg", "MyVal/2.jpg", "dog/3.jpg"], "MyTrain, MyVal look like splits"),
        (["train/a/1.jpg", "Train/a/1.jpg"], "both Train/ and train/ are there"),
        (["train/a/1.jpg", "val/a/1.jpg", "Validation/a/1.jpg"], "both Validation/ and val/ are there"),
        (
            ["cat/train/1.jpg", "cat/val/2.jpg", "dog/train/3.jpg"],
            "cat: holds train/, val/, so images of several splits",
        ),
        (["train/a/1.jpg", "val/.hidden.jpg"], r"val holds no picture; .*--splits train"),
        (["train/a/1.jpg", "val/a/.hidden.jpg"], "val holds no picture"),
        (["train/.x.jpg"], "no class folders with pictures"),
        (
            ["cat/1.jpg", *(f"{number}.jpg" for number in range(5))],
            "5 pictures lie beside the class folders, which hold 1",
        ),
    ],
)
def test_what_is_ambiguous_is_refused_in_one_line(tmp_path: Path, names: list[str], words: str) -> None:
    with pytest.raises(SourceError, match=words) as caught:
        listing_of(make(tmp_path, *names))
    assert "\n" not in str(caught.value)


def test_a_split_folder_that_is_empty_is_an_error_unless_it_is_not_wanted(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.jpg")
    (tmp_path / "val").mkdir()
    with pytest.raises(SourceError, match="val holds no picture"):
        listing_of(tmp_path)
    assert classes_of(listing_of(tmp_path, splits=("train",))) == {"train": {"a": ["1.jpg"]}}


def test_a_flat_split_that_is_not_wanted_is_counted(tmp_path: Path) -> None:
    listing = listing_of(make(tmp_path, *FLAT, "val/.x"), splits=("train",))
    assert set(listing.splits) == {"train"}
    assert counted(listing) == {("val", reasons.NOT_CHOSEN): 2, ("val", reasons.HIDDEN): 1}


def test_names_in_two_unicode_forms_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    make(tmp_path, f"train/{composed}/1.jpg", f"train/{decomposed}/2.jpg", f"val/{decomposed}/3.jpg")
    listing = listing_of(tmp_path)
    assert classes_of(listing) == {"train": {composed: ["2.jpg", "1.jpg"]}, "val": {composed: ["3.jpg"]}}
    assert len(listing.warnings) == 1
    assert "two folders are one class: their names, 'cafe\\u0301' and 'caf\\xe9'" in listing.warnings[0]


def test_classes_that_differ_in_case_only_are_told(tmp_path: Path) -> None:
    listing = listing_of(make(tmp_path, "Cat/1.jpg", "cat/1.jpg", "dog/1.jpg"))
    assert [record.name for record in listing.classes] == ["Cat", "cat", "dog"]
    assert listing.warnings == ("classes whose names differ in case only stay apart: Cat, cat",)


def test_classes_whose_pictures_all_lie_in_sub_folders_are_told(tmp_path: Path) -> None:
    make(tmp_path, "animal/cat/1.jpg", "animal/dog/2.jpg", "plant/a/b/3.jpg", "plant/c/4.jpg")
    make(tmp_path, "car/5.jpg", "car/x/6.jpg", "car/y/7.jpg", "bus/images/a/8.jpg", "bus/images/b/9.jpg")
    listing = listing_of(tmp_path)
    assert [record.name for record in listing.classes] == ["animal", "bus", "car", "plant"]
    assert [warning.partition(": ")[2] for warning in listing.warnings] == [
        "all pictures of animal, plant lie in sub-folders, and all sub-folders of a class are that class"
    ]


@pytest.mark.parametrize("base", ["", "train/"])
def test_folders_that_a_system_keeps_are_no_classes(tmp_path: Path, base: str) -> None:
    make(tmp_path, f"{base}cat/1.jpg", f"{base}dog/2.jpg", f"{base}_drafts/3.jpg")
    for name in ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"):
        make(tmp_path, f"{base}{name}/4.jpg", f"{base}cat/{name}/1.jpg/thumb.jpg")
    listing = listing_of(tmp_path)
    assert classes_of(listing) == {"train": {"_drafts": ["3.jpg"], "cat": ["1.jpg"], "dog": ["2.jpg"]}}
    assert counted(listing) == {(base.rstrip("/"), reasons.HIDDEN): 10}


def test_class_folders_without_a_picture_are_told(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.jpg", "dog/1.jpg", "emu/.x.jpg")
    (tmp_path / "fox").mkdir()
    listing = listing_of(tmp_path)
    assert len(listing.classes) == 2
    assert [warning.partition(": ")[2] for warning in listing.warnings] == ["folders without a picture: emu, fox"]


def test_a_picture_is_known_by_its_name_else_by_its_content(tmp_path: Path) -> None:
    heads = {
        "a.jpg": b"text", "b.HEIC": b"", "c": JPEG, "d.txt": b"\x89PNG\r\n\x1a\n", "e.dat": b"RIFF\0\0\0\0WEBPVP8 ",
        "f": b"\0\0\0\x20ftypavif", "g": b"II*\0", "h": b"BM" + bytes(40), "i": b"GIF89a",
    }  # fmt: skip
    others = {
        "j": b"",
        "k.txt": b"BMW is a car, and this is text about it",
        "l.md": b"# x",
        "m.mp4": b"\0\0\0\x20ftypmp42",
    }
    for name, head in (heads | others).items():
        (make(tmp_path, f"cat/{name}") / "cat" / name).write_bytes(head)
    listing = listing_of(tmp_path)
    assert classes_of(listing) == {"train": {"cat": sorted(heads)}}
    assert counted(listing) == {("", reasons.NO_PICTURE): len(others)}
    assert listing.passed_over[0].examples == ("cat/j", "cat/k.txt", "cat/l.md")


def test_a_store_is_read_like_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "set/Train/cat/images/1.jpg", "set/Train/dog/x", "set/Train/dog/._x.jpg", "set/Train/README")
    make(tmp_path, "set/extra/.git/a", "set/extra/b.jpg", "set/Valid/images/v0.jpg", "set/Valid/labels.csv")
    (tmp_path / "set/Train/README").write_text("text")
    (tmp_path / "set/Valid/labels.csv").write_text("image,label\nv0.jpg,dog\n")
    store = fsspec.filesystem("memory")
    store.put(f"{tmp_path}/", "/layout/", recursive=True)
    try:
        here = listing_of(tmp_path, labels=tmp_path / "set/Valid/labels.csv")
        there = listing_of(UrlPath("memory://layout"), labels=UrlPath("memory://layout/set/Valid/labels.csv"))
    finally:
        store.rm("/layout", recursive=True)
    assert classes_of(here) == {"train": {"cat": ["1.jpg"], "dog": ["x"]}, "val": {"dog": ["v0.jpg"]}}
    assert there.digest() == here.digest()
    assert there.passed_over == here.passed_over
    assert here.num_found == 7
