"""Walks an input folder so that every file in it is either given out or counted, and nothing waits or goes round."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.errors import SourceError
from pipeline.files import (
    AnyPath,
    Entry,
    UnreadableFolder,
    UrlPath,
    identity,
    local_path,
    prefetch,
    read_head,
    relative_to,
    scan,
)
from pipeline.pictures import HEAD_BYTES, has_picture_head, has_picture_name
from pipeline.sources import reasons
from pipeline.sources.listing import Tally, printable
from pipeline.sources.split import split_of
from twotower.words import listed

SHOWN = 5
FOLLOW = "--follow-links"
LOOKED_AT = 1000  # folders, for a message
REASON_OF = {
    "link": reasons.BROKEN_LINK,
    "pipe": reasons.PIPE,
    "socket": reasons.SOCKET,
    "device": reasons.DEVICE,
    "unreadable": reasons.UNREADABLE,
    "other": reasons.NO_FILE,
}


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is directly in a folder and concerns a source.

    Attributes:
        files: regular files, and broken links that have a picture's name (their image is missing, and is reported).
        folders: folders, in the order of their names' bytes.
    """

    files: list[Entry]
    folders: list[Entry]


class Walker:
    """Gives out what is in an input folder, and counts what is not given out.

    Args:
        root: the input folder.
        tally: gets the counts.
        skip: files that are neither given out nor counted, relative to the root: those that the source reads labels of.
        follow_links: also where they lead out of the input; such links are counted otherwise.
    """

    def __init__(self, root: AnyPath, tally: Tally, skip: Iterable[str] = (), *, follow_links: bool = False) -> None:
        self.root = root
        self.tally = tally
        self.follow_links = follow_links
        self._locked: list[str] = []
        self._outside: list[str] = []
        self._skip = frozenset(skip)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line about the folders that this user may not list."""
        found = {
            "folders that this user may not list are passed over": self._locked,
            f"links that lead out of it are passed over ({FOLLOW} follows them)": self._outside,
        }
        return tuple(f"{self.root}: {words}: {shown(names)}" for words, names in found.items() if names)

    def contents(self, folder: str, split: str = "") -> Contents:
        """What is directly in ``folder`` (relative to the root); hidden and special files are counted.

        Raises:
            SourceError: it cannot be listed.
        """
        files, folders = [], []
        for entry in scan(self.root / folder):
            if entry.linked and not entry.hidden and self.leads_out(join(folder, entry.name)):
                self.tally.add(reasons.LINK_OUT, join(folder, entry.name), split=split)
                self._outside.append(join(folder, entry.name))
            elif entry.kind == "file" and entry.name[0] != ".":  # first: a million times
                files.append(entry)
            elif entry.hidden:
                self.pass_over(folder, [entry], reasons.HIDDEN, split)
            elif entry.kind == "directory":
                folders.append(entry)
            elif entry.kind == "link" and has_picture_name(entry.name):
                files.append(entry)
            else:
                self.tally.add(REASON_OF[entry.kind], join(folder, entry.name), split=split)
        if self._skip:
            files = [entry for entry in files if join(folder, entry.name) not in self._skip]
        return Contents(files, sorted(folders, key=lambda entry: os.fsencode(entry.name)))

    def below(self, folder: str, split: str = "", *, mixed: bool = False) -> Iterator[tuple[str, list[Entry]]]:
        """Every folder from ``folder`` down, itself first, with its files; links to folders are followed, each once.

        Args:
            folder: path relative to the root.
            split: the split that counts are of.
            mixed: folders of several splits may be in it.

        Raises:
            SourceError: a folder holds folders of several splits, so its images would be mixed.
        """
        seen = self._above(folder)
        waiting, linked = [folder], list[str]()
        while waiting or linked:
            path = waiting.pop() if waiting else linked.pop(0)  # links last: a folder is listed under its own name
            try:
                here = identity(self.root / path)
                found = None if here in seen else self.contents(path, split)
            except UnreadableFolder:
                self.tally.add(reasons.UNREADABLE, path, split=split)
                self._locked.append(path)
                continue
            seen.add(here)
            if found is None:
                self.tally.add(reasons.LOOP, path, split=split)
                continue
            if not mixed:
                refuse_mixed_splits(self.root / path, found.folders)
            yield path, found.files
            for entry in reversed(found.folders):
                (linked if entry.linked else waiting).append(join(path, entry.name))

    def pictures(self, folder: str, split: str = "") -> Iterator[tuple[str, int]]:
        """Path (relative to the root) and size of every picture from ``folder`` down; the other files are counted."""
        for path, files in self.below(folder, split):
            yield from self.pictures_of(path, files, split)

    def pictures_of(self, folder: str, files: list[Entry], split: str = "") -> list[tuple[str, int]]:
        """Path and size of the pictures among the files of one folder; the others are counted."""
        prefix = f"{folder}/" if folder else ""
        found = [(prefix + entry.name, entry.size) for entry in files if has_picture_name(entry.name)]
        if len(found) < len(files):
            found += self._by_content(prefix, [entry for entry in files if not has_picture_name(entry.name)], split)
        return found

    def has_picture(self, folder: str) -> bool:
        """Tells whether a picture is anywhere from ``folder`` down, looking no further than the first."""
        looker = Walker(self.root, Tally(), self._skip, follow_links=self.follow_links)
        seen, folders = self._above(folder), [folder]
        while folders:
            path, unclear = folders.pop(), []
            try:
                here = identity(self.root / path)
                for entry in [] if here in seen else scan(self.root / path):
                    if entry.hidden or entry.kind not in ("directory", "file", "link"):
                        continue
                    if entry.linked and self.leads_out(join(path, entry.name)):
                        continue
                    if entry.kind == "directory":
                        folders.append(join(path, entry.name))
                    elif has_picture_name(entry.name):
                        return True
                    elif entry.kind == "file":
                        unclear.append(entry)
            except UnreadableFolder:
                continue
            seen.add(here)
            if any(looker.pictures_of(path, unclear)):
                return True
        return False

    def leads_out(self, path: str) -> bool:
        """Whether a path (relative to the root) is one that links lead out of the input, and none is followed there."""
        place = None if self.follow_links else local_path(self.root / path)
        return place is not None and not within(place, self._real_root)

    @functools.cached_property
    def _real_root(self) -> str:
        place = local_path(self.root)
        return "" if place is None else os.path.realpath(place)

    def pass_over(self, folder: str, entries: Iterable[Entry], reason: str, split: str = "") -> None:
        """Counts these entries of ``folder``, and every file from them down; links are counted, not followed."""
        for entry in entries:
            path = join(folder, entry.name)
            if path in self._skip:
                continue
            if entry.kind != "directory" or entry.linked:
                self.tally.add(reason, path, split=split)
            elif isinstance(self.root, UrlPath) and local_path(self.root) is None:
                for file in (self.root / path).rglob("*"):  # one question, not one for every folder
                    self.tally.add(reason, str(relative_to(file, self.root)), split=split)
            else:
                self._pass_over_below(path, reason, split)

    @functools.cached_property
    def _around(self) -> frozenset[object]:
        """The folders that the input lies in: a link to one of them leads back."""
        place = local_path(self.root)
        return frozenset(() if place is None else map(identity, place.resolve().parents))

    def _above(self, folder: str) -> set[object]:
        """The folders that a folder lies in, up to the disk's."""
        return {*self._around, *(identity(self.root / parent) for parent in _parents(folder))}

    def _pass_over_below(self, folder: str, reason: str, split: str) -> None:
        folders = [folder]
        while folders:
            path = folders.pop()
            try:
                for entry in scan(self.root / path):
                    if entry.kind == "directory" and not entry.linked:
                        folders.append(join(path, entry.name))
                    elif join(path, entry.name) not in self._skip:
                        self.tally.add(reason, join(path, entry.name), split=split)
            except UnreadableFolder:
                self.tally.add(reason, path, split=split)

    def _by_content(self, prefix: str, files: list[Entry], split: str) -> Iterator[tuple[str, int]]:
        def head(entry: Entry) -> bytes | None:
            try:
                return read_head(self.root / (prefix + entry.name), HEAD_BYTES)
            except OSError:
                return None

        heads = (prefetch if isinstance(self.root, UrlPath) else map)(head, files)
        for entry, found in zip(files, heads, strict=True):
            if found and has_picture_head(found):
                yield prefix + entry.name, entry.size
            else:
                reason = reasons.UNREADABLE if found is None else reasons.NO_PICTURE
                self.tally.add(reason, prefix + entry.name, split=split)


