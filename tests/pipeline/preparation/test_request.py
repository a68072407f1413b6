"""From options to work: splits, limit, error limits, checksums, and a dry run that writes nothing."""

import hashlib
from pathlib import Path

import pytest

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, SourceError
from pipeline.preparation.plan import all_settings, check_source, chosen_splits, make_plan, print_plan
from pipeline.sources import open_source
from pipeline.sources.imagenet import MD5
from tests.helpers import ilsvrc


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
        return all_settings(asked, listing, asked.picture_settings(encoded=listing.encoded, channels=listing.channels))

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
    assert "train: 15 pictures in 4 shards of 3 to 4" in printed
    assert "val: 6 pictures in 2 shards of 3 to 3" in printed
    assert "images/s a core over 15 measured pictures, 0 of them unusable" in printed
    assert not (tmp_path / "out").exists()
