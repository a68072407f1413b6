"""Fixtures of the trainer's rooms: a tiny data set and a finished run on it, for tests that change neither."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny_run import make_tiny_data, make_tiny_run
from tests.helpers.training_commands import call


@pytest.fixture(scope="session", autouse=True)
def small_heap() -> Iterator[None]:
    """Each loader that is closed collects, which is slow with all of torch on the heap."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()  # or what Triton has made is never collected, of which it complains at length


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training images, 10 held out, of ten classes."""
    return make_tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one process; checkpoints of the last two, of which the last is rated."""
    return make_tiny_run(tmp_path_factory.mktemp("tiny-run") / "run", tiny_data)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``python -m trainer``, in this process: exit code, stdout, stderr."""
    monkeypatch.delenv("RANK", raising=False)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return (call(monkeypatch, *words), *capsys.readouterr())

    return run
