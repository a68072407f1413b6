"""Sources at a URL equal the same sources in a folder; archives are read by ranges; what fails is one clear error."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, SourceError
from pipeline.files import ATTEMPTS, PREFETCH, AnyPath, UrlPath, parse_path, prefetch
from pipeline.preparation.plan import check_source
from pipeline.sources import open_source
from pipeline.sources.listing import Listing, Source
from tests.helpers.ilsvrc import write_archives, write_extracted, write_kaggle
from tests.helpers.shard_data import make_dataset


@pytest.fixture
def url() -> Iterator[str]:
    """A folder of fsspec's file system in memory."""
    memory = fsspec.filesystem("memory")
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def put(folder: Path, url: str) -> UrlPath:
    filesystem, root = fsspec.core.url_to_fs(url)
    for path in folder.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    found = parse_path(url + "/")
    assert isinstance(found, UrlPath)
    return found


def opened(kind: str, root: AnyPath) -> tuple[Source, Listing]:
    source = open_source(PrepareOptions(source=kind, output=Path("out"), input=root))
    return source, source.listing()


def images(source: Source, listing: Listing) -> list[bytes]:
    return [
        bytes(source.read(item))
        for split in sorted(listing.splits)
        for item in listing.splits[split].items(np.arange(len(listing.splits[split])))
    ]


LAYOUTS = {
    "archives": ("imagenet", write_archives),
    "extracted": ("imagenet", lambda folder: write_extracted(folder, flat_val=True)),
    "kaggle": ("imagenet", write_kaggle),
    "folder": ("folder", lambda folder: write_extracted(folder, flat_val=False)),
    "tars": ("webdataset", make_dataset),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_url_holds_what_the_folder_holds(tmp_path: Path, url: str, layout: str) -> None:
    kind, write = LAYOUTS[layout]
    write(tmp_path)
    here, there = opened(kind, tmp_path), opened(kind, put(tmp_path, url))
    assert there[1].digest() == here[1].digest()
    assert images(*there) == images(*here)


def test_archives_are_read_by_ranges(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archives(tmp_path)
    root = put(tmp_path, url)
    whole, asked = [], []
    read_bytes, read_range = UrlPath.read_bytes, UrlPath.read_range
    monkeypatch.setattr(UrlPath, "read_bytes", lambda path: whole.append(path.name) or read_bytes(path))
    monkeypatch.setattr(
        UrlPath, "read_range", lambda path, *where: asked.append((path.name, *where)) or read_range(path, *where)
    )
    source, listing = opened("imagenet", root)
    assert whole == []
    for rows in listing.splits.values():
        for item in rows.items(np.arange(len(rows))):  # headers and ends only, of no image a byte
            there = [(offset, size) for name, offset, size in asked if name == item.file]
            assert there and all(o + size <= item.offset or o >= item.offset + item.size for o, size in there)
    item = listing.splits["train"].items(np.array([0]))[0]
    source.read(item)
    assert asked[-1] == (item.file, item.offset, item.size)


def test_its_checksums_are_checked_as_in_a_folder(tmp_path: Path, url: str) -> None:
    write_archives(tmp_path)
    source, _ = opened("imagenet", put(tmp_path, url))
    with pytest.raises(SourceError, match="its md5 is"):  # these archives are not the official ones
        check_source(source)


def test_a_store_that_fails_is_asked_again_then_named(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archives(tmp_path)
    source, listing = opened("imagenet", put(tmp_path, url))
    item = listing.splits["train"].items(np.array([0]))[0]
    expected, failures = source.read(item), []
    memory, cat_file = type(fsspec.filesystem("memory")), fsspec.filesystem("memory").cat_file

    def failing(self: object, *arguments: object, **options: object) -> bytes:
        if len(failures) < allowed:
            failures.append(1)
            raise OSError("slow down")
        return cat_file(*arguments, **options)

    monkeypatch.setattr(memory, "cat_file", failing)
    allowed = ATTEMPTS - 1
    assert source.read(item) == expected
    failures.clear()
    allowed = ATTEMPTS
    with pytest.raises(SourceError, match=r"memory://bucket/.*tar: cannot be read: slow down"):
        source.read(item)


def test_what_cannot_be_read_is_said() -> None:
    for kind, address, error, words in [
        ("imagenet", "memory://nothing", SourceError, "no such folder"),
        ("folder", "nosuch://bucket", SourceError, "nosuch"),
        ("cifar10", "memory://bucket", ConfigError, "reads local folders"),
    ]:
        with pytest.raises(error, match=words):
            opened(kind, parse_path(address))


def test_reading_ahead_keeps_the_order_and_its_bound() -> None:
    started = []
    results = prefetch(lambda number: started.append(number) or number, range(100))
    assert next(results) == 0
    assert len(started) <= PREFETCH
    assert list(results) == list(range(1, 100))
