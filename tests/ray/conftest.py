"""Fixtures: an input folder and the undisturbed data set made from it."""

from pathlib import Path

import pytest

from tests.ray import preparing


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 small PNGs in three classes."""
    return preparing.make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def arguments(pictures: Path) -> tuple[object, ...]:
    """prepare's arguments for them, but for --output and --workers: six shards of train, one of val."""
    return ("prepare", "--source", "folder", "--input", pictures, "--shard-size", 9, *preparing.KEEP)


@pytest.fixture(scope="session")
def undisturbed(arguments: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set that one worker makes when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "data"
    preparing.run(*arguments, "--workers", 1, "--output", folder)
    return folder
