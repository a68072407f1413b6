"""Label files for flat splits: every usual form gives the same labels; what is wrong is one line that names it."""

import itertools
from pathlib import Path

import pytest

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, PipelineError, SourceError
from pipeline.sources import labels, open_source, reasons
from pipeline.sources.labels import read_labels
from tests.pipeline.sources.test_layout import classes_of, counted, listing_of, make

WANTED = {"val/a.jpg": "cat", "val/b c.jpg": "big dog", "val/é.JPEG": "cat"}


@pytest.mark.parametrize(
    "text",
    [
        "a.jpg,cat\nb c.jpg,big dog\né.JPEG,cat\n",
        "a.jpg;cat\r\nb c.jpg;big dog\r\né.JPEG;cat",
        "filename,label\na.jpg,cat\nb c.jpg,big dog\né.JPEG,cat\n",
        "label,id\ncat,a\nbig dog,b c\ncat,é\n",
        "breed,file\ncat,a\nbig dog,b c\ncat,é\n",
        "cat,a.jpg\nbig dog,b c.jpg\ncat,é.JPEG\n",
        "\ufeffid,breed\na,cat\nb c,big dog\né,cat\n",
        "idx,width,image,class_name\n1,9,val/a.jpg,cat\n2,9,val/b c.jpg,big dog\n3,9,val/é.JPEG,cat\n",
        "a.jpg,cat,\nb c.jpg,big dog,\né.JPEG,cat,\n",
        "a.jpg\tcat\t0\t0\t9\t9\nb c.jpg\tbig dog\t0\t0\t9\t9\né.JPEG\tcat\t1\t2\t3\t4\n",
        '"a.jpg","cat"\n"b c.jpg","big dog"\n"é.JPEG","cat"\n\n',
        "./val/a.jpg,cat\n/data/val/b c.jpg,big dog\ne\u0301.JPEG,cat\n",
        "a.jpg,cat\na.jpg,cat\nb c.jpg,big dog\né.JPEG,cat\n",
    ],
)
def test_every_usual_form_gives_the_same_labels(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_text(text, newline="")
    labels = read_labels(tmp_path / "labels", WANTED)
    assert labels.label_of == WANTED
    assert labels.unused == ()


def test_lines_of_name_and_label_may_hold_spaces_in_either(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("a.jpg big dog\nb c.jpg cat\ngone.jpg cat\n")
    labels = read_labels(tmp_path / "labels", ["val/a.jpg", "val/b c.jpg"])
    assert labels.label_of == {"val/a.jpg": "big dog", "val/b c.jpg": "cat"}
    assert labels.unused == ("gone.jpg",)


def test_names_that_are_no_utf8_are_found(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(b"caf\xe9.jpg cat\n")
    assert read_labels(tmp_path / "labels", ["val/caf\udce9.jpg"]).label_of == {"val/caf\udce9.jpg": "cat"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "none of its 0 lines names a picture"),
        ("x.jpg,cat\ny.jpg,dog\n", "none of its 2 lines names a picture of the input, the first is x.jpg"),
        ("a.jpg,cat\nb.jpg,dog\na.jpg,dog\n", r"line 3: a\.jpg is dog here and cat in a line before"),
        ("a.jpg,cat\nb.jpg\n", r"line 2: b\.jpg has no label"),
        ("a.jpg\nb.jpg\n", r"line 1: a\.jpg has no label"),
        ("c.jpg,cat\n", r"c\.jpg may be val/c\.jpg or test/c\.jpg; write the path"),
        ('a.jpg,"' + "x" * 200_000 + '"\n', r"line 1: field larger than field limit .*; expected a CSV"),
        ("image,MEL,NV\na,1.0,0.0\nb,0.0,1.0\n", "labels: MEL, NV: any may be the label; keep name and label alone"),
        ("a.jpg,1.0,0.0\nb.jpg,0.0,1.0\n", "2 columns: any may be the label"),
        ("id,file,breed\n1,a.jpg,pug\n2,b.jpg,husky\n", "id, breed: any may be the label; .* or name the column label"),
        ("a.jpg,cat,train\nb.jpg,dog,train\n", "2 columns: any may be the label"),
        ("\0\1\2,zz\n", "none of its 1 lines names a picture"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "labels").write_text(text)
    with pytest.raises(SourceError, match=words) as caught:
        read_labels(tmp_path / "labels", ["val/a.jpg", "val/b.jpg", "val/c.jpg", "test/c.jpg"])
    assert "\n" not in str(caught.value)


def flat_val(root: Path, labels: str) -> Path:
    make(root, "train/cat/1.jpg", "train/dog/2.jpg", "val/images/a.jpg", "val/images/b.jpg")
    (root / "val/val_annotations.txt").write_text(labels)
    return root / "val/val_annotations.txt"


def test_a_name_in_many_folders_costs_a_line_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture a folder, all of one name: as scans of patients come. A line looks at its own picture only."""
    looked, plain = [], labels.nfc
    monkeypatch.setattr(labels, "nfc", lambda text: looked.append(text) or plain(text))
    pictures = [f"{number:03}/camera/front.jpg" for number in range(400)]
    (tmp_path / "labels").write_text("".join(f"{path.removesuffix('.jpg')},c{path[:2]}\n" for path in pictures))
    assert read_labels(tmp_path / "labels", pictures).label_of == {path: f"c{path[:2]}" for path in pictures}
    assert len(looked) <= 12 * len(pictures)


def test_a_name_means_what_the_rule_says() -> None:
    """Against the rule as it stands, for every name that ends, or is longer than, a path."""
    parts = ("a", "b", "a.jpg", "b.jpg", "a.b.jpg", "a.b")
    paths = ["/".join(path) for count in (1, 2, 3) for path in itertools.product(parts, repeat=count)][::3]
    names, stem = labels._Names(paths), labels._stem
    for name in [
        "",
        "/",
        *("/".join(path) for count in (1, 2, 3, 4) for path in itertools.product(parts, repeat=count)),
    ]:
        ways = (
            [path for path in paths if path == name],
            [path for path in paths if f"/{path}".endswith(f"/{name}") or f"/{name}".endswith(f"/{path}")],
            [path for path in paths if f"/{stem(path)}".endswith(f"/{name}")],
        )
        assert names.find(name) == next((found for found in ways if found), []), name


def test_tiny_imagenet_s_annotations_label_its_flat_val(tmp_path: Path) -> None:
    labels = flat_val(tmp_path, "a.jpg\tdog\t0\t32\t44\t62\nb.jpg\tcat\t52\t55\t57\t59\n")
    listing = listing_of(tmp_path, labels=labels)
    assert classes_of(listing)["val"] == {"dog": ["a.jpg"], "cat": ["b.jpg"]}
    assert not listing.passed_over  # the label file is none of the pictures


def test_tiny_imagenet_as_it_is_downloaded(tmp_path: Path) -> None:
    """Class folders with a level ``images`` and a text file, a flat val with annotations, a flat test without."""
    for name in ("n01443537", "n01629819"):
        make(tmp_path, *(f"train/{name}/images/{name}_{number}.JPEG" for number in range(3)))
        make(tmp_path, f"train/{name}/{name}_boxes.txt")
    make(
        tmp_path, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG", "words.txt", "wnids.txt"
    )
    lines = "val_0.JPEG\tn01629819\t0\t32\t44\t62\nval_1.JPEG\tn01443537\t52\t55\t57\t59\n"
    (tmp_path / "val/val_annotations.txt").write_text(lines)
    with pytest.raises(SourceError, match=r"test \(1\) and .*val \(2\): .*--labels .*/val/val_annotations\.txt"):
        listing_of(tmp_path)
    listing = listing_of(tmp_path, labels=tmp_path / "val/val_annotations.txt", splits=("train", "val"))
    assert [record.name for record in listing.classes] == ["n01443537", "n01629819"]
    assert classes_of(listing)["val"] == {"n01629819": ["val_0.JPEG"], "n01443537": ["val_1.JPEG"]}
    assert len(classes_of(listing)["train"]["n01443537"]) == 3
    assert counted(listing) == {
        ("train", reasons.NO_PICTURE): 2,
        ("test", reasons.NOT_CHOSEN): 1,
        ("", reasons.BESIDE): 2,
    }


def test_pictures_without_a_label_and_labels_without_a_picture_are_counted(tmp_path: Path) -> None:
    listing = listing_of(tmp_path, labels=flat_val(tmp_path, "a.jpg dog\nz.jpg dog\nnosuch.jpg bird\n"))
    assert classes_of(listing)["val"] == {"dog": ["a.jpg"]}
    assert counted(listing) == {("val", reasons.NO_LABEL): 1, ("", reasons.NO_IMAGE): 2}


def test_a_label_that_is_no_class_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"line 2: 'bird' is not one of the 2 class folders \(cat, dog\)"):
        listing_of(tmp_path, labels=flat_val(tmp_path, "a.jpg dog\nb.jpg bird\n"))


def test_a_split_of_which_no_picture_has_a_label_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "test/images/t.jpg")
    with pytest.raises(SourceError, match="labels none of the 1 pictures of test; leave it out with --splits"):
        listing_of(tmp_path, labels=flat_val(tmp_path, "a.jpg dog\nb.jpg cat\n"))


def test_classes_come_from_the_labels_where_train_is_flat(tmp_path: Path) -> None:
    make(tmp_path / "in", "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / "labels.csv").write_text("1,b\n2,a\n3,b\n")
    listing = listing_of(tmp_path / "in", labels=tmp_path / "labels.csv")
    assert classes_of(listing) == {"train": {"b": ["1.jpg", "3.jpg"], "a": ["2.jpg"]}}
    assert [record.name for record in listing.classes] == ["a", "b"]


def test_labels_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    make(tmp_path / "in", "cat/1.jpg", "dog/1.jpg")
    (tmp_path / "labels").write_text("1.jpg cat\n")
    cases: list[tuple[dict[str, object], type[PipelineError], str]] = [
        ({"labels": tmp_path / "labels"}, ConfigError, "no split needs it"),
        ({"labels": tmp_path / "labels", "source": "digits", "input": None}, ConfigError, "--labels .* folder only"),
    ]
    for options, error, words in cases:
        with pytest.raises(error, match=words):
            listing_of(tmp_path / "in", **options)
    flat = make(tmp_path / "flat", "1.jpg")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(SourceError, match="is no file; expected a CSV"):
            open_source(PrepareOptions("folder", tmp_path / "out", input=flat, labels=path)).listing()
