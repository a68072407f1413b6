"""Data sets, tars and inputs that a stranger made, given to the commands as a user would: one line, nothing outside."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pipeline.__main__ import main
from pipeline.config import ImageSettings
from pipeline.errors import DatasetError, ImageError, SourceError
from pipeline.index_checks import check_index
from pipeline.inspection.verify import is_larger
from pipeline.loader import staging
from pipeline.loader.batches import EvaluationLoader, TrainingLoader
from pipeline.loader.config import LoaderConfig
from pipeline.loader.image_reader import ImageReader
from pipeline.loader.open_split import check_files, open_split
from pipeline.manifest import MANIFEST_NAME, STATISTICS_NAME, _canonical, read_manifest
from pipeline.preparation.decode import decode
from pipeline.sources.tar_reader import MOST_REST, walk_file
from tests.helpers import preparing
from tests.helpers.loader_data_set import make_data_set
from tests.helpers.odd_images import photo, saved
from tests.helpers.tars import sample, write_tar
from tests.helpers.trees import tree
from twotower.words import one_line

CONFIG = LoaderConfig(crop_px=12, mean="channel", threads=1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set."""
    return make_data_set(tmp_path_factory.mktemp("sound") / "data", size=(16, 16), train=10, val=4)


@pytest.fixture
def data(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(sound, tmp_path / "data")


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes what the manifest says, and its sha256 with it."""
    raw = json.loads((folder / MANIFEST_NAME).read_bytes())
    raw.pop("sha256")
    change(raw)
    sealed = raw | {"sha256": hashlib.sha256(_canonical(raw).encode()).hexdigest()}
    (folder / MANIFEST_NAME).write_text(_canonical(sealed), encoding="utf-8")


def put(folder: Path, name: str, content: bytes) -> None:
    """Changes a file of a data set, and what the manifest says of it."""
    (folder / name).write_bytes(content)
    found = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def change(raw: dict[str, Any]) -> None:
        raw["files"] |= {name: found} if name in raw["files"] else {}
        for shard in (shard for split in raw["splits"].values() for shard in split["shards"]):
            if name == shard["name"]:
                shard.update(found)
            if name == shard["name"].removesuffix(".tar") + ".idx":
                shard.update({f"index_{key}": value for key, value in found.items()})

    forge(folder, change)


def first_shard(raw: dict[str, Any]) -> dict[str, Any]:
    shard: dict[str, Any] = raw["splits"]["train"]["shards"][0]
    return shard


NAMES = ("../evil", "/{outside}/evil.tar", "train/../../evil.tar", "train/train-000000.tar\n", "", "a/b.tar", 7, None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["shard", "file", "split"])
def test_no_name_of_a_manifest_leads_outside(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, place: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    name = name.format(outside=outside) if isinstance(name, str) else name

    def change(raw: dict[str, Any]) -> None:
        if place == "shard":
            first_shard(raw)["name"] = name
        elif place == "file":
            raw["files"][str(name)] = raw["files"][STATISTICS_NAME]
        else:
            raw["splits"][str(name)] = raw["splits"].pop("val")

    forge(data, change)
    before = tree(outside)
    monkeypatch.setattr(staging, "_STAGED", {})
    for read in (
        lambda: read_manifest(data),
        lambda: open_split(data, "train"),
        lambda: staging.stage(f"file://{data}", tmp_path / "cache"),
        lambda: staging.stage(Path(f"file://{data}"), tmp_path / "cache"),
    ):
        with pytest.raises(DatasetError, match=r"manifest\.json: (splits|files)"):
            read()
    assert tree(outside) == before and not list((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: first_shard(raw).update(size_bytes=-1), "size_bytes is -1"),
        (lambda raw: first_shard(raw).update(num_samples=2**64), "num_samples is 18446744073709551616"),
        (lambda raw: first_shard(raw).update(num_samples=True), "num_samples is True"),
        (lambda raw: first_shard(raw).update(sha256="x"), "64 hexadecimal digits"),
        (lambda raw: first_shard(raw).update(more=1), "only num_samples"),
        (lambda raw: raw["splits"]["train"].update(num_samples=11), "the 10 samples of its shards"),
        (lambda raw: raw["splits"]["train"]["shards"].append(first_shard(raw)), "each shard once"),
        (lambda raw: raw["picture"].update(height_px=0), "height_px is 0"),
        (lambda raw: raw["picture"].update(height_px=2**24, width_px=2**24), "bytes of pixels"),
        (lambda raw: raw["picture"].update(encoding="exe"), "one of jpeg, png, raw, original"),
        (lambda raw: raw["settings"].update(resize_px=10**9), "settings.resize_px is 1000000000"),
        (lambda raw: raw.update(classes=[["cat"]]), r"classes\[0\] is"),
        (lambda raw: raw.update(num_found=0.5), "num_found is 0.5"),
        (lambda raw: raw.update(passed_over=[{"split": "", "reason": "", "count": 1, "examples": [1]}]), "examples"),
        (lambda raw: raw.pop("files"), "files is 'missing'"),
    ],
)
def test_no_number_of_a_manifest_is_believed(data: Path, change: Callable[[Any], None], said: str) -> None:
    forge(data, change)
    with pytest.raises(DatasetError, match=said) as caught:
        read_manifest(data)
    assert one_line(str(caught.value)) == str(caught.value)


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"format": 2, "format": 2}', "9" * 10**5, '{"format": NaN}', '"x"', "[]"]
)
def test_json_that_nobody_meant_is_one_line(data: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (data / MANIFEST_NAME).write_text(text)
    assert run_main("verify", data) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: manifest.json is damaged (") and len(line) < 300


def run_main(*words: object) -> int:
    """A command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pipeline", *map(str, words)])
        return main()


@pytest.mark.parametrize("number", ["-1", str(2**64 - 1), "99999999", "0", "511", "1e3", "x", "9" * 30, ""])
@pytest.mark.parametrize("field", [1, 2, 5, 6])
def test_no_entry_of_an_index_leads_dali_astray(data: Path, field: int, number: str) -> None:
    name = "train/train-000000.idx"
    first, line, *rest = (data / name).read_text().split("\n")
    fields = line.split(" ")
    fields[field] = number
    put(data, name, "\n".join([first, " ".join(fields), *rest]).encode())
    with pytest.raises(DatasetError, match=r"train-000000\.idx (says|has|claims)"):
        EvaluationLoader(data, CONFIG, batch_size=4, split="train")


def test_an_index_claims_no_more_than_its_tar_has_and_no_label_of_kilobytes() -> None:
    line = b"v1.2 1\njpg 512 10 a.jpg cls 1536 %d a.cls json 2560 %d a.json\n"
    check_index(line % (64, 2), 1, 4096)
    with pytest.raises(ValueError, match="claims 12,559 bytes, and the tar has 4,096"):
        check_index(line % (64, 9999), 1, 4096)
    with pytest.raises(ValueError, match="claims a label"):
        check_index(line % (65, 2), 1, 4096)


@pytest.mark.parametrize("change", ["swap", "double", "drop", "space", "name", "not ascii"])
def test_no_line_of_an_index_is_out_of_order(data: Path, change: str) -> None:
    name = "train/train-000000.idx"
    lines = (data / name).read_text().splitlines()
    if change == "swap":
        lines[1], lines[2] = lines[2], lines[1]
    elif change == "double":
        lines[2] = lines[1]
    elif change == "drop":
        del lines[2]
    elif change == "space":
        lines[1] = lines[1].replace(" ", "  ", 1)
    else:
        lines[1] = lines[1].replace("cls", "c\x1bs" if change == "name" else "cl\u00e9", 1)
    put(data, name, ("\n".join(lines) + "\n").encode())
    with pytest.raises(DatasetError, match=r"train-000000\.idx "):
        check_files(open_split(data, "train"))
    with pytest.raises(DatasetError, match=r"train-000000\.idx "):
        TrainingLoader(data, CONFIG, batch_size=2, seed=0)


def packed(arrays: dict[str, np.ndarray], *, pack: bool) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if pack else np.savez)(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arrays: {**arrays, "bomb": np.zeros(10**6)}, "it holds 'bomb.npy'"),
        (lambda arrays: {**arrays, "mean_image": np.zeros((999, 999, 3))}, "mean_image has 23,952,152 bytes"),
        (lambda arrays: {**arrays, "mean": arrays["mean"] * np.nan}, "mean has values outside 0 to 255"),
        (lambda arrays: {**arrays, "eigenvectors": arrays["eigenvectors"] * 9}, "eigenvectors has values"),
        (lambda arrays: {**arrays, "covariance": -arrays["covariance"]}, "a variance below 0"),
        (lambda arrays: {**arrays, "mean": arrays["mean"].astype("<i8")}, "no array of shape"),
        (lambda arrays: {**arrays, "num_pixels": np.int64(0)}, "num_pixels is 0"),
        (lambda arrays: {name: arrays[name] for name in arrays if name != "mean"}, "it has no mean"),
    ],
)
def test_statistics_are_what_images_can_have(data: Path, change: Callable[[Any], Any], said: str) -> None:
    arrays = dict(np.load(data / STATISTICS_NAME))
    put(data, STATISTICS_NAME, packed(change(arrays), pack=False))
    with pytest.raises(DatasetError, match=said):
        ImageReader(data, CONFIG)
    put(data, STATISTICS_NAME, packed(arrays, pack=True))
    with pytest.raises(DatasetError, match="is packed or encrypted"):
        ImageReader(data, CONFIG)


