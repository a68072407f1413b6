"""Tars that others wrote: every sample once under its own label, every other member counted, all else refused."""

import gzip
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import PrepareOptions
from pipeline.errors import SourceError
from pipeline.sources import open_source, reasons
from pipeline.sources.listing import Listing
from tests.helpers.tars import Member, jpeg, sample, special, write_tar

Pairs = list[tuple[str, str]]  # class name and source name of each image


def listing_of(folder: Path, **values: object) -> Listing:
    return open_source(
        PrepareOptions(source="webdataset", input=folder, output=Path("out"), **({"val_fraction": 0.0} | values))  # type: ignore[arg-type]
    ).listing()


def pairs(listing: Listing, split: str = "train") -> Pairs:
    rows = listing.splits[split]
    return [(listing.classes[label].name, name) for label, name in zip(rows.labels.tolist(), rows.names, strict=True)]


def counts(listing: Listing) -> dict[str, int]:
    return {row.reason: row.count for row in listing.passed_over}


def refused(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        listing_of(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("photo.jpg", "photo.jpg"),
        ("photo.jpg", "photo.JPG"),
        ("photo.jpg", "Photo.jpg"),
        ("photo.jpg", "PHOTO.JPEG"),
        ("photo.jpg", "photo.jpeg"),
        ("./photo.jpg", "photo.jpg"),
        (".//photo.jpg", "./photo.jpg"),
        ("/photo.jpg", "photo.jpg"),
        ("a/photo.jpg", "A/photo.jpg"),
        ("straße.jpg", "STRASSE.jpg"),
        ("caf\u00e9.jpg", "cafe\u0301.jpg"),
        ("x" * 120 + "/photo.jpg", "x" * 120 + "/photo.jpg"),
    ],
)
@pytest.mark.parametrize("between", [0, 1, 50])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_two_samples_under_one_name_are_refused_and_both_named(
    tmp_path: Path, first: str, second: str, between: int, form: int
) -> None:
    members: list[Member] = [(first, jpeg(0)), (f"{first.rpartition('.')[0]}.cls", b"0")]
    members += [member for number in range(between) for member in sample(f"k{number}", 1)]
    members += [(second, jpeg(1)), (f"{second.rpartition('.')[0]}.cls", b"1")]
    text = refused(write_tar(tmp_path / "a.tar", members, form).parent)
    assert "two samples under one name" in text
    assert first in text and second in text and text.count("at byte") == 2


def test_two_labels_of_one_image_are_refused(tmp_path: Path) -> None:
    text = refused(write_tar(tmp_path / "a.tar", [*sample("a", 0), ("a.cls", b"1")]).parent)
    assert "two samples under one name: a.cls at byte" in text


def test_one_name_in_two_tars_or_folders_is_two_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*sample("k", 0, 0), *sample("x/k", 1, 1)])
    write_tar(tmp_path / "b.tar", sample("k", 1, 2))
    assert pairs(listing_of(tmp_path)) == [("0", "a.tar/k.jpg"), ("1", "a.tar/x/k.jpg"), ("1", "b.tar/k.jpg")]


def test_dot_slash_is_no_other_name(tmp_path: Path) -> None:
    members: list[Member] = [("./a.jpg", jpeg()), ("a.cls", b"0"), ("./x//b.jpg", jpeg()), ("./x/b.cls", b"0")]
    write_tar(tmp_path / "a.tar", members)
    assert pairs(listing_of(tmp_path)) == [("0", "a.tar/a.jpg"), ("0", "a.tar/x/b.jpg")]


@pytest.mark.parametrize("names", [["v1.0", "v1.1"], ["v1.0"], ["v1", "v1.1"], ["a", "2024.01.02-x"], ["x/v1.0"]])
def test_a_key_with_dots_is_explained(tmp_path: Path, names: list[str]) -> None:
    members = [member for number, name in enumerate(names) for member in sample(name, 0, number)]
    text = refused(write_tar(tmp_path / "a.tar", members).parent)
    assert "a key ends at its first dot" in text
    assert any(f"{name}.jpg" in text or f"{name}.cls" in text for name in names if "." in name)


