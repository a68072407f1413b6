"""Source ``imagenet``: ILSVRC-2012 as people have it, found by what lies in the input folder.

- the official archives as they are: the outer train tar with its 1,000 inner tars, the flat val tar, the devkit,
  read in place, by offset: the 150 GB extraction never happens;
- extracted: ``train/WNID/*``, and ``val/WNID/*`` or a flat ``val/*`` with the devkit or Kaggle's label file;
- Kaggle's ``Data/CLS-LOC/{train,val}`` with ``LOC_val_solution.csv`` and ``LOC_synset_mapping.txt``.
"""

import csv
import dataclasses
import io
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, SourceError
from pipeline.files import AnyPath, UrlPath, read_range, scan
from pipeline.manifest import ClassRecord
from pipeline.sources.folder import read_file
from pipeline.sources.listing import Item, Listing, Source, SplitListing
from pipeline.sources.tar_reader import TarMember, range_reader, read_compressed, walk_file, walk_tar

TRAIN_NAME = "ILSVRC2012_img_train.tar"
VAL_NAME = "ILSVRC2012_img_val.tar"
DEVKIT_NAME = "ILSVRC2012_devkit_t12.tar.gz"
META_NAME = "data/meta.mat"
TRUTH_NAME = "data/ILSVRC2012_validation_ground_truth.txt"
DEVKIT_FOLDERS = ("ILSVRC2012_devkit_t12", "devkit", ".")
MD5 = {
    TRAIN_NAME: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_NAME: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT_NAME: "fa75699e90414af021442c21a62c3abf",
}
WORDNET_ID = re.compile(r"n\d{8}")
SCAN_THREADS = 8  # headers are 100 kB apart: the disk's latency decides, not the CPU
URL_THREADS = 64  # the same for a store, which answers later
KAGGLE_FOLDERS = ("", "ILSVRC")


@dataclasses.dataclass(frozen=True)
class Devkit:
    """What ILSVRC-2012's development kit tells.

    Attributes:
        wordnet_ids: the classes in ILSVRC order: row i has ILSVRC id i + 1.
        titles: their names, in the same order.
        val_ids: ILSVRC id of the i-th validation image in the order of names.
    """

    wordnet_ids: tuple[str, ...]
    titles: tuple[str, ...]
    val_ids: tuple[int, ...]


