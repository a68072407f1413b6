"""Fixtures that several rooms use: the real digits, and an input folder with the data set made from it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.training_commands import DOUBLE, run, train_words


def pytest_addoption(parser: pytest.Parser) -> None:
    """``make test-kills``; and signals that this process was started to ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:  # in the background of a shell, or under nohup
            signal.signal(number, lambda *_: None)  # no less for us, but what we start would inherit to ignore it
    parser.addoption("--all-cells", action="store_true", help="the whole matrix of test_kill_matrix.py, not half of it")


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


@pytest.fixture(scope="session")
def exact_serial(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float64: what other processes must do to 12 digits, however they add."""
    folder = tmp_path_factory.mktemp("exact") / "run"
    run(*train_words(digits, folder, "--processes", 1, program=DOUBLE))
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 small PNGs in three classes."""
    from tests.helpers import preparing  # a machine that only runs tests/gpu has no libraries of JPEGs

    return preparing.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def arguments(images: Path) -> tuple[object, ...]:
    """prepare's arguments for them, but for --output and --workers: six shards of train, one of val."""
    from tests.helpers import preparing

    return ("prepare", "--source", "folder", "--input", images, "--shard-size", 9, *preparing.KEEP)


@pytest.fixture(scope="session")
def undisturbed(arguments: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set that one worker makes when nothing happens to it."""
    from tests.helpers import preparing

    folder = tmp_path_factory.mktemp("undisturbed") / "data"
    preparing.run(*arguments, "--workers", 1, "--output", folder)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A small net is quicker with one thread, by far on a busy machine. OMP_NUM_THREADS sets another number."""
    import torch  # most tests of the pipeline need none

    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    yield
    torch.set_num_threads(threads)
