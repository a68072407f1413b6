"""A folder with every kind of file: stored as loader and ``predict`` see them, refused in the same words each time."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from pipeline.inspection.inspect import find_sample, open_image
from pipeline.inspection.verify import read_samples
from pipeline.loader.batches import EvaluationLoader
from pipeline.loader.config import LoaderConfig
from pipeline.loader.image_reader import ImageReader
from pipeline.manifest import read_manifest
from pipeline.preparation.image import encode
from tests.helpers import preparing
from tests.helpers.odd_images import bad_files, good_files
from tests.helpers.preparing import prepare_here, tree
from tests.helpers.tars import sample, write_tar

BAD, GOOD = bad_files(), good_files()


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    for name, (data, _) in (GOOD | BAD).items():
        path = folder / ("good" if name in GOOD else "bad") / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    (folder / "good" / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    return folder


def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path, output: Path, *words: object) -> int:
    """The exit code."""
    places = ("--source", "folder", "--input", folder, "--output", output)
    return prepare_here(monkeypatch, *places, "--val-fraction", 0, *words)


def quarantine(data: Path, action: str) -> dict[str, str]:
    lines = [json.loads(line) for line in (data / "quarantine.jsonl").read_text().splitlines()]
    return {line["source"].partition("/")[2]: line["reason"] for line in lines if line["action"] == action}


def test_every_file_is_stored_or_has_its_reason_and_what_is_odd_is_said(
    odd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        assert prepare(monkeypatch, odd_folder, tmp_path / name, "--resize", 24, "--shard-size", 16) == 3
    assert tree(tmp_path / "one") == tree(tmp_path / "two")  # the manifest, so the fingerprint, among them
    left_out = quarantine(tmp_path / "one", "left_out")
    assert left_out.pop("gone.jpg") == "cannot be read: No such file or directory"
    assert left_out == {name: reason for name, (_, reason) in BAD.items()}
    assert quarantine(tmp_path / "one", "converted") == {name: words for name, (_, words) in GOOD.items() if words}
    assert read_manifest(tmp_path / "one").num_samples == len(GOOD)


def test_no_reason_holds_an_address_an_object_or_a_path(
    odd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(monkeypatch, odd_folder, tmp_path / "data", "--resize", "none")
    for reason in [
        *quarantine(tmp_path / "data", "left_out").values(),
        *quarantine(tmp_path / "data", "converted").values(),
    ]:
        assert not re.search(r"0x|<|object at|(^|[\s'\"])/|tmp", reason), reason


@pytest.mark.slow
def test_two_runs_of_the_command_give_the_same_bytes(odd_folder: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        preparing.run(
            *("prepare", "--source", "folder", "--input", odd_folder, "--output", tmp_path / name),
            *("--resize", "none", "--workers", workers, "--shard-size", 8),
            expect=3,
        )
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    preparing.run("verify", tmp_path / "one", "--full")


@pytest.mark.parametrize("encoding", ["original", "jpeg", "png"])
def test_loader_predict_inspect_and_stored_size_agree_without_resizing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Every kind of sound file, whatever turns it: 80x60 px upright."""
    folder, data = tmp_path / "in" / "a", tmp_path / "data"
    folder.mkdir(parents=True)
    for name, (content, _) in GOOD.items():
        (folder / name).write_bytes(content)
    words = ("--resize", "none", "--encoding", encoding, "--quality", 70)
    assert prepare(monkeypatch, folder.parent, data, *words) == 0
    manifest = read_manifest(data)
    assert (manifest.image.width_px, manifest.image.height_px) == (80, 60)
    config = LoaderConfig(crop_px=60, mean="none", threads=1)
    reader = ImageReader(data, config)
    loader = EvaluationLoader(data, config, batch_size=len(GOOD), split="train")
    batch = next(iter(loader))
    sources = sources_of(data)
    assert len(batch.keys) == len(GOOD)
    for key, seen in zip(batch.keys, batch.images.numpy(), strict=True):
        pixels = reader.read(folder.parent / sources[key])
        if encoding == "jpeg":  # the one thing that a prediction leaves out: the loss of what is stored
            pixels = simplejpeg.decode_jpeg(encode(pixels, reader.settings))
        predicted = reader.images([pixels]).numpy()[0]
        assert np.abs(seen - predicted).max() <= (0 if encoding == "png" else 4), sources[key]
        shown = np.asarray(open_image(find_sample(data, manifest, key), manifest))[:, 10:-10]
        assert np.abs(seen - shown.transpose(2, 0, 1)).max() <= (0 if encoding == "png" else 4), sources[key]


def test_tars_of_others_keep_their_labels_and_every_member_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [member for number in range(6) for member in sample(f"./k{number}", 480 + number % 2, number)]
    members += [
        ("./._k0.jpg", b"Mac"),
        ("k6.jpg", b"text"),
        ("k6.cls", b"2000000"),
        ("k6.json", b"{}"),
        ("README", b""),
    ]
    write_tar(tmp_path / "in" / "a.TAR", members)
    words = ("--source", "webdataset", "--input", tmp_path / "in", "--output", tmp_path / "data", "--val-fraction", 0)
    assert prepare_here(monkeypatch, *words, "--resize", 16) == 3
    manifest = read_manifest(tmp_path / "data")
    assert [record.name for record in manifest.classes] == ["480", "481", "2000000"]
    assert (manifest.num_found, manifest.num_samples, manifest.num_left_out, manifest.num_passed_over) == (10, 6, 1, 3)
    assert sorted(sources_of(tmp_path / "data").values()) == [f"a.TAR/k{number}.jpg" for number in range(6)]
    printed = capsys.readouterr()
    assert "the labels are 3 numbers from 480 to 2,000,000: they are rows 0 to 2 of the class table" in printed.err
    assert "passed over: 1 hidden (a.TAR/._k0.jpg)" in printed.out


def sources_of(data: Path) -> dict[str, str]:
    """Key -> the source's name of each train sample."""
    found = {}
    for tar in sorted((data / "train").glob("*.tar")):
        content = tar.read_bytes()
        for stored in read_samples(tar):
            member = stored.members[-1]
            found[stored.key] = json.loads(content[member.offset : member.offset + member.size])["source"]
    return found
