"""Random input folders with every oddity that people's folders have, and the truth about each file in them."""

import dataclasses
import functools
import io
import os
import random
import socket
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.sources import reasons
from pipeline.sources.listing import nfc, printable

CLASS_NAMES = ("cat", "Dog", "a b", "e\u0301t\u00e9", "n01443537", "x.y", "\u72ac", "new\nline", "q\udce9", "b" * 250)
SPLIT_NAMES = {
    "train": ("train", "Train", "TRAINING"),
    "val": ("val", "Valid", "validation"),
    "test": ("test", "TESTING"),
}
PICTURE_NAMES = (
    "p{}.jpg",
    "p{}.JPEG",
    "P {}.png",
    "p{}",
    "p{}.txt",
    "p.{}.x.JPG",
    "\udcff{}.jpg",
    "n\n{}.jpg",
    "{}" + "l" * 240,
)
LOCKED = "locked"  # a folder that tests make unreadable, also for root


@dataclasses.dataclass
class OddTree:
    """A folder, and what prepare must find in it.

    Attributes:
        root: the input folder.
        labels: label file of its flat split, if it has one.
        classes: path relative to the root -> class, of every sound picture.
        bad: the same of pictures that cannot be used.
        passed_over: (split, reason) -> how many other files.
    """

    root: Path
    labels: Path | None = None
    classes: dict[str, str] = dataclasses.field(default_factory=dict)
    bad: dict[str, str] = dataclasses.field(default_factory=dict)
    passed_over: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)

    def num_files(self) -> int:
        """Everything on the disk that is no folder, counted without our code; a locked folder is one."""
        found = 0
        for folder, folders, files in os.walk(self.root):
            found += len(files) + sum((Path(folder) / name).is_symlink() for name in folders)
            if Path(folder).name == LOCKED:
                found += 1 - len(files)
        return found


def make_odd_tree(root: Path, seed: int) -> OddTree:
    """Makes one; the same seed makes the same."""
    rng = random.Random(seed)
    tree = OddTree(root)
    base = root / rng.choice(["", "dataset", "data/set"])
    names = rng.sample(CLASS_NAMES, rng.randint(2, 4))
    if rng.random() < 0.4:
        _add_classes(tree, rng, base, names, "")
        return tree
    _add_classes(tree, rng, base / rng.choice(SPLIT_NAMES["train"]), names, "train")
    for split in ("val", "test"):
        folder = base / rng.choice(SPLIT_NAMES[split])
        kind = rng.choice(["flat", "classes", "none"])
        if kind == "flat" and tree.labels is None:
            _add_flat(tree, rng, folder, split)
        elif kind != "none":
            _add_classes(tree, rng, folder, names, split)
    _add_beside_splits(tree, rng, base)
    return tree


def _add_classes(tree: OddTree, rng: random.Random, folder: Path, names: list[str], split: str) -> None:
    for name in names:
        place = folder / (name if rng.random() < 0.8 else _other_form(name))
        level = rng.choice(["", "", "images", "a/b"])
        for number in range(rng.randint(2, 4)):
            _add_picture(tree, rng, place / level if number else place, name, sound=rng.random() < 0.9 or number == 0)
        _add_oddities(tree, rng, place, split, name)
    for file in rng.sample(("README.md", "words.txt", "p.jpg", "list.csv"), 2):
        _write(folder / file, picture(1))
        tree.passed_over[split, reasons.BESIDE] += 1


def _other_form(name: str) -> str:
    return nfc(name)


def _add_flat(tree: OddTree, rng: random.Random, folder: Path, split: str) -> None:
    """Pictures in no class folder, with a label file of some kind that leaves one out and names one too many."""
    names = sorted(set(tree.classes.values()))
    place = folder / rng.choice(["", "images"])
    rows = []
    for number in range(rng.randint(2, 5)):
        name = rng.choice(names)
        path = place / f"v{number}.JPEG"
        _write(path, picture(rng.randrange(1000)))
        tree.classes[_relative(tree, path)] = name
        rows.append((f"v{number}.JPEG", name))
    _write(place / "unlabelled.png", picture(3))
    tree.passed_over[split, reasons.NO_LABEL] += 1
    rows.append(("gone.JPEG", names[0]))
    tree.passed_over["", reasons.NO_IMAGE] += 1
    rng.shuffle(rows)
    tree.labels = tree.root.parent / "labels.txt"
    _write(tree.labels, _table(rng, rows))