def within(path: Path, real_root: str) -> bool:
    """Whether a path lies in a folder, wherever links lead."""
    return f"{os.path.realpath(path)}/".startswith(f"{real_root.rstrip('/')}/")


def check_link(root: AnyPath, name: str, *, follow_links: bool) -> None:
    """Refuses a file of a fixed name that a link leads out of the input to.

    Raises:
        SourceError: it is one, and none is to be followed.
    """
    if Walker(root, Tally(), follow_links=follow_links).leads_out(name):
        raise SourceError(f"{root / name}: is a link that leads out of the input: {FOLLOW} follows it")


def links_out(root: AnyPath) -> str:
    """The end of a message about an input without images, where links lead out of it; else empty."""
    looker = Walker(root, Tally())
    with contextlib.suppress(SourceError):
        for number, _ in enumerate(looker.below("", mixed=True)):
            if looker._outside:
                return f"; links lead out of it ({shown(looker._outside)}): {FOLLOW} follows them"
            if number == LOOKED_AT:
                break
    return ""


def join(folder: str, name: str) -> str:
    """A path relative to the root."""
    return f"{folder}/{name}" if folder else name


def shown(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    return listed([printable(name) for name in names], most=SHOWN)


def refuse_mixed_splits(folder: AnyPath, folders: list[Entry]) -> None:
    """Refuses a class folder that holds folders of several splits.

    Raises:
        SourceError: it does.
    """
    found = {split: entry.name for entry in folders if (split := split_of(entry.name))}
    if len(found) > 1:
        raise SourceError(
            f"{folder}: holds {'/, '.join(sorted(found.values()))}/, so images of several splits would be mixed in one "
            "class; expected INPUT/train/CLASS/* and INPUT/val/CLASS/*"
        )


def pass_over_unread(walker: Walker, used: Iterable[str]) -> None:
    """Counts every file of an input but those that the source uses or has counted itself.

    Args:
        walker: of the input.
        used: their paths relative to the root; a folder stands for all that is in it.
    """
    used = frozenset(used)
    folders = [""]
    while folders:
        folder = folders.pop()
        for entry in scan(walker.root / folder):
            path = join(folder, entry.name)
            if path in used:
                continue
            if entry.kind == "directory" and any(name.startswith(f"{path}/") for name in used):
                folders.append(path)
                continue
            is_split = entry.kind == "directory" and split_of(entry.name) is not None
            reason = reasons.UNKNOWN_SPLIT if is_split else reasons.NOT_READ
            walker.pass_over(folder, [entry], reasons.HIDDEN if entry.hidden else reason)


def _parents(folder: str) -> list[str]:
    """The folders above ``folder``, from the root on."""
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:count]) for count in range(len(parts))]
