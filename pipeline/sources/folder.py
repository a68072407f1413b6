"""Source ``folder``: class folders of JPEG or PNG files.

``INPUT/{train,val,test}/CLASS/*`` keeps its splits; ``INPUT/CLASS/*`` is split by a seed, class by class. Every
file that is not hidden counts as an image: what it is, its content tells, not its name.
"""

import dataclasses
import os
from collections.abc import Iterator

from pipeline.config import PrepareOptions
from pipeline.errors import ConfigError, ImageError, SourceError
from pipeline.files import AnyPath, scan
from pipeline.manifest import ClassRecord
from pipeline.sources.listing import Item, Listing, Source, SplitListing, printable
from pipeline.sources.split import SPLIT_FOLDERS


@dataclasses.dataclass(frozen=True)
class FolderSource(Source):
    """Images in class folders.

    Attributes:
        root: the input folder.
        val_fraction: share of every class for ``val`` where the folder has no splits.
        seed: seed of that split.
    """

    root: AnyPath
    val_fraction: float
    seed: int

    def listing(self) -> Listing:
        """Lists the files, split by split, in the order of their names' bytes."""
        folders = self._split_folders()
        found = {
            split: sorted(_files(self.root, folder), key=lambda row: os.fsencode(row[1]))
            for split, folder in folders.items()
        }
        classes = sorted({name for rows in found.values() for name, _, _ in rows}, key=os.fsencode)
        if not classes:
            raise SourceError(
                f"{self.root}: no class folders with files in them; expected INPUT/CLASS/* or INPUT/train/CLASS/*"
            )
        label_of = {name: label for label, name in enumerate(classes)}
        splits = {
            split: SplitListing.of([Item(path, label_of[name], path, 0, size) for name, path, size in rows])
            for split, rows in found.items()
            if rows
        }
        if set(folders) == {"all"}:
            splits = splits["all"].train_and_val(self.val_fraction, self.seed)
        return Listing(
            classes=tuple(ClassRecord(name=printable(name), title=printable(name)) for name in classes),
            label_order="alphabetical",
            splits=splits,
            encoded=True,
            channels=3,
        )

    def read(self, item: Item) -> bytes:
        """The file's bytes."""
        return read_file(self.root, item.file)

    def _split_folders(self) -> dict[str, str]:
        """Split name -> folder relative to the root; ``all`` if the classes lie at the root."""
        if not self.root.is_dir():
            raise SourceError(f"--input {self.root}: no such folder")
        found: dict[str, str] = {}
        for folder, split in SPLIT_FOLDERS.items():
            if (self.root / folder).is_dir():
                if split in found:
                    raise SourceError(f"{self.root}: both {found[split]}/ and {folder}/ are there; keep one of them")
                found[split] = folder
        return found if "train" in found else {"all": ""}


def from_options(options: PrepareOptions) -> FolderSource:
    """Makes the source.

    Raises:
        ConfigError: no input was given.
    """
    if options.input is None:
        raise ConfigError("--source folder needs --input FOLDER")
    return FolderSource(root=options.input.absolute(), val_fraction=options.val_fraction, seed=options.seed)


def read_file(root: AnyPath, name: str) -> bytes:
    """Reads an image that is a file of its own.

    Raises:
        ImageError: this file cannot be read.
        SourceError: the whole input is gone.
    """
    try:
        return (root / name).read_bytes()
    except OSError as error:
        if not root.is_dir():
            raise SourceError(f"{root}: the input folder is gone, or not on this machine") from None
        raise ImageError(f"cannot be read: {error.strerror}") from None


def _files(root: AnyPath, folder: str) -> Iterator[tuple[str, str, int]]:
    """Yields (class, path relative to root, size in bytes); hidden files and folders are passed over."""
    for entry in scan(root / folder):
        if entry.kind == "directory":
            relative = f"{folder}/{entry.name}" if folder else entry.name
            for path, size in _walk(root, relative):
                yield entry.name, path, size


def _walk(root: AnyPath, relative: str) -> Iterator[tuple[str, int]]:
    for entry in scan(root / relative):
        path = f"{relative}/{entry.name}"
        if entry.kind == "directory":
            yield from _walk(root, path)
        elif entry.kind != "other":  # a broken link is listed, so that it is reported instead of silently missing
            yield path, entry.size
