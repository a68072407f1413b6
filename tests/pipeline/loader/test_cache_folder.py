"""Where data sets at a URL are kept: no home folder, or one that cannot be written, is a line naming the variable."""

from pathlib import Path

import fsspec
import pytest

from pipeline.errors import DatasetError
from pipeline.loader import staging
from tests.helpers.shard_data import make_dataset


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A small data set in memory."""
    make_dataset(tmp_path / "data")
    fsspec.filesystem("memory").put(f"{tmp_path}/data/", "/cached", recursive=True)
    return "memory://cached"


def test_no_home_folder(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(staging.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(DatasetError, match=f"HOME is not set.*{staging.CACHE_VARIABLE}"):
        staging.stage(url)


def test_a_cache_that_cannot_be_made(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(staging.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(DatasetError, match=f"file/cache cannot be written.*{staging.CACHE_VARIABLE}"):
        staging.stage(url)
