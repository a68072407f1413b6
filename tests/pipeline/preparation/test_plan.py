"""The plan covers every image once, the same for ever for a seed; splits, limits, checksums, and a dry run."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, SourceError
from pipeline.preparation.plan import all_settings, check_source, chosen_splits, make_plan, plan_split, print_plan
from pipeline.preparation.shard import key_of
from pipeline.sources import open_source
from pipeline.sources.imagenet import MD5
from pipeline.sources.listing import Item, SplitListing
from pipeline.sources.split import shuffled, stratified
from tests.helpers import ilsvrc


@pytest.mark.parametrize(("count", "shard_size"), [(1, 1), (7, 3), (1437, 128), (1000, 1000), (1001, 1000)])
def test_every_image_is_in_exactly_one_shard(count: int, shard_size: int) -> None:
    shards = plan_split("train", count, seed=3, shard_size=shard_size)
    rows = np.concatenate([shard.rows for shard in shards])
    assert sorted(rows.tolist()) == list(range(count))
    sizes = [len(shard.rows) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= shard_size
    assert [shard.start for shard in shards] == np.cumsum([0, *sizes[:-1]]).tolist()


def test_no_images_make_no_shards() -> None:
    assert plan_split("val", 0, seed=0, shard_size=10) == []


def test_order_depends_on_seed_and_purpose_and_never_changes() -> None:
    assert shuffled(8, 0, "shuffle train").tolist() == shuffled(8, 0, "shuffle train").tolist()
    assert shuffled(1000, 0, "a").tolist() != shuffled(1000, 1, "a").tolist()
    assert shuffled(1000, 0, "a").tolist() != shuffled(1000, 0, "b").tolist()
    assert shuffled(10, 7, "shuffle train").tolist() == [
        3,
        5,
        7,
        8,
        6,
        0,
        2,
        4,
        9,
        1,
    ]  # another order would silently be another data set


def test_shuffle_spreads_classes_over_shards() -> None:
    labels = np.repeat(np.arange(10), 1000)  # sorted by class, as sources list them
    for shard in plan_split("train", len(labels), seed=0, shard_size=500):
        counts = np.bincount(labels[shard.rows], minlength=10)
        assert counts.min() > 20  # expected 50, standard deviation 6.5
        assert counts.max() < 80


def test_limit_takes_the_first_of_the_shuffled_order() -> None:
    whole = np.concatenate([shard.rows for shard in plan_split("train", 100, seed=1, shard_size=10)])
    limited = np.concatenate([shard.rows for shard in plan_split("train", 100, seed=1, shard_size=10, limit=25)])
    assert limited.tolist() == whole[:25].tolist()


def test_keys_are_plain_and_sort_like_positions() -> None:
    keys = [key_of("train", position) for position in (0, 9, 10, 1_281_166)]
    assert keys == sorted(keys)
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for key in keys)


def test_stratified_takes_the_share_of_every_class_and_never_all() -> None:
    labels = np.repeat(np.arange(4), [1, 2, 10, 100])
    chosen = stratified(labels, 0.1, seed=5)
    assert np.bincount(labels[chosen], minlength=4).tolist() == [0, 0, 1, 10]
    assert stratified(labels, 0.99, seed=5).sum() == 0 + 1 + 9 + 99
    assert stratified(labels, 0.0, seed=5).sum() == 0


def test_small_classes_give_their_share_together() -> None:
    """A tenth of five images is half of one: of every second class one is held out, of others as many as before."""
    labels = np.repeat(np.arange(1001), [5] * 1000 + [40])
    chosen = stratified(labels, 0.1, seed=5)
    counts = np.bincount(labels[chosen], minlength=1001)
    assert set(counts[:1000].tolist()) == {0, 1} and counts[:1000].sum() == 500 and counts[1000] == 4
    assert 200 < counts[:500].sum() < 300, "not the first classes, but any"
    assert not np.array_equal(chosen, stratified(labels, 0.1, seed=6))
    assert stratified(np.arange(1000), 0.1, seed=5).sum() == 0, "the only image of a class is for training"


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([5, 5, 40], ["--val-fraction 0.1 of a class of 5 images is less than one image: val has images of 2 of 3"]),
        ([2, 1], ["--val-fraction 0.1 of a class of 1 image is less than one image: there is no split val"]),
        ([40, 40], []),
    ],
)
def test_a_share_that_is_less_than_an_image_is_told(sizes: list[int], words: list[str]) -> None:
    items = [Item(f"{label}/{n}", label, "a", 0, 1) for label, size in enumerate(sizes) for n in range(size)]
    told: list[str] = []
    splits = SplitListing.of(items).train_and_val(0.1, 0, told)
    assert len(told) == len(words) and all(map(str.startswith, told, words))
    assert ("val" in splits) == (sizes != [2, 1])
    told.clear()
    SplitListing.of(items).train_and_val(0.0, 0, told)
    assert not told, "nothing was asked to be held out"


def test_a_million_images_are_planned_in_columns() -> None:
    shards = plan_split("train", 1_281_167, seed=0, shard_size=2048)
    assert len(shards) == 626
    assert {len(shard.rows) for shard in shards} == {2046, 2047}


def options(**values: object) -> PrepareOptions:
    return PrepareOptions(**({"source": "digits", "output": Path("out")} | values))


def test_splits_and_limit_cut_the_plan() -> None:
    listing = open_source(options()).listing()
    asked = options(splits=("val",), limit=100, shard_size=30)
    plan = make_plan(chosen_splits(listing, asked), asked)
    assert {shard.split for shard in plan} == {"val"}
    assert [len(shard.rows) for shard in plan] == [25, 25, 25, 25]
    with pytest.raises(ConfigError, match="--splits test: the source has train, val"):
        chosen_splits(listing, options(splits=("test",)))


@pytest.mark.parametrize(("text", "limit"), [("0", 0), ("12", 12), ("1%", 10), ("0.5%", 5), (None, float("inf"))])
def test_max_errors_is_a_count_or_a_share(text: str | None, limit: float) -> None:
    assert options(max_errors=text).error_limit(1000) == limit


@pytest.mark.parametrize("text", ["-1", "few", "1.5", "%"])
def test_other_max_errors_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-errors"):
        options(max_errors=text)


def test_label_order_is_for_imagenet_only() -> None:
    with pytest.raises(ConfigError, match="--label-order ilsvrc"):
        options(label_order="ilsvrc")


def test_settings_follow_everything_that_decides_bytes() -> None:
    def settings(**values: object) -> dict[str, object]:
        asked = options(**values)
        listing = chosen_splits(open_source(asked).listing(), asked)
        return all_settings(asked, listing, asked.image_settings(encoded=listing.encoded, channels=listing.channels))

    plain = settings()
    assert settings(workers=7, on_error="fail", max_errors="3", output=Path("elsewhere")) == plain
    for values in (
        {"seed": 1},
        {"shard_size": 5},
        {"resize": "32"},
        {"encoding": "raw"},
        {"limit": 5},
        {"splits": ("val",)},
    ):
        assert settings(**values) != plain


def test_checksums_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(options(source="imagenet", input=ilsvrc.write_archives(tmp_path)))
    with pytest.raises(SourceError, match=r"ILSVRC2012_img_train\.tar: its md5 is [0-9a-f]{32}, published is 1d675b47"):
        check_source(source)
    for name in list(MD5):
        monkeypatch.setitem(MD5, name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest())
    check_source(source)
    with pytest.raises(SourceError, match="no published checksums"):
        check_source(open_source(options()))


def test_dry_run_says_what_would_happen_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = options(
        source="imagenet", input=ilsvrc.write_archives(tmp_path / "in"), output=tmp_path / "out", shard_size=4
    )
    print_plan(asked)
    printed = capsys.readouterr().out
    assert "train: 15 images in 4 shards of 3 to 4" in printed
    assert "val: 6 images in 2 shards of 3 to 3" in printed
    assert "images/s per core over 15 measured images, 0 of them unusable" in printed
    assert not (tmp_path / "out").exists()
