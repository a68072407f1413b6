"""Source ``imagenet``: ILSVRC-2012 as people have it, found by what lies in the input folder.

- the official archives as they are: the outer train tar with its 1,000 inner tars, the flat val tar, the devkit,
  read in place, by offset: the 150 GB extraction never happens;
- extracted: ``train/WNID/*``, and ``val/WNID/*`` or a flat ``val/*`` with the devkit or Kaggle's label file;
- Kaggle's ``Data/CLS-LOC/{train,val}`` with ``LOC_val_solution.csv`` and ``LOC_synset_mapping.txt``.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, SourceError
from pipeline.files import AnyPath, UrlPath, read_range, scan
from pipeline.manifest import ClassRecord
from pipeline.pictures import HEAD_BYTES, has_picture_head, has_picture_name
from pipeline.sources import reasons
from pipeline.sources.devkit import DEVKIT_NAME, Devkit, find_devkit, read_table
from pipeline.sources.folder import read_file
from pipeline.sources.labels import read_labels
from pipeline.sources.listing import Item, Listing, Source, SplitListing, Tally
from pipeline.sources.split import split_of
from pipeline.sources.tar_reader import (
    COMPRESSED_NAME,
    TarMember,
    is_hidden,
    range_reader,
    refuse_two,
    walk_file,
    walk_tar,
)
from pipeline.sources.walk import Walker, check_link, join, pass_over_unread

TRAIN_NAME = "ILSVRC2012_img_train.tar"
VAL_NAME = "ILSVRC2012_img_val.tar"
MD5 = {
    TRAIN_NAME: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_NAME: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT_NAME: "fa75699e90414af021442c21a62c3abf",
}
VAL_LABELS = "LOC_val_solution.csv"
TITLES = "LOC_synset_mapping.txt"
WORDNET_ID = re.compile(r"n\d{8}")
SCAN_THREADS = 8  # headers are 100 kB apart: the disk's latency decides, not the CPU
URL_THREADS = 64  # the same for a store, which answers later
KAGGLE_FOLDERS = ("", "ILSVRC")
PERHAPS_FOLDERS = 20  # looked into for a message
SPLIT_PLACES = ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")


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
        splits: the splits that are wanted; empty for all.
        follow_links: links that lead out of the folder are followed.
    """

    root: AnyPath
    label_order: str
    splits: tuple[str, ...] = ()
    follow_links: bool = False

    def listing(self) -> Listing:
        """Lists train and val, whichever are there, and counts the other files."""
        if not self.root.is_dir():
            raise SourceError(f"--input {self.root}: no such folder")
        devkit = find_devkit(self.root)
        walker = Walker(self.root, Tally(), follow_links=self.follow_links)
        places = {split: place for split in ("train", "val") if (place := self._place(split)) is not None}
        for name in (*places.values(), *(devkit.files if devkit else ())):
            check_link(self.root, name, follow_links=self.follow_links)
        if not places:
            raise SourceError(
                f"{self.root}: no ILSVRC-2012 here; expected {TRAIN_NAME}, {VAL_NAME} and {DEVKIT_NAME}, or "
                f"train/WNID/*.JPEG and val/, or Data/CLS-LOC/{self._perhaps()}"
            )
        found = {split: self._images(walker, split, place) for split, place in places.items()}
        if "val" in found:
            found["val"] = self._with_val_labels(walker, found["val"], devkit)
        tables = [name for name in (self._kaggle_file(VAL_LABELS), self._kaggle_file(TITLES)) if name]
        pass_over_unread(walker, [*places.values(), *tables, *(devkit.files if devkit else ())])
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
        return Listing(
            classes,
            self.label_order,
            splits,
            encoded=True,
            channels=3,
            passed_over=walker.tally.records(),
            warnings=walker.warnings,
        )

    def read(self, item: Item) -> bytes:
        """The image's bytes, from the archive or the file."""
        if item.file.endswith(".tar"):
            return read_range(self.root / item.file, item.offset, item.size)
        return read_file(self.root, item)

    def checksums(self) -> dict[AnyPath, str]:
        """The official md5 of every archive that is there."""
        found = {self.root / name: md5 for name, md5 in MD5.items() if (self.root / name).is_file()}
        if not found:
            raise SourceError(f"{self.root}: none of the official archives is here, so there is nothing to verify")
        return found

    def _place(self, split: str) -> str | None:
        """The archive or folder of a split, relative to the root.

        Raises:
            SourceError: two folders are it, or it is a compressed archive.
        """
        archive = {"train": TRAIN_NAME, "val": VAL_NAME}[split]
        if (self.root / archive).is_file():
            return archive
        for entry in scan(self.root):
            if entry.name.startswith(archive[:-4]) and COMPRESSED_NAME.fullmatch(entry.name):
                raise SourceError(
                    f"{self.root / entry.name}: is compressed, and archives are read in place: unpack it to {archive}"
                )
        for place in SPLIT_PLACES:
            if not (self.root / place).is_dir():
                continue
            entries = scan(self.root / place)
            names = sorted(e.name for e in entries if e.kind == "directory" and split_of(e.name) == split)
            if len(names) > 1:
                raise SourceError(f"{self.root / place}: both {names[0]}/ and {names[1]}/ are there; keep one of them")
            if names:
                return join(place, names[0])
        return None

    def _perhaps(self) -> str:
        """Where it may be instead."""
        folders = [entry for entry in scan(self.root) if entry.kind == "directory" and not entry.hidden]
        if any(WORDNET_ID.fullmatch(entry.name) for entry in folders):
            return (
                f"; class folders lie directly in it: --source folder, or --input of the folder above {self.root.name}/"
            )
        for entry in folders[:PERHAPS_FOLDERS]:
            if not entry.linked:
                below = dataclasses.replace(self, root=self.root / entry.name)
                if below._place("train") or below._place("val"):
                    return f"; {entry.name}/ looks like it: --input {below.root}"
        return ""

    def _images(self, walker: Walker, split: str, place: str) -> list[_Found]:
        """The images of an archive or a folder.

        Raises:
            SourceError: there is none.
        """
        if place == TRAIN_NAME:
            found = _outer_tar(self.root / place, walker.tally)
        elif place == VAL_NAME:
            members = _pictures(self.root / place, walk_file(self.root / place), walker.tally, split)
            found = [_Found("", m.base, VAL_NAME, m.offset, m.size) for m in members]
        else:
            found = _in_folder(walker, place, split)
        if not found and self._is_wanted(split):
            raise SourceError(
                f"{self.root / place}: holds no picture of {split}; expected WNID/*.JPEG"
                f"{' or *.JPEG' if split == 'val' else ''}; fill it, remove it, or leave the split out with --splits"
            )
        return found

    def _is_wanted(self, split: str) -> bool:
        return not self.splits or split in self.splits

    def _with_val_labels(self, walker: Walker, images: list[_Found], devkit: Devkit | None) -> list[_Found]:
        """Puts the classes to flat validation images."""
        if not images or images[0].wordnet_id:
            return images
        images = sorted(images, key=lambda image: image.name)
        kaggle = self._kaggle_file(VAL_LABELS)
        if devkit is None and kaggle is None and not self._is_wanted("val"):
            walker.tally.add(reasons.NOT_CHOSEN, images[0].name, split="val", count=len(images))
            return []
        if devkit is not None:
            if len(devkit.val_ids) != len(images):
                raise SourceError(
                    f"{self.root}: {len(images):,} val images, but the devkit labels {len(devkit.val_ids):,}"
                )
            names: Iterable[str] = (devkit.wordnet_ids[label - 1] for label in devkit.val_ids)
        elif kaggle is not None:
            names = _kaggle_labels(self.root / kaggle, images, walker.tally)
        else:
            raise SourceError(f"{self.root}: val is flat, so {DEVKIT_NAME} or {VAL_LABELS} is needed for its labels")
        return [image._replace(wordnet_id=name) for name, image in zip(names, images, strict=True)]

    def _classes(self, present: set[str], devkit: Devkit | None) -> tuple[ClassRecord, ...]:
        if devkit is None and self.label_order == "ilsvrc":
            raise ConfigError(f"--label-order ilsvrc needs the devkit ({DEVKIT_NAME}) in {self.root}")
        if devkit is not None:
            records = [ClassRecord(*row) for row in zip(devkit.wordnet_ids, devkit.titles, strict=True)]
        else:
            mapping = self._kaggle_file(TITLES)
            lines = read_table(self.root / mapping).decode("utf-8", "replace").splitlines() if mapping else []
            titles = {line[:9]: line[10:].strip() for line in lines if WORDNET_ID.match(line)}
            records = [ClassRecord(name, titles.get(name, name)) for name in sorted(present | titles.keys())]
        return tuple(records if self.label_order == "ilsvrc" else sorted(records, key=lambda record: record.name))

    def _kaggle_file(self, name: str) -> str | None:
        """Path of one of Kaggle's tables, relative to the root."""
        paths = (join(base, name) for base in KAGGLE_FOLDERS)
        found = next((path for path in paths if (self.root / path).is_file()), None)
        if found is not None:
            check_link(self.root, found, follow_links=self.follow_links)
        return found


