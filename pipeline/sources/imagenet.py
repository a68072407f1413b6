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
from pathlib import Path

import numpy as np

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, SourceError
from pipeline.files import Place, UrlPath
from pipeline.manifest import ClassRecord
from pipeline.sources import Item, Listing, SplitListing
from pipeline.sources.devkit import ARCHIVE_NAME, Devkit, find_devkit
from pipeline.sources.folder import read_file, scan
from pipeline.sources.tar_reader import ArchiveMember, read_range, reader, walk_tar

TRAIN_NAME = "ILSVRC2012_img_train.tar"
VAL_NAME = "ILSVRC2012_img_val.tar"
MD5 = {
    TRAIN_NAME: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_NAME: "29b22e2961454d5413ddabcf34fc5622",
    ARCHIVE_NAME: "fa75699e90414af021442c21a62c3abf",
}
WORDNET_ID = re.compile(r"n\d{8}")
SCAN_THREADS = 8  # headers are 100 kB apart: the disk's latency decides, not the CPU
URL_THREADS = 64  # the same for a store, which answers later
KAGGLE_FOLDERS = ("", "ILSVRC")

Row = tuple[str, str, str, int, int]  # WordNet id ("" = by position), name, file, offset, size


@dataclasses.dataclass(frozen=True)
class ImagenetSource:
    """ILSVRC-2012.

    Attributes:
        root: the input folder.
        label_order: ``alphabetical`` (by WordNet id, as torchvision, timm and the Hub) or ``ilsvrc`` (the devkit's).
    """

    root: Place
    label_order: str

    def listing(self) -> Listing:
        """Lists train and val, whichever are there."""
        if not self.root.is_dir():
            raise SourceError(f"--input {self.root}: no such folder")
        devkit = find_devkit(self.root)
        rows = {"train": self._train(), "val": self._val()}
        if not rows["train"] and not rows["val"]:
            raise SourceError(
                f"{self.root}: no ILSVRC-2012 here; expected {TRAIN_NAME}, {VAL_NAME} and {ARCHIVE_NAME}, or "
                "train/WNID/*.JPEG and val/, or Data/CLS-LOC/"
            )
        rows["val"] = self._with_val_labels(rows["val"], devkit)
        present = {row[0] for split in rows.values() for row in split}
        classes = self._classes(present, devkit)
        label_of = {record.name: label for label, record in enumerate(classes)}
        unknown = sorted(present - label_of.keys())
        if unknown:
            raise SourceError(f"{self.root}: class {unknown[0]} is not one of the devkit's {len(classes)}")
        return Listing(
            classes=classes,
            label_order=self.label_order,
            splits={split: _listing(found, label_of) for split, found in rows.items() if found},
            encoded=True,
            channels=3,
        )

    def read(self, item: Item) -> bytes:
        """The picture's bytes, from the archive or the file."""
        if item.file.endswith(".tar"):
            return read_range(self.root / item.file, item.offset, item.size)
        return read_file(self.root, item.file)

    def checksums(self) -> dict[Place, str]:
        """The official md5 of every archive that is there."""
        found = {self.root / name: md5 for name, md5 in MD5.items() if (self.root / name).is_file()}
        if not found:
            raise SourceError(f"{self.root}: none of the official archives is here, so there is nothing to verify")
        return found

    def _train(self) -> list[Row]:
        if (self.root / TRAIN_NAME).is_file():
            return _outer_tar(self.root / TRAIN_NAME)
        return _class_folders(self.root, self._folder("train"))

    def _val(self) -> list[Row]:
        if (self.root / VAL_NAME).is_file():
            path = self.root / VAL_NAME
            members = walk_tar(reader(path), 0, path.stat().st_size, str(path))
            return [("", _base(member.name), VAL_NAME, member.offset, member.size) for member in members]
        folder = self._folder("val")
        return _class_folders(self.root, folder) or _flat_folder(self.root, folder)

    def _folder(self, split: str) -> str | None:
        """The extracted folder of a split, relative to the root."""
        candidates = [split, *(f"{base}/Data/CLS-LOC/{split}".lstrip("/") for base in KAGGLE_FOLDERS)]
        return next((name for name in candidates if (self.root / name).is_dir()), None)

    def _with_val_labels(self, rows: list[Row], devkit: Devkit | None) -> list[Row]:
        """Puts the classes to flat validation pictures."""
        if not rows or rows[0][0]:
            return rows
        rows = sorted(rows, key=lambda row: row[1])
        kaggle = self._kaggle_file("LOC_val_solution.csv")
        if devkit is not None:
            if len(devkit.val_ids) != len(rows):
                raise SourceError(
                    f"{self.root}: {len(rows):,} val pictures, but the devkit labels {len(devkit.val_ids):,}"
                )
            names: Iterable[str] = (devkit.wordnet_ids[label - 1] for label in devkit.val_ids)
        elif kaggle is not None:
            names = _kaggle_labels(kaggle, rows)
        else:
            raise SourceError(
                f"{self.root}: val is flat, so {ARCHIVE_NAME} or LOC_val_solution.csv is needed for its labels"
            )
        return [(name, *row[1:]) for name, row in zip(names, rows, strict=True)]

    def _classes(self, present: set[str], devkit: Devkit | None) -> tuple[ClassRecord, ...]:
        if devkit is None and self.label_order == "ilsvrc":
            raise ConfigError(f"--label-order ilsvrc needs the devkit ({ARCHIVE_NAME}) in {self.root}")
        if devkit is not None:
            records = [ClassRecord(*row) for row in zip(devkit.wordnet_ids, devkit.titles, strict=True)]
        else:
            mapping = self._kaggle_file("LOC_synset_mapping.txt")
            lines = mapping.read_text(encoding="utf-8").splitlines() if mapping else []
            titles = {line[:9]: line[10:].strip() for line in lines if WORDNET_ID.match(line)}
            records = [ClassRecord(name, titles.get(name, name)) for name in sorted(present | titles.keys())]
        return tuple(records if self.label_order == "ilsvrc" else sorted(records, key=lambda record: record.name))

    def _kaggle_file(self, name: str) -> Place | None:
        paths = (self.root / base / name for base in KAGGLE_FOLDERS)
        return next((path for path in paths if path.is_file()), None)