@pytest.mark.parametrize(
    "name", ["manifest.json", "statistics.npz", "train/train-000000.tar", "train/train-000000.idx"]
)
@pytest.mark.parametrize("target", ["outside", "/dev/zero", "pipe"])
def test_links_and_pipes_in_a_data_set_are_neither_followed_nor_waited_for(
    data: Path, tmp_path: Path, name: str, target: str
) -> None:
    moved = tmp_path / "moved"
    (data / name).rename(moved)
    if target == "pipe":
        os.mkfifo(data / name)
    else:
        (data / name).symlink_to(moved if target == "outside" else target)
    with pytest.raises(DatasetError):
        EvaluationLoader(data, CONFIG, batch_size=4, split="train")
    assert run_main("verify", data) == 2


def test_a_folder_of_a_data_set_that_is_a_link_is_refused_where_it_would_be_written(tmp_path: Path) -> None:
    """A stranger's data set that was begun: prepare sweeps and writes below it."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("as it was")
    for link in (".work/tmp", ".work/records", "train"):
        output = tmp_path / link.replace("/", "-")
        (output / ".work").mkdir(parents=True)
        (output / link).symlink_to(precious)
        before = tree(precious)
        images = preparing.make_images(tmp_path / "images", count=6)
        with pytest.MonkeyPatch.context() as patch:
            status = preparing.prepare_here(
                patch, "--source", "folder", "--input", images, "--output", output, *preparing.KEEP
            )
        assert status == 2 and tree(precious) == before, link


@pytest.mark.parametrize(
    "address",
    [
        "simplecache::memory://set",
        "file::memory://set",
        "zip://a.zip::memory://set",
        "reference://x",
        "github://a:b@c/d",
    ],
)
def test_only_listed_protocols_are_opened(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DatasetError, match=r"opened only where TWOTOWER_SCHEMES="):
        staging.stage(address, tmp_path)
    for option in ("--input", "--output"):
        other = {"--input": "--output", "--output": "--input"}[option]
        assert run_main("prepare", "--source", "webdataset", option, address, other, tmp_path / "x") == 2
        assert "opened only where TWOTOWER_SCHEMES=" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    monkeypatch.setenv("TWOTOWER_SCHEMES", "simplecache")
    if address.startswith("simplecache"):
        fsspec.filesystem("memory").pipe_file("/set/manifest.json", b"{}")
        with pytest.raises(DatasetError, match="is damaged"):
            staging.stage(address, tmp_path)
        fsspec.filesystem("memory").rm("/set", recursive=True)


def test_an_address_that_a_run_names_is_not_fetched(data: Path) -> None:
    """Only ``stage``, which --data calls, does."""
    fsspec.filesystem("memory").put(str(data), "/named", recursive=True)
    for open_it in (
        lambda: ImageReader(Path("memory://named"), CONFIG),
        lambda: EvaluationLoader(Path("memory://named"), CONFIG, batch_size=2),
    ):
        with pytest.raises(DatasetError, match="is an address, and one is fetched only where --data names it"):
            open_it()
    fsspec.filesystem("memory").rm("/named", recursive=True)


def test_a_server_that_sends_without_end_is_not_listened_to(data: Path, tmp_path: Path) -> None:
    tar = data / "train/train-000000.tar"
    tar.write_bytes(tar.read_bytes() + bytes(10**7))
    with pytest.raises(DatasetError, match=r"is not the file that its manifest records"):
        staging.stage(f"file://{data}", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_no_room_for_a_data_set_is_said_before_it_is_fetched(data: Path, tmp_path: Path) -> None:
    forge(data, lambda raw: first_shard(raw).update(size_bytes=2**50))
    with pytest.raises(DatasetError, match=r"needs 1,125,899\.9 GB and .* TWOTOWER_CACHE"):
        staging.stage(f"file://{data}", tmp_path / "cache")


SIZES = (b"-0000001000\0", b"-1\0", b"+7\0", b"0_1\0", b"0o7\0", b"\xff" * 12, b"\xff" * 8 + b"\x00\x00\x02\x00")


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_leads_back_is_refused_by_all_who_read_tars(
    size: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tar(tmp_path / "in/a.tar", sample("a"))
    content = bytearray(path.read_bytes())
    content[124:136] = size.ljust(12, b"\0")
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    with pytest.raises(SourceError, match="damaged header at byte 0"):
        list(walk_file(path))
    assert run_main("reindex", tmp_path / "in") == 2
    assert run_main("prepare", "--source", "webdataset", "--input", path.parent, "--output", tmp_path / "o") == 2
    assert capsys.readouterr().err.count("damaged header at byte 0") == 2


def pax_tar(path: Path, records: bytes) -> Path:
    """A tar whose first member has such a PAX record."""
    size = len(records)
    head = bytearray(write_tar(path, [("x", records)]).read_bytes())
    head[156:157] = b"x"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head[:512])
    path.write_bytes(bytes(head[: 512 + size + -size % 512]) + bytes(1024))
    return path


def test_pax_records_that_are_many_or_long_cost_nothing(tmp_path: Path) -> None:
    """A record for each four bytes took minutes; a length of a million digits was a traceback."""
    for records in (b"4 =\n" * 2**18, b"9" * 2**20, b"29 size=" + b"9" * 20 + b"\n", b"25 GNU.sparse.realsize=1\n"):
        with pytest.raises(SourceError, match="sparse") if b"sparse" in records else contextlib.nullcontext():
            list(walk_file(pax_tar(tmp_path / "a.tar", records)))


def test_exabytes_behind_the_end_of_a_tar_are_not_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample("a"))
    os.truncate(path, 2 * MOST_REST)  # a hole in the file
    with pytest.raises(SourceError, match="bytes behind the end of the tar"):
        list(walk_file(path))


@pytest.mark.parametrize(
    ("source", "name"), [("mnist", "train-images-idx3-ubyte.gz"), ("cifar10", "cifar-10-binary.tar.gz")]
)
def test_what_unpacks_to_gigabytes_is_refused(
    source: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("idx", "cifar10"):
        monkeypatch.setattr(f"pipeline.sources.{module}.MOST_BYTES", 2**20)
    monkeypatch.setattr("pipeline.sources.tar_reader.MOST_UNPACKED", 2**20)
    bomb = bytes([0, 0, 8, 3]) + bytes(2**22)
    if source == "cifar10":
        bomb = write_tar(tmp_path / "b.tar", [("x/test_batch.bin", bytes(2**22))]).read_bytes()
    for stem in (name, "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / stem).write_bytes(gzip.compress(bomb))
    assert run_main("prepare", "--source", source, "--input", tmp_path / "in", "--output", tmp_path / "o") == 2
    assert "unpacks to more than 1,048,576 bytes" in capsys.readouterr().err


def png_of(width: int, height: int, bits: int, color: int) -> bytes:
    """A PNG of zeros."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    channels = {0: 1, 2: 3, 6: 4}[color]
    rows = zlib.compress((b"\0" + bytes(width * channels * bits // 8)) * height, 9)
    head = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


SMALL = ImageSettings(resize_px=None, encoding="png", max_pixels=10_000, max_bytes=2**20)


def test_a_jpeg_of_hundreds_of_scans_is_left_out_with_a_reason() -> None:
    usual = saved(photo(80, 100), "JPEG", progressive=True)
    assert decode(usual, SMALL).pixels.shape == (80, 100, 3)
    start = usual.rfind(b"\xff\xda")
    bomb = usual[:-2] + usual[start:-2] * 500 + b"\xff\xd9"
    for _ in range(2):
        with pytest.raises(ImageError, match=r"^510 scans of 100x80: --max-pixels 10,000 allows 25$"):
            decode(bomb, SMALL)
    film = usual + b"\xff\xda" * 1000  # a phone's film behind the picture is no scan of it
    assert decode(film, SMALL).pixels.shape == (80, 100, 3)


def test_a_picture_that_takes_more_memory_than_a_worker_declares_is_left_out_with_a_reason() -> None:
    assert decode(png_of(100, 100, 16, 6), SMALL).pixels.shape == (100, 100, 3)
    with pytest.raises(ImageError, match=r"200x100 is more than --max-pixels 10,000"):
        decode(png_of(200, 100, 8, 0), SMALL)
    webp = saved(photo(100, 100), "WEBP")
    with pytest.raises(ImageError, match=r"^100x100 WebP takes 18 bytes a pixel to decode, in all .* allows"):
        decode(webp, SMALL)
    assert decode(webp, dataclasses.replace(SMALL, max_pixels=18_000)).pixels.shape == (100, 100, 3)


@pytest.mark.parametrize(("side", "larger"), [(16, False), (17, True)])
def test_verify_tells_a_stored_picture_that_is_larger_than_the_manifest_says(
    data: Path, side: int, larger: bool
) -> None:
    """The loader's decoder would decode it before anyone can tell."""
    manifest = read_manifest(data)
    for form in ("JPEG", "PNG"):
        assert is_larger(saved(photo(side, side), form), manifest) == larger
    assert not is_larger(b"no picture", manifest)


def test_a_picture_is_the_same_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (png_of(64, 50, 16, 0), saved(photo(50, 64), "PNG"), saved(photo(50, 64), "TIFF")):
        whole = decode(data, SMALL).pixels
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.preparation.decode.STRIP_PIXELS", 640)
            assert np.array_equal(decode(data, SMALL).pixels, whole)


def test_names_on_screens_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders, files and classes whose names hold newlines, escapes, bells and marks of direction."""
    names = ("a\nerror: forged", "b\x1b[2J\x07", "c\u202egpj", "d\u200b", "e\x9b31m")
    for number, name in enumerate(names):
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        for copy in range(4):
            (folder / f"{name}{copy}.png").write_bytes(saved(photo(20, 20, seed=number), "PNG"))
        (folder / f"{name}.jpg").write_bytes(b"no picture")
        (folder / f"{name}.txt").write_bytes(b"x")
    (tmp_path / "in" / names[0] / "locked").symlink_to("/")
    arguments = ("--source", "folder", "--input", tmp_path / "in", "--output", tmp_path / "out", *preparing.KEEP)
    assert preparing.prepare_here(monkeypatch, *arguments, "--val-fraction", 0.4) == 3
    key = next(iter(open_keys(tmp_path / "out")))
    for words in (["inspect"], ["inspect", "--json"], ["inspect", "--sample", key], ["status"], ["verify"]):
        assert run_main(words[0], tmp_path / "out", *words[1:]) == 0, words
    captured = capsys.readouterr()
    lines = (captured.out + captured.err).splitlines()
    assert all(one_line(line) == line for line in lines), [line for line in lines if one_line(line) != line]
    assert not any(line.startswith("error: forged") for line in lines)
    assert sum(r"a\nerror: forged" in line for line in lines) > 2


def open_keys(folder: Path) -> list[str]:
    """Keys of the training split."""
    index = (folder / "train/train-000000.idx").read_text().splitlines()[1:]
    return [line.split(" ")[3].partition(".")[0] for line in index]