def from_options(options: PrepareOptions) -> ImagenetSource:
    """Makes the source.

    Raises:
        ConfigError: no input was given.
    """
    if options.input is None:
        raise ConfigError("--source imagenet needs --input FOLDER, with the official archives or extracted images")
    order = "alphabetical" if options.label_order == "default" else options.label_order
    return ImagenetSource(options.input.absolute(), order, options.splits, options.follow_links)


def _outer_tar(path: AnyPath, tally: Tally) -> list[_Found]:
    """Every image of the inner tars, by its place in the outer one."""
    inner = [member for member in walk_file(path) if not _is_hidden(path, member, tally, "train")]
    seen: dict[str, TarMember] = {}
    for member in inner:
        if not WORDNET_ID.fullmatch(member.base.removesuffix(".tar")):
            raise SourceError(f"{path}: {member.name} is not an inner tar named by a WordNet id")
        refuse_two(path, seen.setdefault(member.base, member), member)

    def members(member: TarMember) -> list[TarMember]:
        end = member.offset + member.size
        return list(walk_tar(range_reader(path), member.offset, end, f"{path}/{member.name}"))

    with ThreadPoolExecutor(URL_THREADS if isinstance(path, UrlPath) else SCAN_THREADS) as pool:
        return [
            _Found(name, f"{name}/{image.base}", path.name, image.offset, image.size)
            for member, found in zip(inner, pool.map(members, inner), strict=True)
            for name in [member.base.removesuffix(".tar")]
            for image in _pictures(path, found, tally, "train")
        ]


