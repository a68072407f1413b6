"""Walking an input: nothing waits or goes round, links are followed once, and what cannot be read is counted."""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import PrepareOptions
from pipeline.errors import ImageError, SourceError
from pipeline.files import UrlPath, read_head, scan
from pipeline.preparation.plan import make_request
from pipeline.sources import reasons
from pipeline.sources.listing import Item, Tally
from pipeline.sources.walk import Walker
from tests.helpers.preparing import ROOT
from tests.helpers.tars import sample, write_tar
from tests.pipeline.sources.test_layout import classes_of, counted, listing_of, make


def links(root: Path, **targets: str) -> None:
    for name, target in targets.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)


@pytest.mark.parametrize("target", [".", "..", "../..", "../cat", "{root}", "{root}/cat/deep", "/proc/self/root{root}"])
@pytest.mark.parametrize("url", [False, True])
def test_a_link_that_leads_back_is_one_file_passed_over(tmp_path: Path, target: str, url: bool) -> None:
    root = make(tmp_path / "in", "cat/1.jpg", "cat/deep/2.jpg", "dog/3.jpg")
    (root / "cat/back").symlink_to(target.format(root=root))
    for follow in (True, False):
        listing = listing_of(UrlPath(f"file://{root}") if url else root, follow_links=follow)
        assert classes_of(listing) == {"train": {"cat": ["1.jpg", "2.jpg"], "dog": ["3.jpg"]}}
        reason = reasons.LINK_OUT if target == "../.." and not follow else reasons.LOOP
        assert counted(listing) == {("", reason): 1}
        assert listing.passed_over[0].examples == ("cat/back",)


def test_links_that_double_at_every_level_end(tmp_path: Path) -> None:
    make(tmp_path, "in/cat/1.jpg", "in/dog/1.jpg", "out/30/last.jpg")
    for level in range(30):  # 2 ** 30 ways
        (tmp_path / f"out/{level}").mkdir(exist_ok=True)
        for name in "ab":
            (tmp_path / f"out/{level}/{name}").symlink_to(tmp_path / f"out/{level + 1}")
    (tmp_path / "in/cat/links").symlink_to(tmp_path / "out/0")
    listing = listing_of(tmp_path / "in", follow_links=True)
    assert classes_of(listing)["train"]["cat"] == ["1.jpg", "last.jpg"]
    assert counted(listing) == {("", reasons.LOOP): 30}


def test_links_to_files_and_folders_elsewhere_are_followed_where_asked(tmp_path: Path) -> None:
    make(tmp_path, "store/x/1.jpg", "store/y/2.jpg", "in/cat/0.jpg")
    links(tmp_path / "in", **{"cat/one.jpg": str(tmp_path / "store/x/1.jpg"), "dog": str(tmp_path / "store/y")})
    followed = listing_of(tmp_path / "in", follow_links=True)
    assert classes_of(followed) == {"train": {"cat": ["0.jpg", "one.jpg"], "dog": ["2.jpg"]}}
    assert not followed.warnings
    listing = listing_of(tmp_path / "in")
    assert classes_of(listing) == {"train": {"cat": ["0.jpg"]}}
    assert counted(listing) == {("", reasons.LINK_OUT): 2}
    assert "links that lead out of it are passed over (--follow-links follows them): " in listing.warnings[0]
    assert "cat/one.jpg" in listing.warnings[0] and "dog" in listing.warnings[0]


def test_a_link_inside_the_input_needs_no_option_wherever_the_input_lies(tmp_path: Path) -> None:
    make(tmp_path, "disk/in/cat/1.jpg", "disk/in/store/x/2.jpg", "disk/in/dog/3.jpg")
    links(tmp_path / "disk/in", **{"cat/two.jpg": "../store/x/2.jpg", "cow": str(tmp_path / "disk/in/store/x")})
    (tmp_path / "given").symlink_to("disk/in")  # who names the input by a link means what it leads to
    assert classes_of(listing_of(tmp_path / "given"))["train"]["cat"] == ["1.jpg", "two.jpg"]


@pytest.mark.parametrize("link", ["train", "val"])
def test_a_split_that_is_a_link_out_is_refused_with_the_option(tmp_path: Path, link: str) -> None:
    make(tmp_path, "in/train/cat/1.jpg", "in/val/cat/2.jpg")
    (tmp_path / "in" / link).rename(tmp_path / "elsewhere")
    (tmp_path / "in" / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match=rf"{link}: is a link that leads out of the input: --follow-links follows it"):
        listing_of(tmp_path / "in")
    assert set(listing_of(tmp_path / "in", follow_links=True).splits) == {"train", "val"}