def from_options(options: PrepareOptions) -> ImagenetSource:
    """Makes the source.

    Raises:
        ConfigError: no input was given.
    """
    if options.input is None:
        raise ConfigError("--source imagenet needs --input FOLDER, with the official archives or extracted pictures")
    order = "alphabetical" if options.label_order == "default" else options.label_order
    return ImagenetSource(root=options.input.absolute(), label_order=order)


def _outer_tar(path: Place) -> list[Row]:
    """Every picture of the inner tars, by its place in the outer one."""
    inner = list(walk_tar(reader(path), 0, path.stat().st_size, str(path)))
    for member in inner:
        if not WORDNET_ID.fullmatch(_base(member.name).removesuffix(".tar")):
            raise SourceError(f"{path}: {member.name} is not an inner tar named by a WordNet id")
    with ThreadPoolExecutor(URL_THREADS if isinstance(path, UrlPath) else SCAN_THREADS) as pool:
        return [row for rows in pool.map(lambda member: _inner_tar(path, member), inner) for row in rows]


def _inner_tar(path: Place, inner: ArchiveMember) -> list[Row]:
    name = _base(inner.name).removesuffix(".tar")
    members = walk_tar(reader(path), inner.offset, inner.offset + inner.size, f"{path}/{inner.name}")
    return [(name, f"{name}/{_base(m.name)}", path.name, m.offset, m.size) for m in members]


def _class_folders(root: Place, folder: str | None) -> list[Row]:
    if folder is None:
        return []
    return [
        (entry.name, f"{entry.name}/{picture.name}", f"{folder}/{entry.name}/{picture.name}", 0, picture.stat().st_size)
        for entry in scan(root / folder)
        if entry.is_dir() and WORDNET_ID.fullmatch(entry.name)
        for picture in scan(root / folder / entry.name)
        if picture.is_file()
    ]


def _flat_folder(root: Place, folder: str | None) -> list[Row]:
    if folder is None:
        return []
    entries = (entry for entry in scan(root / folder) if entry.is_file() and entry.name.lower().endswith(".jpeg"))
    return [("", entry.name, f"{folder}/{entry.name}", 0, entry.stat().st_size) for entry in entries]


def _kaggle_labels(path: Place, rows: list[Row]) -> list[str]:
    table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
    label_of = {row["ImageId"]: row["PredictionString"].split()[0] for row in table}
    missing = [row[1] for row in rows if Path(row[1]).stem not in label_of]
    if missing:
        raise SourceError(f"{path}: no label for {missing[0]} ({len(missing):,} such pictures)")
    return [label_of[Path(row[1]).stem] for row in rows]


def _listing(rows: list[Row], label_of: dict[str, int]) -> SplitListing:
    rows = sorted(rows, key=lambda row: os.fsencode(row[1]))
    files = sorted({row[2] for row in rows})
    file_of = {name: number for number, name in enumerate(files)}
    return SplitListing(
        names=[row[1] for row in rows],
        labels=np.array([label_of[row[0]] for row in rows], np.int32),
        files=files,
        file_of=np.array([file_of[row[2]] for row in rows], np.int32),
        offsets=np.array([row[3] for row in rows], np.int64),
        sizes=np.array([row[4] for row in rows], np.int64),
    )


def _base(name: str) -> str:
    """The last part of a member's name: the rest means nothing and is not trusted."""
    return name.rsplit("/", 1)[-1]