def _pictures(path: AnyPath, members: Iterable[TarMember], tally: Tally, split: str) -> Iterator[TarMember]:
    """The members of an archive that are pictures; the others are counted."""
    seen: dict[str, TarMember] = {}
    for member in members:
        if _is_hidden(path, member, tally, split):
            continue
        if has_picture_name(member.base) or has_picture_head(
            read_range(path, member.offset, min(HEAD_BYTES, member.size))
        ):
            refuse_two(path, seen.setdefault(member.base.casefold(), member), member)
            yield member
        else:
            tally.add(reasons.NO_PICTURE, f"{path.name}/{member.base}", split=split)


def _is_hidden(path: AnyPath, member: TarMember, tally: Tally, split: str) -> bool:
    if is_hidden(member.name):
        tally.add(reasons.HIDDEN, f"{path.name}/{member.base}", split=split)
        return True
    return False


def _in_folder(walker: Walker, folder: str, split: str) -> list[_Found]:
    """The pictures of class folders, or of val itself where it has none; the other files are counted."""
    inside = walker.contents(folder, split)
    classes = [entry for entry in inside.folders if WORDNET_ID.fullmatch(entry.name)]
    others = [entry for entry in inside.folders if not WORDNET_ID.fullmatch(entry.name)]
    walker.pass_over(folder, others, reasons.IGNORED_FOLDER, split)
    if not classes and split == "val":
        pictures = walker.pictures_of(folder, inside.files, split)
        return [_Found("", path.removeprefix(f"{folder}/"), path, 0, size) for path, size in pictures]
    walker.pass_over(folder, inside.files, reasons.BESIDE, split)
    return [
        _Found(entry.name, path.removeprefix(f"{folder}/"), path, 0, size)
        for entry in classes
        for path, size in walker.pictures(join(folder, entry.name), split)
    ]


def _kaggle_labels(path: AnyPath, images: list[_Found], tally: Tally) -> list[str]:
    labels = read_labels(path, (image.name for image in images))
    missing = [image.name for image in images if image.name not in labels.label_of]
    if missing:
        raise SourceError(f"{path}: no label for {missing[0]} ({len(missing):,} such images)")
    for name in labels.unused:
        tally.add(reasons.NO_IMAGE, name, split="val")
    return [labels.label_of[image.name] for image in images]