def _table(rng: random.Random, rows: list[tuple[str, str]]) -> bytes:
    if rng.random() < 0.5:
        lines = ["image,label", *(f'{name},"{label}"' for name, label in rows)]
    else:
        lines = [f'{name}\t"{label}"\t0\t0\t9\t9' for name, label in rows]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def _add_picture(tree: OddTree, rng: random.Random, folder: Path, name: str, *, sound: bool) -> None:
    number = rng.randrange(10**6)
    form = rng.choice(PICTURE_NAMES) if sound else rng.choice(PICTURE_NAMES[:2])
    path = folder / form.format(number)
    target = {False: b"no picture at all", True: picture(number % 1000)}[sound]
    if sound and rng.random() < 0.1:
        _write(tree.root.parent / "elsewhere" / str(number), target)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(tree.root.parent / "elsewhere" / str(number))
    else:
        _write(path, target)
    (tree.classes if sound else tree.bad)[_relative(tree, path)] = nfc(printable(name))


def _add_oddities(tree: OddTree, rng: random.Random, place: Path, split: str, name: str) -> None:
    """Some of everything that is no picture of a class."""

    def count(reason: str, number: int = 1) -> None:
        tree.passed_over[split, reason] += number

    def hidden() -> None:
        _write(place / "._p.jpg", picture(0))
        _write(place / ".cache/.x/a.jpg", picture(0))
        _write(place / ".cache/b", b"")
        count(reasons.HIDDEN, 3)

    def no_picture() -> None:
        for file in ("Thumbs.db", "notes.txt", "empty", "x.mp4"):
            _write(place / "deep" / file, b"" if file == "empty" else b"text")
        count(reasons.NO_PICTURE, 4)

    def links() -> None:
        place.mkdir(parents=True, exist_ok=True)
        (place / "self").symlink_to(".")
        (place / "up").symlink_to("..")
        (place / "round").symlink_to("round")
        (place / "gone").symlink_to("nowhere")
        (place / "gone.jpg").symlink_to("nowhere.jpg")
        count(reasons.LOOP, 2)
        count(reasons.BROKEN_LINK, 2)
        tree.bad[_relative(tree, place / "gone.jpg")] = nfc(printable(name))

    def specials() -> None:
        place.mkdir(parents=True, exist_ok=True)
        os.mkfifo(place / "pipe.jpg")
        (place / "null.jpg").symlink_to("/dev/null")
        handle = os.open(place, os.O_RDONLY)  # a socket's path has 107 bytes at most
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(f"/proc/self/fd/{handle}/s")
        os.close(handle)
        for reason in (reasons.PIPE, reasons.DEVICE, reasons.SOCKET):
            count(reason)

    def locked() -> None:
        _write(place / LOCKED / "p.jpg", picture(0))
        count(reasons.UNREADABLE)

    for add in rng.sample((hidden, no_picture, links, specials, locked), 2):
        add()


def _add_beside_splits(tree: OddTree, rng: random.Random, base: Path) -> None:
    _write(base / "extra/a/p.jpg", picture(0))
    _write(base / "extra/x.txt", b"")
    tree.passed_over["", reasons.UNKNOWN_SPLIT] += 2
    _write(base / "wnids.txt", b"n01443537\n")
    tree.passed_over["", reasons.BESIDE] += 1
    _write(base / ".DS_Store", b"\0")
    tree.passed_over["", reasons.HIDDEN] += 1


def _relative(tree: OddTree, path: Path) -> str:
    return path.relative_to(tree.root).as_posix()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@functools.cache
def picture(number: int) -> bytes:
    """A small picture, as JPEG or PNG by turns."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG" if number % 2 else "JPEG")
    return buffer.getvalue()
