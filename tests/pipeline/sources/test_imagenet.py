"""Source imagenet: every layout gives the same images and labels; hostile archives are one clear error."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, SourceError
from pipeline.sources import open_source, reasons
from pipeline.sources.listing import Listing, Source
from pipeline.sources.tar_reader import range_reader, walk_tar
from tests.helpers import ilsvrc
from tests.helpers.tars import write_tar


def source_of(folder: Path, order: str = "default") -> Source:
    return open_source(PrepareOptions(source="imagenet", output=Path("out"), input=folder, label_order=order))


def contents(source: Source, listing: Listing) -> dict[str, set[tuple[str, bytes]]]:
    return {
        split: {(listing.classes[item.label].name, source.read(item)) for item in rows.items(np.arange(len(rows)))}
        for split, rows in listing.splits.items()
    }


EXPECTED = {
    "train": {(name, data) for name, files in ilsvrc.train_images().items() for data in files.values()},
    "val": {
        (ilsvrc.SYNSETS[label][0], data)
        for label, data in zip(ilsvrc.VAL_IDS, ilsvrc.val_images().values(), strict=True)
    },
}
LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "archives": ilsvrc.write_archives,
    "flat val": lambda folder: ilsvrc.write_extracted(folder, flat_val=True),
    "class folders": lambda folder: ilsvrc.write_extracted(folder, flat_val=False),
    "kaggle": ilsvrc.write_kaggle,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images_and_labels(tmp_path: Path, layout: str) -> None:
    source = source_of(LAYOUTS[layout](tmp_path))
    listing = source.listing()
    assert contents(source, listing) == EXPECTED
    assert [record.name for record in listing.classes] == ["n02100735", "n02110185", "n02119789"]
    if layout != "class folders":
        assert [record.title for record in listing.classes] == ["English setter", "Siberian husky", "kit fox"]


def test_ilsvrc_order_is_the_devkits(tmp_path: Path) -> None:
    source = source_of(ilsvrc.write_archives(tmp_path), "ilsvrc")
    listing = source.listing()
    assert [record.name for record in listing.classes] == [name for name, _ in ilsvrc.SYNSETS.values()]
    assert listing.label_order == "ilsvrc"
    assert listing.splits["val"].labels.tolist() == [label - 1 for label in ilsvrc.VAL_IDS]
    assert contents(source, listing) == EXPECTED


def test_only_one_archive_is_enough(tmp_path: Path) -> None:
    (ilsvrc.write_archives(tmp_path) / "ILSVRC2012_img_val.tar").unlink()
    assert set(source_of(tmp_path).listing().splits) == {"train"}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no ILSVRC-2012 here"):
        source_of(tmp_path).listing()
    ilsvrc.write_extracted(tmp_path, flat_val=True)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(SourceError, match="val is flat"):
        source_of(tmp_path).listing()
    with pytest.raises(ConfigError, match="needs the devkit"):
        ilsvrc.write_extracted(tmp_path / "x", flat_val=False)
        source_of(tmp_path / "x", "ilsvrc").listing()


def test_a_missing_val_image_is_noticed(tmp_path: Path) -> None:
    ilsvrc.write_extracted(tmp_path, flat_val=True)
    next((tmp_path / "val").iterdir()).unlink()
    with pytest.raises(SourceError, match="5 val images, but the devkit labels 6"):
        source_of(tmp_path).listing()


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", size: int | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd", len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        (member("n.JPEG", tarfile.SYMTYPE), "n.JPEG is a link"),
        (member("n.JPEG", tarfile.LNKTYPE), "n.JPEG is a hard link"),
        (member("n.JPEG", tarfile.CHRTYPE), "n.JPEG is a device"),
        (member("n.JPEG", tarfile.FIFOTYPE), "n.JPEG is a named pipe"),
        (member("n.JPEG", data=b"x", size=10**9), "claims 1,000,000,000 bytes"),
        (member("n.JPEG", data=b"x" * 600)[:-1] + b"", "truncated"),
        (b"\1" * 512, "damaged header"),
        (member("n.JPEG", data=b"x"), "without its end blocks"),
        (member("x" * 300, tarfile.GNUTYPE_LONGNAME, size=2**30), "claims"),
    ],
)
def test_hostile_inner_tars_are_one_clear_error(tmp_path: Path, inner: bytes, words: str) -> None:
    ends = b"" if "end blocks" in words or words == "truncated" else bytes(1024)
    outer = ilsvrc.tar_of({"n02119789.tar": inner + ends})
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(outer)
    with pytest.raises(SourceError, match=words) as caught:
        source_of(tmp_path).listing()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/etc/x.JPEG", "../../x.JPEG", "a/../x.JPEG"])
def test_paths_in_names_mean_nothing(tmp_path: Path, name: str) -> None:
    inner = ilsvrc.tar_of({name: ilsvrc.jpeg(0)})
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(ilsvrc.tar_of({"n02119789.tar": inner}))
    source = source_of(tmp_path)
    (item,) = source.listing().splits["train"].items(np.array([0]))
    assert item.name == "n02119789/x.JPEG"
    assert source.read(item) == ilsvrc.jpeg(0)


def test_other_members_of_the_outer_tar_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(ilsvrc.tar_of({"readme.txt": b"hello"}))
    with pytest.raises(SourceError, match=r"readme\.txt is not an inner tar"):
        source_of(tmp_path).listing()


def test_a_torn_outer_tar_is_noticed_at_every_cut(tmp_path: Path) -> None:
    path = ilsvrc.write_archives(tmp_path) / "ILSVRC2012_img_train.tar"
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512
    for cut in range(512, end, 4096 + 512):
        path.write_bytes(whole[:cut])
        with pytest.raises(SourceError):
            source_of(tmp_path).listing()


def test_an_archive_that_shrinks_later_is_one_clear_error(tmp_path: Path) -> None:
    source = source_of(ilsvrc.write_archives(tmp_path))
    rows = source.listing().splits["train"]
    path = tmp_path / "ILSVRC2012_img_train.tar"
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(SourceError, match="shorter than when it was listed"):
        source.read(rows.items(np.array([3]))[0])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_walk_equals_the_standard_librarys(tmp_path: Path, form: int) -> None:
    files = {"a.jpg": b"1" * 700, "ü/é.jpg": b"2", "d" * 60 + "/" + "f" * 60: b"3" * 512}
    if form != tarfile.USTAR_FORMAT:
        files |= {"long/" * 50 + "x.jpg": b"4"}
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 12.5
            tar.addfile(info, io.BytesIO(data))
    size = path.stat().st_size
    found = {
        entry.name: path.read_bytes()[entry.offset : entry.offset + entry.size]
        for entry in walk_tar(range_reader(path), 0, size, "x")
    }
    assert found == files


def write_train(folder: Path, inner: list[tuple[str, bytes]]) -> None:
    """The outer train archive, with these members in their order."""
    write_tar(folder / "ILSVRC2012_img_train.tar", inner)


def test_one_name_twice_in_an_archive_is_refused_and_both_named(tmp_path: Path) -> None:
    images = write_tar(tmp_path / "inner.tar", [("n_1.JPEG", ilsvrc.jpeg(0)), ("x/n_1.jpeg", ilsvrc.jpeg(1))])
    once = write_tar(tmp_path / "once.tar", [("n_1.JPEG", ilsvrc.jpeg(0))]).read_bytes()
    write_train(tmp_path, [("n02119789.tar", images.read_bytes())])
    with pytest.raises(SourceError, match=r"two samples under one name: n_1\.JPEG at byte .* and x/n_1\.jpeg at byte"):
        source_of(tmp_path).listing()
    write_train(tmp_path, [("n02119789.tar", once), ("./n02119789.tar", once)])
    with pytest.raises(SourceError, match=r"two samples under one name: n02119789\.tar at byte"):
        source_of(tmp_path).listing()


def test_what_a_mac_leaves_in_archives_is_counted(tmp_path: Path) -> None:
    odd = [("._n_1.JPEG", b"Mac"), ("__MACOSX/n_1.JPEG", b"Mac"), (".git/n_2.JPEG", b"x"), ("n_1.JPEG", ilsvrc.jpeg(0))]
    inner = write_tar(tmp_path / "inner" / "x.tar", odd).read_bytes()
    write_train(tmp_path, [("._n02119789.tar", b"Mac"), ("n02119789.tar", inner)])
    listing = source_of(tmp_path).listing()
    assert list(listing.splits["train"].names) == ["n02119789/n_1.JPEG"]
    assert {(row.split, row.reason): row.count for row in listing.passed_over}["train", reasons.HIDDEN] == 4


@pytest.mark.parametrize("name", [f"ILSVRC2012_img_{end}" for end in ("train.tar.gz", "val.tar.zst", "val.tgz")])
def test_a_compressed_archive_is_refused_beside_the_other(tmp_path: Path, name: str) -> None:
    other = "val" if "train" in name else "train"
    ilsvrc.write_archives(tmp_path / "all")
    for kept in (f"ILSVRC2012_img_{other}.tar", "ILSVRC2012_devkit_t12.tar.gz"):
        (tmp_path / "all" / kept).rename(tmp_path / kept)
    (tmp_path / name).write_bytes(b"whatever")
    with pytest.raises(SourceError, match=f"{name}: is compressed"):
        source_of(tmp_path).listing()


def counted(listing: Listing) -> dict[tuple[str, str], int]:
    return {(row.split, row.reason): row.count for row in listing.passed_over}


def test_members_of_archives_that_are_no_pictures_are_counted(tmp_path: Path) -> None:
    ilsvrc.write_archives(tmp_path)
    inner = {
        f"{name}.tar": ilsvrc.tar_of(files | {"._x.JPEG": b"", ".DS_Store": b"", "readme.txt": b"text"})
        for name, files in ilsvrc.train_images().items()
    }
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(ilsvrc.tar_of(inner | {"._n02119789.tar": b"x"}))
    extra = {"._a.JPEG": b"", "notes": b"text"}
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(ilsvrc.tar_of(ilsvrc.val_images() | extra))
    ilsvrc.write_train_folders(tmp_path / "train")  # extracted too: the archive is read
    (tmp_path / "ILSVRC2012_bbox.tar.gz").write_bytes(b"x")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/HEAD").write_bytes(b"x")
    source = source_of(tmp_path)
    listing = source.listing()
    assert contents(source, listing) == EXPECTED
    assert counted(listing) == {
        ("train", reasons.HIDDEN): 7,
        ("train", reasons.NO_PICTURE): 3,
        ("val", reasons.HIDDEN): 1,
        ("val", reasons.NO_PICTURE): 1,
        ("", reasons.UNKNOWN_SPLIT): 15,
        ("", reasons.NOT_READ): 1,
        ("", reasons.HIDDEN): 1,
    }


def test_a_picture_of_an_archive_is_known_by_its_content_too(tmp_path: Path) -> None:
    inner = ilsvrc.tar_of({"x.JPEG": ilsvrc.jpeg(0), "y": ilsvrc.jpeg(1), "z.txt": b""})
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(ilsvrc.tar_of({"n02119789.tar": inner}))
    listing = source_of(tmp_path).listing()
    assert list(listing.splits["train"].names) == ["n02119789/x.JPEG", "n02119789/y"]
    assert counted(listing) == {("train", reasons.NO_PICTURE): 1}


def test_the_rest_of_kaggle_s_layout_is_counted(tmp_path: Path) -> None:
    ilsvrc.write_kaggle(tmp_path)
    base = tmp_path / "ILSVRC"
    for name in ("Annotations/CLS-LOC/train/n02119789/a.xml", "ImageSets/CLS-LOC/val.txt", "Data/CLS-LOC/test/t.JPEG"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(b"x")
    (tmp_path / "LOC_sample_submission.csv").write_text("x")
    with (tmp_path / "LOC_val_solution.csv").open("a") as file:
        file.write("ILSVRC2012_val_99999999,n02119789 1 2 3 4\n")
    source = source_of(tmp_path)
    listing = source.listing()
    assert contents(source, listing) == EXPECTED
    assert counted(listing) == {
        ("", reasons.NOT_READ): 3,
        ("", reasons.UNKNOWN_SPLIT): 1,
        ("val", reasons.NO_IMAGE): 1,
    }


@pytest.mark.parametrize("text", ["", "ImageId\nx\n", "ImageId,PredictionString\nILSVRC2012_val_00000001,\n"])
def test_a_damaged_table_of_kaggle_is_one_line(tmp_path: Path, text: str) -> None:
    ilsvrc.write_kaggle(tmp_path)
    (tmp_path / "LOC_val_solution.csv").write_text(text)
    with pytest.raises(SourceError, match=r"LOC_val_solution\.csv.*(names a picture|has no label)") as caught:
        source_of(tmp_path).listing()
    assert "\n" not in str(caught.value)


def test_folders_of_any_case_with_levels_and_strangers(tmp_path: Path) -> None:
    ilsvrc.write_extracted(tmp_path, flat_val=False)
    (tmp_path / "train").rename(tmp_path / "Training")
    (tmp_path / "val").rename(tmp_path / "Validation")
    folder = tmp_path / "Training/n02119789"
    (folder / "images").mkdir()
    for path in sorted(folder.glob("*.JPEG"))[:3]:
        path.rename(folder / "images" / path.name)
    (folder / "self").symlink_to(".")
    (folder / "boxes.txt").write_text("text")
    (tmp_path / "Training/other").mkdir()
    (tmp_path / "Training/other/x.JPEG").write_bytes(b"x")
    (tmp_path / "Training/stray.JPEG").write_bytes(b"x")
    source = source_of(tmp_path)
    listing = source.listing()
    assert contents(source, listing) == EXPECTED
    assert counted(listing) == {
        ("train", reasons.LOOP): 1,
        ("train", reasons.NO_PICTURE): 1,
        ("train", reasons.IGNORED_FOLDER): 1,
        ("train", reasons.BESIDE): 1,
    }


def test_a_split_that_is_there_and_empty_is_an_error_and_one_that_is_not_wanted_is_none(tmp_path: Path) -> None:
    ilsvrc.write_extracted(tmp_path, flat_val=True)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    asked = PrepareOptions(source="imagenet", output=Path("out"), input=tmp_path, splits=("train",))
    listing = open_source(asked).listing()  # its flat val has no labels
    assert counted(listing) == {("val", reasons.NOT_CHOSEN): 6}
    for path in (tmp_path / "val").iterdir():
        path.unlink()
    with pytest.raises(SourceError, match=r"val: holds no picture of val; expected WNID/\*\.JPEG or \*\.JPEG"):
        source_of(tmp_path).listing()
    assert set(open_source(asked).listing().splits) == {"train"}


def test_a_wrapper_folder_is_named(tmp_path: Path) -> None:
    ilsvrc.write_extracted(tmp_path / "ilsvrc", flat_val=False)
    with pytest.raises(SourceError, match=r"ilsvrc/ looks like it: --input .*/ilsvrc$"):
        source_of(tmp_path).listing()
    with pytest.raises(SourceError, match=r"class folders lie directly in it: .* the folder above train/"):
        source_of(tmp_path / "ilsvrc/train").listing()
