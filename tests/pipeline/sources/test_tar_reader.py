"""One walker and one grouper of tars: what they yield, and what they refuse instead of ending in silence."""

import tarfile
from pathlib import Path

import pytest

from pipeline.errors import SourceError
from pipeline.sources.tar_reader import TarMember, group_samples, is_hidden, plain_name, read_compressed, walk_file
from tests.helpers.ilsvrc import devkit, tar_of
from tests.helpers.tars import write_tar


def test_members_are_those_of_the_standard_library(tmp_path: Path) -> None:
    files = {"a.jpg": b"1", "f" * 90 + "/" + "x" * 90 + ".jpg": b"22" * 400, "ü.cls": b"", "z.tar": bytes(512)}
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as tar:
            for name, data in files.items():
                file = tmp_path / "file"
                file.write_bytes(data)
                tar.add(file, name)
        found = list(walk_file(path))
        assert [member.name for member in found] == list(files)
        whole = path.read_bytes()
        assert [whole[m.offset : m.offset + m.size] for m in found] == list(files.values())


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_damaged_header_anywhere_is_an_error_not_an_end(tmp_path: Path, form: int) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name in ("one", "x" * 200, "three"):
            info = tarfile.TarInfo(name)
            info.pax_headers = {"size": "0"}
            tar.addfile(info)
    whole = path.read_bytes()
    for start in range(0, len(whole.rstrip(b"\0")), 512):
        if whole[start + 257 : start + 262] == b"ustar":
            flipped = bytearray(whole)
            flipped[start + 5] ^= 1
            path.write_bytes(flipped)
            with pytest.raises(SourceError, match=f"damaged header at byte {start:,}$"):
                list(walk_file(path))


def test_samples_are_members_in_a_row_that_share_a_key() -> None:
    names = ["a.jpg", ".hidden", "a.cls", "README", "b/a.jpg", "b/a.x.y", "c.d/a.jpg", "a.jpg"]
    passed_over: list[TarMember] = []
    samples = list(group_samples((TarMember(name, 0, 0) for name in names), passed_over))
    assert [(sample.key, [member.extension for member in sample.members]) for sample in samples] == [
        ("a", ["jpg", "cls"]),
        ("b/a", ["jpg", "x.y"]),
        ("c.d/a", ["jpg"]),
        ("a", ["jpg"]),
    ]
    assert [member.name for member in passed_over] == [".hidden", "README"]


def test_what_a_compressed_archive_lacks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(devkit())
    assert read_compressed(path, ["data/meta.mat"]).keys() == {"data/meta.mat"}
    with pytest.raises(SourceError, match=r"a\.tar\.gz: eta\.mat, other is not in it"):
        read_compressed(path, ["data/meta.mat", "eta.mat", "other"])
    path.write_bytes(devkit()[:-100])
    with pytest.raises(SourceError, match="damaged"):
        read_compressed(path, ["data/meta.mat", "other"])
    path.write_bytes(tar_of({"data/meta.mat": b""}))
    with pytest.raises(SourceError, match="damaged"):
        read_compressed(path, ["data/meta.mat"])


@pytest.mark.parametrize(
    ("name", "plain", "hidden"),
    [
        ("a.jpg", "a.jpg", False),
        ("./a.jpg", "a.jpg", False),
        (".//./x//a.jpg", "x/a.jpg", False),
        ("/a.jpg", "a.jpg", False),
        ("a./b.jpg", "a./b.jpg", False),
        ("../a.jpg", "../a.jpg", False),
        ("x/../a.jpg", "x/../a.jpg", False),
        ("._a.jpg", "._a.jpg", True),
        ("./._a.jpg", "._a.jpg", True),
        ("x/.DS_Store", "x/.DS_Store", True),
        (".git/a.jpg", ".git/a.jpg", True),
        ("__MACOSX/a.jpg", "__MACOSX/a.jpg", True),
        ("x/__MACOSX/y/a.jpg", "x/__MACOSX/y/a.jpg", True),
        ("__MACOSX.jpg", "__MACOSX.jpg", False),
        ("x__MACOSX/a.jpg", "x__MACOSX/a.jpg", False),
    ],
)
def test_plain_and_hidden_names(name: str, plain: str, hidden: bool) -> None:
    assert plain_name(name) == plain
    assert is_hidden(name) == is_hidden(plain) == hidden


@pytest.mark.parametrize("kind", [tarfile.AREGTYPE, tarfile.DIRTYPE, b"D", b"V"])
def test_folders_and_labels_are_no_files(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("folder/")
    info.type = kind  # the first as in very old tars
    path = write_tar(tmp_path / "a.tar", [info, ("folder/a.jpg", b"x")])
    assert [member.name for member in walk_file(path)] == ["folder/a.jpg"]


@pytest.mark.parametrize("blocks", [0, 1, 2, 20, 5000])
def test_zeros_behind_the_end_are_part_of_it(tmp_path: Path, blocks: int) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"x")])
    content = path.read_bytes()[:1024]
    path.write_bytes(content + bytes(512 * (1 + blocks)))
    assert [member.name for member in walk_file(path)] == ["a.jpg"]
    path.write_bytes(content + bytes(512 * (1 + blocks)) + b"x")
    with pytest.raises(SourceError, match=f"more data behind the end of the tar, at byte {1536 + 512 * blocks:,}"):
        list(walk_file(path))