def test_further_components_with_a_dot_are_counted(tmp_path: Path) -> None:
    extra: list[Member] = [("a.seg.png", b"x"), ("a.coarse.cls", b"7"), ("a.json", b"{}"), ("a.png", b"x")]
    write_tar(tmp_path / "a.tar", [*sample("a", 3), *extra])
    listing = listing_of(tmp_path)
    assert pairs(listing) == [("3", "a.tar/a.jpg")]
    assert counts(listing) == {reasons.NO_COMPONENT: 4}
    assert listing.num_found == 5


def test_hidden_members_are_counted_and_never_break_a_sample(tmp_path: Path) -> None:
    hidden = ["._a.jpg", ".DS_Store", "x/.DS_Store", "__MACOSX/._a.jpg", "__MACOSX/a.jpg", ".git/a.jpg", "./._b.cls"]
    members: list[Member] = [special("./", tarfile.DIRTYPE)]
    for name, data in sample("./a", 0):
        members += [(hide, b"Mac") for hide in hidden] + [(name, data)]
    members += [("README", b""), ("b.jpg/", b"x"), ("Thumbs.db", b""), ("notes.txt", b""), ("notes.txt", b"")]
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "._a.tar", []).write_bytes(b"Mac")
    listing = listing_of(tmp_path)
    assert pairs(listing) == [("0", "a.tar/a.jpg")]
    assert counts(listing) == {
        reasons.HIDDEN: 2 * len(hidden) + 1,
        reasons.NO_EXTENSION: 2,
        reasons.NO_SAMPLE: 3,
    }


@pytest.mark.parametrize(
    "name",
    [
        *("a.tar.gz", "a.tgz", "a.TGZ", "a.tar.zst", "a.tar.bz2", "a.tbz2", "a.tar.xz", "a.txz", "a.tar.lz4"),
        *("a.tar.Z", "x/y.tar.gz", "a.tar.zstd", "a.tar.gzip", "a.tzstd"),
    ],
)
def test_compressed_tars_are_refused_also_beside_others(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"whatever")
    assert f"{name} is compressed" in refused(tmp_path)
    write_tar(tmp_path / "b.tar", sample("a"))
    assert f"{name} is compressed (1 such files)" in refused(tmp_path)


def test_a_compressed_tar_under_the_name_of_a_plain_one_is_refused(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "a.tar", sample("a")).read_bytes()
    for data, words in (
        (gzip.compress(plain), "compressed by gzip, so it has no byte ranges to read in place: gunzip it"),
        (gzip.compress(b""), "compressed by gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(2000), "unzstd"),
        (b"BZh91AY&SY" + bytes(2000), "bunzip2"),
        (b"\xfd7zXZ\0" + bytes(2000), "unxz"),
        (b"PK\x03\x04" + bytes(2000), "unzip"),
    ):
        (tmp_path / "a.tar").write_bytes(data)
        assert words in refused(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train-val-0.tar"], "train-val-0.tar names two splits, train and val"),
        (["train/test_chunk0.tar", "val/a.tar"], "train/test_chunk0.tar names two splits, test and train"),
        (["Training/a/valid-0.tar", "val/a.tar"], "names two splits, train and val"),
        (["trainset-0.tar", "testset-0.tar"], "testset-0.tar, trainset-0.tar look like splits"),
        (["trainset/000000.tar", "validset/000017.tar"], "look like splits"),
        (["MyTrain-0.tar", "MyTest-0.tar", "more.tar"], "MyTest-0.tar, MyTrain-0.tar look like splits"),
        (["trainset-0.tar", "val-0.tar"], "some tars name their split and some do not"),
    ],
)
def test_tars_whose_splits_are_unclear_are_refused(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / name, sample("a"))
    assert words in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train/train-0.tar", "train"), ("training/a_train.tar", "train"), ("train-val-test/val-0.tar", "val")),
        *(("valley-0.tar", ""), ("contest-0.tar", ""), ("constrained.tar", ""), ("trainset-0.tar", "")),
    ],
)
def test_a_tar_of_one_split_or_none_is_taken(tmp_path: Path, name: str, split: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_tar(tmp_path / name, sample("a"))
    assert set(listing_of(tmp_path).splits) == {split or "train"}


def test_tars_in_capitals_are_read_and_other_files_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.TAR", sample("a", 0))
    write_tar(tmp_path / "sub" / "b.Tar", sample("b", 1))
    (tmp_path / "a.idx").write_text("v1.2 1\n")
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "loop").symlink_to(tmp_path)
    listing = listing_of(tmp_path)
    assert pairs(listing) == [("0", "a.TAR/a.jpg"), ("1", "sub/b.Tar/b.jpg")]
    assert counts(listing) == {reasons.NOT_READ: 1, reasons.PIPE: 1, reasons.LOOP: 1}


