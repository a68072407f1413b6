"""A folder of raw images where a data set is wanted: the message has the command that prepares it, and it works."""

import shlex
from pathlib import Path

import pytest

from pipeline.__main__ import make_parser
from pipeline.errors import DatasetError
from pipeline.manifest import read_manifest
from pipeline.raw_images import advice

JPEG, PNG = b"\xff\xd8\xff\xe0....", b"\x89PNG\r\n\x1a\n...."


def make(folder: Path, *names: str, content: bytes = JPEG) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("names", "content", "source"),
    [
        (("cat/1.jpg", "dog/2.jpg"), JPEG, "folder"),
        (("cat/no-suffix", "README"), PNG, "folder"),
        (("train/cat/1.jpg", "val/cat/2.jpg"), PNG, "folder"),
        (("cat/.hidden", "cat/1.jpg", ".git/x"), JPEG, "folder"),
        (("ILSVRC2012_img_train.tar",), b"", "imagenet"),
        (("ILSVRC/Data/x",), b"", "imagenet"),
        (("cifar-10-batches-py/data_batch_1",), b"", "cifar10"),
        (("data_batch_1.bin",), b"", "cifar10"),
        (("train-images-idx3-ubyte.gz",), b"", "mnist"),
        (("a-000000.tar", "a-000001.tar"), b"", "webdataset"),
    ],
)
def test_the_command_for_it(names, content, source, tmp_path):
    raw = make(tmp_path / "my photos", *names, content=content)
    with pytest.raises(DatasetError, match=f"{raw} is no prepared data set: ") as refused:
        read_manifest(raw)
    assert "\n" not in str(refused.value)
    words = shlex.split(str(refused.value).partition("python -m pipeline ")[2])
    options = make_parser().parse_args(words)
    assert (options.source, options.input, Path(options.output)) == (source, raw, tmp_path / "my photos-prepared")


def test_images_without_folders_and_what_is_nothing(tmp_path):
    assert "a folder of its own" in advice(make(tmp_path / "flat", "1.jpg", "2.png"))
    assert advice(make(tmp_path / "text", "a/b.txt", content=b"text")) == ""
    assert advice(tmp_path / "nothing") == advice(make(tmp_path, "file") / "file") == ""


def test_a_data_set_that_is_being_made_is_not_taken_for_raw_images(tmp_path):
    make(tmp_path, ".work/lock", "train/train-000000.tar", "cat/1.jpg")
    with pytest.raises(DatasetError, match="preparing it never ended"):
        read_manifest(tmp_path)