class _Found(NamedTuple):
    """An image before the class table is known.

    Attributes:
        wordnet_id: its class; empty for a flat val image, whose class comes from a label file.
        name: the source's own name of it.
        file: path of the file that holds it, relative to the input.
        offset: byte where it starts there.
        size: bytes.
    """

    wordnet_id: str
    name: str
    file: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class ImagenetSource(Source):
    """ILSVRC-2012.

    Attributes:
        root: the input folder.
        label_order: ``alphabetical`` (by WordNet id, as torchvision, timm and the Hub) or ``ilsvrc`` (the devkit's).
    """

    root: AnyPath
    label_order: str

    def listing(self) -> Listing:
        """Lists train and val, whichever are there."""
        if not self.root.is_dir():
            raise SourceError(f"--input {self.root}: no such folder")
        devkit = find_devkit(self.root)
        found = {"train": self._train(), "val": self._val()}
        if not found["train"] and not found["val"]:
            raise SourceError(
                f"{self.root}: no ILSVRC-2012 here; expected {TRAIN_NAME}, {VAL_NAME} and {DEVKIT_NAME}, or "
                "train/WNID/*.JPEG and val/, or Data/CLS-LOC/"
            )
        found["val"] = self._with_val_labels(found["val"], devkit)
        present = {image.wordnet_id for images in found.values() for image in images}
        classes = self._classes(present, devkit)
        label_of = {record.name: label for label, record in enumerate(classes)}
        unknown = sorted(present - label_of.keys())
        if unknown:
            raise SourceError(f"{self.root}: class {unknown[0]} is not one of the devkit's {len(classes)}")
        splits = {}
        for split, images in found.items():
            images.sort(key=lambda image: os.fsencode(image.name))
            items = [Item(p.name, label_of[p.wordnet_id], p.file, p.offset, p.size) for p in images]
            if items:
                splits[split] = SplitListing.of(items)
        return Listing(classes, self.label_order, splits, encoded=True, channels=3)

    def read(self, item: Item) -> bytes:
        """The image's bytes, from the archive or the file."""
        if item.file.endswith(".tar"):
            return read_range(self.root / item.file, item.offset, item.size)
        return read_file(self.root, item.file)

    def checksums(self) -> dict[AnyPath, str]:
        """The official md5 of every archive that is there."""
        found = {self.root / name: md5 for name, md5 in MD5.items() if (self.root / name).is_file()}
        if not found:
            raise SourceError(f"{self.root}: none of the official archives is here, so there is nothing to verify")
        return found

    def _train(self) -> list[_Found]:
        if (self.root / TRAIN_NAME).is_file():
            return _outer_tar(self.root / TRAIN_NAME)
        return _class_folders(self.root, self._folder("train"))

    def _val(self) -> list[_Found]:
        if (self.root / VAL_NAME).is_file():
            return [_Found("", m.base, VAL_NAME, m.offset, m.size) for m in walk_file(self.root / VAL_NAME)]
        folder = self._folder("val")
        return _class_folders(self.root, folder) or _flat_folder(self.root, folder)

    def _folder(self, split: str) -> str | None:
        """The extracted folder of a split, relative to the root."""
        candidates = [split, *(f"{base}/Data/CLS-LOC/{split}".lstrip("/") for base in KAGGLE_FOLDERS)]
        return next((name for name in candidates if (self.root / name).is_dir()), None)

    def _with_val_labels(self, images: list[_Found], devkit: Devkit | None) -> list[_Found]:
        """Puts the classes to flat validation images."""
        if not images or images[0].wordnet_id:
            return images
        images = sorted(images, key=lambda image: image.name)
        kaggle = self._kaggle_file("LOC_val_solution.csv")
        if devkit is not None:
            if len(devkit.val_ids) != len(images):
                raise SourceError(
                    f"{self.root}: {len(images):,} val images, but the devkit labels {len(devkit.val_ids):,}"
                )
            names: Iterable[str] = (devkit.wordnet_ids[label - 1] for label in devkit.val_ids)
        elif kaggle is not None:
            names = _kaggle_labels(kaggle, images)
        else:
            raise SourceError(
                f"{self.root}: val is flat, so {DEVKIT_NAME} or LOC_val_solution.csv is needed for its labels"
            )
        return [image._replace(wordnet_id=name) for name, image in zip(names, images, strict=True)]

    def _classes(self, present: set[str], devkit: Devkit | None) -> tuple[ClassRecord, ...]:
        if devkit is None and self.label_order == "ilsvrc":
            raise ConfigError(f"--label-order ilsvrc needs the devkit ({DEVKIT_NAME}) in {self.root}")
        if devkit is not None:
            records = [ClassRecord(*row) for row in zip(devkit.wordnet_ids, devkit.titles, strict=True)]
        else:
            mapping = self._kaggle_file("LOC_synset_mapping.txt")
            lines = mapping.read_text(encoding="utf-8").splitlines() if mapping else []
            titles = {line[:9]: line[10:].strip() for line in lines if WORDNET_ID.match(line)}
            records = [ClassRecord(name, titles.get(name, name)) for name in sorted(present | titles.keys())]
        return tuple(records if self.label_order == "ilsvrc" else sorted(records, key=lambda record: record.name))

    def _kaggle_file(self, name: str) -> AnyPath | None:
        paths = (self.root / base / name for base in KAGGLE_FOLDERS)
        return next((path for path in paths if path.is_file()), None)


def from_options(options: PrepareOptions) -> ImagenetSource:
    """Makes the source.

    Raises:
        ConfigError: no input was given.
    """
    if options.input is None:
        raise ConfigError("--source imagenet needs --input FOLDER, with the official archives or extracted images")
    order = "alphabetical" if options.label_order == "default" else options.label_order
    return ImagenetSource(root=options.input.absolute(), label_order=order)