def test_tars_without_samples_are_counted_beside_others_and_refused_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "folders.tar", [special("a", tarfile.DIRTYPE), special("a/b", tarfile.DIRTYPE)])
    write_tar(tmp_path / "nothing.tar", [])
    assert "the tars hold no samples" in refused(tmp_path)
    write_tar(tmp_path / "a.tar", sample("a"))
    listing = listing_of(tmp_path)
    assert counts(listing) == {reasons.EMPTY_TAR: 2}
    (tmp_path / "nothing.tar").rename(tmp_path / "val-nothing.tar")
    assert "the tars of val hold no samples" in refused(tmp_path)
    assert set(listing_of(tmp_path, splits=("train",)).splits) == {"train"}  # val is not wanted
    write_tar(tmp_path / "val-nothing.tar", sample("b"))
    assert "some tars name their split and some do not" in refused(tmp_path)
    (tmp_path / "a.tar").rename(tmp_path / "train.tar")
    assert set(listing_of(tmp_path).splits) == {"train", "val"}  # the tar of folders names none, which is nothing


def test_an_empty_a_cut_and_a_doubled_file_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample("a"))
    whole = path.read_bytes()
    for data, words in (
        (b"", "a.tar: an empty file"),
        (whole[:700], "a.tar: truncated"),
        (whole[:2048], "a.tar: truncated"),
        (whole + whole, "a.tar: more data behind the end of the tar, at byte 10,240: two tars in one file?"),
        (whole + b"signature", "a.tar: more data behind the end of the tar"),
        (b"no tar, but text of more than a block" * 99, "a.tar: damaged header at byte 0"),
    ):
        path.write_bytes(data)
        assert words in refused(tmp_path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "b.jpg is a link; tar --dereference"),
        (tarfile.LNKTYPE, "b.jpg is a hard link; tar --dereference"),
        (tarfile.FIFOTYPE, "b.jpg is a named pipe"),
        (tarfile.CHRTYPE, "b.jpg is a device"),
        (tarfile.GNUTYPE_SPARSE, "b.jpg is sparse"),
    ],
)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_that_are_no_files_are_refused_by_name(tmp_path: Path, kind: bytes, words: str, form: int) -> None:
    text = refused(write_tar(tmp_path / "a.tar", [*sample("a"), special("b.jpg", kind, "y" * 200)], form).parent)
    assert words in text


def test_a_sparse_member_of_pax_is_refused(tmp_path: Path) -> None:
    """It looks like a regular file, but its bytes begin with a map of the holes."""
    info = tarfile.TarInfo("GNUSparseFile.0/b.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b.jpg"}
    assert "is sparse" in refused(write_tar(tmp_path / "a.tar", [info], tarfile.PAX_FORMAT).parent)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, form: int) -> None:
    keys = ["d/" * 120 + "a", "ü" * 120, "with space", "line\nbreak", "x" * 250, "\udcff"]
    write_tar(tmp_path / "a.tar", [member for number, key in enumerate(keys) for member in sample(key, number)], form)
    listing = listing_of(tmp_path)
    assert pairs(listing) == [(str(number), f"a.tar/{key}.jpg") for number, key in enumerate(keys)]


