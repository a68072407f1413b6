"""Fixtures: the real digits, prepared once by the project's own command."""

from pathlib import Path

import pytest

from tests.dist.commands import run, train_words


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of the 1,797 digits at 32 px."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    run(
        "pipeline",
        "prepare",
        "--source",
        "digits",
        "--resize",
        32,
        "--shard-size",
        128,
        "--workers",
        1,
        "--output",
        folder,
    )
    return folder


@pytest.fixture(scope="session")
def serial(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    folder = tmp_path_factory.mktemp("serial") / "run"
    run(*train_words(digits, folder, "--processes", 1))
    return folder