@pytest.mark.parametrize("source", ["folder", "webdataset"])
def test_an_input_of_nothing_but_links_is_refused_with_the_option(tmp_path: Path, source: str) -> None:
    make(tmp_path, "store/1.jpg")
    write_tar(tmp_path / "store/a.tar", sample("a"))
    links(tmp_path / "in", **{"cat/1.jpg": str(tmp_path / "store/1.jpg"), "a.tar": str(tmp_path / "store/a.tar")})
    options = PrepareOptions(source, tmp_path / "out", tmp_path / "in", val_fraction=0)
    with pytest.raises(SourceError, match=r"links lead out of it \(.*\): --follow-links follows them"):
        make_request(options)
    assert make_request(dataclasses.replace(options, follow_links=True)).num_planned == 1


def test_a_folder_is_listed_under_its_own_name_whatever_links_to_it(tmp_path: Path) -> None:
    make(tmp_path, "cat/z/1.jpg", "dog/1.jpg")
    (tmp_path / "cat/a").symlink_to("z")
    listing = listing_of(tmp_path)
    assert "cat/z/1.jpg" in listing.splits["train"].names
    assert listing.passed_over[0].examples == ("cat/a",)


def test_a_link_to_the_input_is_no_class_and_no_wrapper(tmp_path: Path) -> None:
    make(tmp_path / "a", "cat/1.jpg")
    links(tmp_path / "a", me=".", above="..")
    listing = listing_of(tmp_path / "a", follow_links=True)
    assert classes_of(listing) == {"train": {"cat": ["1.jpg"]}}
    assert counted(listing) == {("", reasons.LOOP): 2}
    assert counted(listing_of(tmp_path / "a")) == {("", reasons.LOOP): 1, ("", reasons.LINK_OUT): 1}
    make(tmp_path / "b", "x/train/cat/1.jpg", "x/val/cat/2.jpg")
    links(tmp_path / "b", **{"x/me": ".", "x/above": "../..", "me": "."})
    assert set(listing_of(tmp_path / "b").splits) == {"train", "val"}


@pytest.mark.parametrize("target", ["nowhere", "val", "pipe"])
def test_a_split_that_is_a_link_to_no_folder_is_refused(tmp_path: Path, target: str) -> None:
    make(tmp_path, "train/cat/1.jpg")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "val").symlink_to(target)
    with pytest.raises(SourceError, match=r"val: is a (link|pipe), and leads to no folder of a split"):
        listing_of(tmp_path)