@pytest.mark.parametrize(
    "labels",
    [
        [480, 481],
        [1, 2],
        [0, 2, 5],
        [1_000_000, 2_000_000],
        [123_456_780, 123_456_781],
        [2**31, 2**63, 10**30],
        ["007", "480"],
    ],
)
def test_labels_that_are_ids_make_a_table_of_those_that_exist(tmp_path: Path, labels: list[object]) -> None:
    members = [member for number, label in enumerate(labels * 2) for member in sample(f"k{number}", label, number)]
    listing = listing_of(write_tar(tmp_path / "a.tar", members).parent)
    assert [record.name for record in listing.classes] == [str(label) for label in labels]
    assert pairs(listing) == [(str(label), f"a.tar/k{number}.jpg") for number, label in enumerate(labels * 2)]
    assert listing.splits["train"].labels.tolist() == [*range(len(labels))] * 2
    (warning,) = listing.warnings
    assert f"{int(str(labels[0])):,}" in warning and f"rows 0 to {len(labels) - 1}" in warning


def test_labels_from_zero_on_stay_and_need_no_words(tmp_path: Path) -> None:
    members = [member for label in (2, 0, 1) for member in sample(f"k{label}", label)]
    listing = listing_of(write_tar(tmp_path / "a.tar", members).parent)
    assert listing.splits["train"].labels.tolist() == [2, 0, 1]
    assert listing.warnings == ()


@pytest.mark.parametrize("text", [b"7\n", b"7\r\n", b" 7 ", b"\xef\xbb\xbf7", b"\xef\xbb\xbf7\n", b"7" + b"\n" * 60])
def test_white_space_around_a_label_is_no_part_of_it(tmp_path: Path, text: bytes) -> None:
    listing = listing_of(write_tar(tmp_path / "a.tar", [("a.jpg", jpeg()), ("a.cls", text)]).parent)
    assert [record.name for record in listing.classes] == ["7"]


@pytest.mark.parametrize("text", [b"", b"-1", b"1.0", b"1,2", b"dog", b"0x10", b"1 2", b"\xd9\xa3", b"1" + b" " * 64])
def test_other_labels_are_refused(tmp_path: Path, text: bytes) -> None:
    message = refused(write_tar(tmp_path / "a.tar", [("a.jpg", jpeg()), ("a.cls", text)]).parent)
    assert "a.tar: sample a: its cls is" in message and "expected a label number of 0 or more" in message


def test_one_number_in_two_spellings_is_refused(tmp_path: Path) -> None:
    text = refused(write_tar(tmp_path / "a.tar", [*sample("a", "7"), *sample("b", "007")]).parent)
    assert "sample b: its cls is 007, elsewhere 7" in text


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.jpg", b"x"), ("a.json", b'{"label": 3}')], "sample a has jpg, json only: .*labels in JSON are not read"),
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"0"), ("b.cls", b"0")], "sample a has jpg only: .*one behind"),
        ([("a.cls", b"0")], "sample a has cls only"),
        ([("a.npy", b"x"), ("a.cls", b"0")], "sample a has npy, cls only"),
    ],
)
def test_a_sample_that_lacks_something_says_what_is_expected(tmp_path: Path, members: list[Member], words: str) -> None:
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(SourceError, match=words):
        listing_of(tmp_path)