def find_devkit(root: AnyPath) -> Devkit | None:
    """Reads the kit below ``root``, as the archive or extracted; None if there is none.

    Raises:
        SourceError: it is there but damaged.
    """
    archive = root / DEVKIT_NAME
    if archive.is_file():
        files = read_compressed(archive, (META_NAME, TRUTH_NAME))
        return _parse_devkit(files[META_NAME], files[TRUTH_NAME], archive)
    for folder in DEVKIT_FOLDERS:
        meta, truth = root / folder / META_NAME, root / folder / TRUTH_NAME
        if meta.is_file() and truth.is_file():
            return _parse_devkit(meta.read_bytes(), truth.read_bytes(), root / folder)
    return None


def _parse_devkit(meta: bytes, truth: bytes, where: AnyPath) -> Devkit:
    import scipy.io  # only for this one small file

    try:
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        rows = sorted(
            (int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"]))
            for row in np.atleast_1d(synsets)
            if int(row["num_children"]) == 0  # the others are parents in WordNet's tree, not classes
        )
        val_ids = tuple(int(line) for line in truth.split())
    except Exception as error:  # scipy fails in many ways on damaged files
        raise SourceError(f"{where}: damaged: {type(error).__name__}: {error}") from None
    if [row[0] for row in rows] != list(range(1, len(rows) + 1)):
        raise SourceError(f"{where}: the ids of the classes in {META_NAME} are not 1..{len(rows)}")
    if any(not 1 <= label <= len(rows) for label in val_ids):
        raise SourceError(f"{where}: {TRUTH_NAME} has ids outside 1..{len(rows)}")
    return Devkit(tuple(row[1] for row in rows), tuple(row[2] for row in rows), val_ids)


def _outer_tar(path: AnyPath) -> list[_Found]:
    """Every image of the inner tars, by its place in the outer one."""
    inner = list(walk_file(path))
    for member in inner:
        if not WORDNET_ID.fullmatch(member.base.removesuffix(".tar")):
            raise SourceError(f"{path}: {member.name} is not an inner tar named by a WordNet id")
    with ThreadPoolExecutor(URL_THREADS if isinstance(path, UrlPath) else SCAN_THREADS) as pool:
        return [image for found in pool.map(lambda member: _inner_tar(path, member), inner) for image in found]


def _inner_tar(path: AnyPath, inner: TarMember) -> list[_Found]:
    name = inner.base.removesuffix(".tar")
    members = walk_tar(range_reader(path), inner.offset, inner.offset + inner.size, f"{path}/{inner.name}")
    return [_Found(name, f"{name}/{m.base}", path.name, m.offset, m.size) for m in members]


def _class_folders(root: AnyPath, folder: str | None) -> list[_Found]:
    if folder is None:
        return []
    return [
        _Found(entry.name, f"{entry.name}/{image.name}", f"{folder}/{entry.name}/{image.name}", 0, image.size)
        for entry in scan(root / folder)
        if entry.kind == "directory" and WORDNET_ID.fullmatch(entry.name)
        for image in scan(root / folder / entry.name)
        if image.kind == "file"
    ]


def _flat_folder(root: AnyPath, folder: str | None) -> list[_Found]:
    if folder is None:
        return []
    entries = (entry for entry in scan(root / folder) if entry.kind == "file" and entry.name.lower().endswith(".jpeg"))
    return [_Found("", entry.name, f"{folder}/{entry.name}", 0, entry.size) for entry in entries]


def _kaggle_labels(path: AnyPath, images: list[_Found]) -> list[str]:
    table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
    label_of = {row["ImageId"]: row["PredictionString"].split()[0] for row in table}
    stems = [PurePosixPath(image.name).stem for image in images]
    missing = [image.name for image, stem in zip(images, stems, strict=True) if stem not in label_of]
    if missing:
        raise SourceError(f"{path}: no label for {missing[0]} ({len(missing):,} such images)")
    return [label_of[stem] for stem in stems]