def test_special_files_are_counted_by_kind_and_never_opened(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.jpg", "dog/1.jpg")
    for name in ("cat/pipe.jpg", "cat/pipe", "pipe"):
        os.mkfifo(tmp_path / name)
    links(tmp_path, **{"cat/zero.jpg": "/dev/zero", "cat/to pipe.png": "pipe", "cat/gone": "x", "dog/loop": "loop"})
    listing = listing_of(tmp_path)
    assert classes_of(listing) == {"train": {"cat": ["1.jpg"], "dog": ["1.jpg"]}}
    assert counted(listing) == {("", reasons.PIPE): 4, ("", reasons.DEVICE): 1, ("", reasons.BROKEN_LINK): 2}
    with pytest.raises(OSError, match="is no regular file"):
        read_head(tmp_path / "pipe", 4)  # should one become a pipe later


def test_a_broken_link_with_a_picture_s_name_is_a_picture_that_is_missing(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.jpg")
    (tmp_path / "cat/gone.jpg").symlink_to("nowhere.jpg")
    assert classes_of(listing_of(tmp_path)) == {"train": {"cat": ["1.jpg", "gone.jpg"]}}


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders named ``locked`` cannot be listed, files named so not be opened, by root neither."""
    scandir, opener = os.scandir, os.open

    def refusing_scandir(path: Path) -> Iterator[os.DirEntry[str]]:
        if isinstance(path, Path) and path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    def refusing_open(path: Path, *arguments: int) -> int:
        if isinstance(path, Path) and path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return opener(path, *arguments)

    monkeypatch.setattr("os.scandir", refusing_scandir)
    monkeypatch.setattr("os.open", refusing_open)


@pytest.mark.usefixtures("locked")
def test_what_this_user_may_not_read_is_counted_and_told(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.jpg", "cat/locked/2.jpg", "dog/1.jpg", "dog/deep/locked", "locked/3.jpg")
    listing = listing_of(tmp_path)
    assert classes_of(listing) == {"train": {"cat": ["1.jpg"], "dog": ["1.jpg"]}}
    assert counted(listing) == {("", reasons.UNREADABLE): 3}
    assert listing.warnings[0] == (
        f"{tmp_path}: folders that this user may not list are passed over: cat/locked, locked"
    )


@pytest.mark.usefixtures("locked")
def test_an_input_or_split_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    for names in (["locked/train/cat/1.jpg"], ["locked/cat/1.jpg", "locked/dog/1.jpg"]):
        make(tmp_path, *names)
        with pytest.raises(SourceError, match="locked: cannot be listed: Permission denied"):
            listing_of(tmp_path / "locked")


def test_a_disk_that_fails_is_an_error_not_a_file_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "cat/1.jpg", "cat/sick/2.jpg", "dog/1.jpg")
    scandir = os.scandir

    def failing(path: Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "sick":
            raise OSError(5, "Input/output error")
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", failing)
        with pytest.raises(SourceError, match="sick: cannot be listed: Input/output error"):
            listing_of(tmp_path)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter: pytest shuts its own to others whenever a session starts."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(not shutil.which("setpriv") or os.geteuid() != 0, reason="needs setpriv, as root")
def test_another_user_s_files_are_counted_or_left_out(open_folder: Path) -> None:
    """As monkeypatched above, by a process that really may not read them."""
    make(open_folder, "cat/1.jpg", "cat/private/2.jpg", "dog/1.jpg", "dog/private.jpg", "dog/private")
    for name in ("cat/private", "dog/private.jpg", "dog/private"):
        (open_folder / name).chmod(0)
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c"]
    program = (
        "import os, sys; from pathlib import Path; from tests.pipeline.sources.test_walk import as_another_user;"
        "os.scandir(sys.argv[1]); {}"
    )
    if subprocess.run([*command, program.format(""), open_folder], cwd=ROOT, check=False).returncode:
        pytest.skip("another user cannot read this working tree, or the folder of temporary files")
    subprocess.run([*command, program.format("as_another_user(Path(sys.argv[1]))"), open_folder], cwd=ROOT, check=True)


def as_another_user(root: Path) -> None:
    listing = listing_of(root)
    assert classes_of(listing) == {"train": {"cat": ["1.jpg"], "dog": ["1.jpg", "private.jpg"]}}
    assert counted(listing) == {("", reasons.UNREADABLE): 2}
    from pipeline.sources.folder import read_file

    with pytest.raises(ImageError, match="cannot be read: Permission denied"):
        read_file(root, Item("", 0, "dog/private.jpg", 0, 1))


def test_names_of_every_kind_are_walked(tmp_path: Path) -> None:
    names = ["l" * 246 + ".jpg", "new\nline.jpg", "caf\udce9.jpg", "*?[1]#%41.jpg", " .jpg", "-rf.jpg", "\x1b[31m.jpg"]
    root = make(tmp_path / "caf\udce9", *(f"\udcff/{name}" for name in names), "dog/1.jpg")
    listing = listing_of(root)
    assert [record.name for record in listing.classes] == ["\\xff", "dog"]
    assert sorted(classes_of(listing)["train"]["\\xff"]) == sorted(names)


def test_a_path_deeper_than_the_system_takes_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "cat/1.jpg", "dog/1.jpg")
    monkeypatch.chdir(tmp_path / "cat")
    for _ in range(40):  # 40 * 200 characters, more than 4,096
        Path("d" * 199).mkdir()
        os.chdir("d" * 199)
    Path("unreachable.jpg").write_bytes(b"\xff\xd8\xff")
    listing = listing_of(tmp_path)
    assert classes_of(listing) == {"train": {"cat": ["1.jpg"], "dog": ["1.jpg"]}}
    assert counted(listing) == {("", reasons.UNREADABLE): 1}
    monkeypatch.undo()
    subprocess.run(["rm", "-r", str(tmp_path / "cat")], check=True)  # shutil's fails as well


def test_hidden_files_are_counted_to_the_last(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.jpg", "cat/._1.jpg", "dog/1.jpg", ".git/a/b", ".git/.c", ".git/d.jpg", "dog/.x/y/z.jpg")
    (tmp_path / ".link").symlink_to("cat")
    assert counted(listing_of(tmp_path)) == {("", reasons.HIDDEN): 6}


def test_a_tally_keeps_the_first_names_whatever_the_order() -> None:
    forwards, backwards = Tally(), Tally()
    names = [f"{number:03d}" for number in range(100)]
    for tally, order in ((forwards, names), (backwards, names[::-1])):
        for name in order:
            tally.add("reason", name, split="val")
    assert forwards.records() == backwards.records()
    assert forwards.records()[0].examples == ("000", "001", "002")
    backwards.extend(forwards.records())
    assert backwards.records()[0].count == 200


def test_looking_for_a_picture_stops_at_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *(f"cat/{number:03d}.jpg" for number in range(50)), "empty/x.txt")
    seen: list[str] = []
    monkeypatch.setattr("pipeline.sources.walk.scan", lambda path: (seen.append(e.name) or e for e in scan(path)))
    walker = Walker(tmp_path, Tally())
    assert walker.has_picture("cat")
    assert len(seen) == 1
    assert not walker.has_picture("empty")