@pytest.mark.parametrize("kind", ["png", "webp", "GIF", "bmp", "tif", "TIFF", "avif", "jpe", "jfif"])
def test_every_kind_of_image_is_a_component(tmp_path: Path, kind: str) -> None:
    listing = listing_of(write_tar(tmp_path / "a.tar", [(f"a.{kind}", b"x"), ("a.cls", b"0")]).parent)
    assert pairs(listing) == [("0", f"a.tar/a.{kind}")]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"cat\ndog\n", ["cat", "dog"]),
        (b"\xef\xbb\xbfcat\r\ndog", ["cat", "dog"]),
        (b"cat\ndog\nbird\n\n\n", ["cat", "dog", "bird"]),
        (b"crane\ncrane\n", ["crane", "crane"]),
    ],
)
def test_a_file_of_names_is_the_table(tmp_path: Path, content: bytes, names: list[str]) -> None:
    write_tar(tmp_path / "a.tar", [*sample("a", 0), *sample("b", 1)])
    (tmp_path / "classes.txt").write_bytes(content)
    listing = listing_of(tmp_path)
    assert [record.name for record in listing.classes] == names
    assert listing.splits["train"].labels.tolist() == [0, 1]
    assert listing.passed_over == () and listing.warnings == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"cat\n", "classes.txt: 1 names, for labels 0 to 0, and a sample has label 480"),
        (b"cat\n\ndog\n", "classes.txt: line 2 is empty"),
        (b"c\xe4t\n", "classes.txt: is not UTF-8"),
    ],
)
def test_a_file_of_names_that_does_not_fit_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    write_tar(tmp_path / "a.tar", [*sample("a", 0), *sample("b", 480)])
    (tmp_path / "classes.txt").write_bytes(content)
    assert words in refused(tmp_path)


def test_the_order_of_reading_is_that_of_the_names(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "a/z.tar", "A.tar"):
        write_tar(tmp_path / name, sample("k", 0))
    assert [name for _, name in pairs(listing_of(tmp_path))] == [
        *("A.tar/k.jpg", "a.tar/k.jpg", "a/z.tar/k.jpg", "b.tar/k.jpg"),
    ]


@pytest.mark.parametrize("seed", range(6))
def test_any_tar_adds_up(tmp_path: Path, seed: int) -> None:
    """Random members of every kind that is read or counted: each is one of the two, and images keep their labels."""
    rng = np.random.default_rng(seed)
    expected: dict[str, str] = {}
    others = 0
    for tar in range(3):
        members: list[Member] = []
        for number in range(int(rng.integers(1, 12))):
            folder = ["", "./", "x/", "./y/z/"][rng.integers(4)]
            label, extension = int(rng.integers(0, 5)) * 1000, ["jpg", "JPEG", "png", "webp"][rng.integers(4)]
            hidden: list[Member] = [("._x.jpg", b""), (f"{folder}.DS_Store", b""), ("__MACOSX/x.jpg", b"")]
            junk: list[Member] = [
                (f"{folder}k{number}.json", b"{}"),
                (f"{folder}LICENSE", b""),
                (f"z{number}.txt", b""),
            ]
            rows: list[Member] = [(f"{folder}k{number}.{extension}", jpeg()), (f"{folder}k{number}.cls", b"%d" % label)]
            rows = [rows[i] for i in rng.permutation(2)]
            chosen = [hidden[i] for i in rng.permutation(3)[: rng.integers(4)]] + [junk[1]]
            members += [*chosen, rows[0], *chosen, junk[0], rows[1], junk[2]]
            others += 2 * len(chosen) + 2
            name = f"t{tar}.tar/{folder.removeprefix('./')}k{number}.{extension}"
            expected[name] = str(label)
        write_tar(tmp_path / f"t{tar}.tar", members, [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT][rng.integers(2)])
    listing = listing_of(tmp_path)
    assert {name: label for label, name in pairs(listing)} == expected
    assert sum(row.count for row in listing.passed_over) == others
    assert listing.num_found == others + len(expected)
    assert listing.digest() == listing_of(tmp_path).digest()


def test_a_manifest_that_another_program_wrote_is_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", sample("a"))
    (tmp_path / "manifest.json").write_text("{}")
    assert refused(tmp_path).endswith("if another program wrote it, take it away")
