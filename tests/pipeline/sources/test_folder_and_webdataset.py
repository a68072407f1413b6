"""Sources list every image once, in an order that depends on nothing but the input."""

from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, ImageError, SourceError
from pipeline.sources import open_source
from pipeline.sources.listing import Listing


def options(source: str = "folder", **values: object) -> PrepareOptions:
    return PrepareOptions(source=source, output=Path("out"), **values)


def make_folder(root: Path, names: list[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))
    return root


def names(listing: Listing) -> dict[str, list[str]]:
    return {split: list(rows.names) for split, rows in listing.splits.items()}


def test_digits_are_the_real_ones_split_1437_to_360() -> None:
    source = open_source(options("digits", seed=3))
    listing = source.listing()
    assert {split: len(rows) for split, rows in listing.splits.items()} == {"train": 1437, "val": 360}
    real = sklearn.datasets.load_digits()
    seen = set()
    for rows in listing.splits.values():
        for item in rows.items(np.arange(len(rows))):
            pixels = source.read(item)
            assert pixels.shape == (8, 8, 1)
            np.testing.assert_array_equal(np.rint(pixels[..., 0] * (16 / 255)), real.images[item.offset])
            assert item.label == real.target[item.offset]
            seen.add(item.offset)
    assert len(seen) == 1797
    assert names(open_source(options("digits", seed=4)).listing()) != names(listing)


def test_folder_with_splits_keeps_them(tmp_path: Path) -> None:
    make_folder(
        tmp_path,
        ["train/b/1.jpg", "train/a/2.jpg", "train/a/deep/3.JPEG", "val/a/4.png", "train/.hidden/x", "train/a/.x"],
    )
    listing = open_source(options(input=tmp_path)).listing()
    assert [record.name for record in listing.classes] == ["a", "b"]
    assert names(listing) == {
        "train": ["train/a/2.jpg", "train/a/deep/3.JPEG", "train/b/1.jpg"],
        "val": ["val/a/4.png"],
    }
    assert listing.splits["train"].labels.tolist() == [0, 0, 1]


def test_folder_without_splits_is_split_by_class_and_seed(tmp_path: Path) -> None:
    make_folder(tmp_path, [f"{name}/{number:02d}.jpg" for name in "ab" for number in range(20)])
    first = open_source(options(input=tmp_path, val_fraction=0.25)).listing()
    assert {split: np.bincount(rows.labels).tolist() for split, rows in first.splits.items()} == {
        "train": [15, 15],
        "val": [5, 5],
    }
    assert sorted(name for rows in names(first).values() for name in rows) == sorted(
        p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.jpg")
    )
    assert first.digest() == open_source(options(input=tmp_path, val_fraction=0.25)).listing().digest()
    assert first.digest() != open_source(options(input=tmp_path, val_fraction=0.25, seed=1)).listing().digest()
    assert set(open_source(options(input=tmp_path, val_fraction=0)).listing().splits) == {"train"}


def test_odd_names_are_listed_and_read(tmp_path: Path) -> None:
    odd = [
        "a b/c d.jpg",
        "Ähre/ü.jpg",
        "ähre/ü.jpg",
        "CAT/x.jpg",
        "cat/x.jpg",
        "cat/same.jpg",
        "CAT/same.jpg",
        "n\udcff/\udcfe.jpg",
    ]
    make_folder(tmp_path, odd)
    source = open_source(options(input=tmp_path, val_fraction=0))
    rows = source.listing().splits["train"]
    assert sorted(rows.names) == sorted(odd)
    for item in rows.items(np.arange(len(rows))):
        assert source.read(item) == item.name.encode("utf-8", "surrogateescape")
    assert all(record.name.isprintable() and record.name.encode() for record in source.listing().classes)


def test_digest_changes_with_names_labels_and_sizes(tmp_path: Path) -> None:
    make_folder(tmp_path, ["a/1.jpg", "b/2.jpg"])
    digests = {open_source(options(input=tmp_path)).listing().digest()}
    (tmp_path / "a/1.jpg").write_bytes(b"longer content")
    digests.add(open_source(options(input=tmp_path)).listing().digest())
    (tmp_path / "a/1.jpg").rename(tmp_path / "a/3.jpg")
    digests.add(open_source(options(input=tmp_path)).listing().digest())
    (tmp_path / "a/3.jpg").rename(tmp_path / "b/3.jpg")
    digests.add(open_source(options(input=tmp_path)).listing().digest())
    assert len(digests) == 4


def test_broken_links_are_reported_not_dropped(tmp_path: Path) -> None:
    make_folder(tmp_path, ["a/1.jpg"])
    (tmp_path / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    source = open_source(options(input=tmp_path))
    rows = source.listing().splits["train"]
    assert list(rows.names) == ["a/1.jpg", "a/gone.jpg"]
    with pytest.raises(ImageError, match="cannot be read"):
        source.read(rows.items(np.array([1]))[0])


def test_wrong_inputs_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        open_source(options(input=tmp_path / "none")).listing()
    with pytest.raises(SourceError, match="no class folders"):
        open_source(options(input=tmp_path)).listing()
    with pytest.raises(ConfigError, match="needs --input"):
        open_source(options())
    with pytest.raises(ConfigError, match="expected one of"):
        open_source(options("nothing"))
    with pytest.raises(ConfigError, match="leave --input out"):
        open_source(options("digits", input=tmp_path))
    make_folder(tmp_path, ["train/a/1", "val/a/1", "validation/a/1"])
    with pytest.raises(SourceError, match="both val/ and validation/"):
        open_source(options(input=tmp_path)).listing()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"shard_size": 0}, "--shard-size 0"),
        ({"resize": "big"}, "--resize big"),
        ({"resize": "0"}, "--resize 0"),
        ({"quality": 101}, "--quality 101"),
        ({"encoding": "gif"}, "--encoding gif"),
        ({"val_fraction": 1.0}, "--val-fraction 1.0"),
        ({"on_error": "ignore"}, "--on-error ignore"),
        ({"workers": -1}, "--workers -1"),
        ({"encoding": "original", "resize": "64"}, "--encoding original"),
    ],
)
def test_wrong_options_name_the_option_and_the_value(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        options(**values)
