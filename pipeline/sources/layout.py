"""Where the splits and classes of an input folder are, whatever its owner calls them; what is ambiguous is refused."""

import dataclasses
import re

from pipeline.errors import SourceError
from pipeline.files import Entry, scan
from pipeline.sources.listing import printable
from pipeline.sources.split import apart_by_split, split_of
from pipeline.sources.walk import Walker, check_link, join, shown

IMAGES_FOLDERS = ("image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "jpegimages")
ALL = "all"
LIKE_SPLIT = re.compile(r"(^|[^a-z])(train|val|test)")
TABLES = (".csv", ".tsv", ".txt")


@dataclasses.dataclass(frozen=True)
class Part:
    """The place of a split in the input.

    Attributes:
        split: its name; :data:`ALL` where the input has none.
        folder: its folder, relative to the input.
        classes_at: the folder that holds the class folders, there or below; None where the pictures lie in none.
    """

    split: str
    folder: str
    classes_at: str | None

    @property
    def tag(self) -> str:
        """The split's name in the counts: empty where the input has no splits."""
        return "" if self.split == ALL else self.split


@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of all splits.

    Attributes:
        base: the folder that holds the split folders or the class folders; empty unless wrapped in others.
        parts: the splits, sorted by name; those that hold no picture are among them.
        others: folders beside the split folders that hold pictures.
    """

    base: str
    parts: tuple[Part, ...]
    others: tuple[str, ...]


def find_layout(looker: Walker) -> Layout:
    """Finds the splits and classes of an input.

    Args:
        looker: walks the input; what it counts is not needed.

    Raises:
        SourceError: no picture is there, two folders are one split, or it cannot be told what is a split.
    """
    base = _find_base(looker)
    for entry in scan(looker.root / base):
        if entry.kind not in ("directory", "file") and split_of(entry.name):
            raise SourceError(
                f"{looker.root / base / entry.name}: is a {entry.kind}, and leads to no folder of a split"
            )
        if entry.linked and split_of(entry.name):
            check_link(looker.root, join(base, entry.name), follow_links=looker.follow_links)
    folders = looker.contents(base).folders
    found: dict[str, Entry] = {}
    for entry in folders:
        split = split_of(entry.name)
        if split in found:
            raise SourceError(
                f"{looker.root / base}: both {found[split].name}/ and {entry.name}/ are there; keep one of them"
            )
        if split:
            found[split] = entry
    if not found:
        _refuse_split_words(looker, base, folders)
        return Layout(base, (dataclasses.replace(_part(looker, ALL, base), folder=""),), ())
    others = tuple(
        join(base, entry.name)
        for entry in folders
        if not split_of(entry.name) and looker.has_picture(join(base, entry.name))
    )
    if "train" not in found and others:
        name = next(iter(found.values())).name
        raise SourceError(
            f"{looker.root / base}: {name}/ is named like a split, but there is no train/ beside it: put the class "
            f"folders ({shown(others)}) below train/, or rename {name}/ if it is a class"
        )
    parts = tuple(_part(looker, split, join(base, found[split].name)) for split in sorted(found))
    return Layout(base, parts, others)


def refuse_flat(looker: Walker, counts: dict[Part, int], with_classes: list[str]) -> None:
    """Says what would help where the pictures of some splits lie in no class folders.

    Args:
        looker: walks the input.
        counts: those splits, and how many pictures they have.
        with_classes: the splits that have class folders.

    Raises:
        SourceError: always.
    """
    places = " and ".join(f"{looker.root / part.folder} ({count:,})" for part, count in counts.items())
    tables = [
        str(looker.root / part.folder / entry.name)
        for part in counts
        for entry in looker.contents(part.folder).files
        if entry.name.lower().endswith(TABLES)
    ]
    fixes = [
        f"give their classes by --labels {printable(tables[0]) if tables else 'FILE'} (a CSV or lines NAME LABEL)",
        "put them into class folders",
    ]
    if with_classes:
        fixes.append(f"leave them out by --splits {','.join(with_classes)}")
    if ALL not in (part.split for part in counts):
        fixes.append("rename a folder that is a class and no split")
    raise SourceError(f"pictures in no class folders: {places}: {', or '.join(fixes)}")


def _refuse_split_words(looker: Walker, base: str, folders: list[Entry]) -> None:
    """Refuses folders such as training_set/ and test_set/, which would become two classes.

    Raises:
        SourceError: every folder with pictures is named so, or two are that differ in nothing else.
    """
    alike = [entry for entry in folders if LIKE_SPLIT.search(entry.name.lower())]
    others = [entry for entry in folders if entry not in alike]
    found = [join(base, name) for name in apart_by_split(entry.name for entry in folders)]
    if not found and alike and not _with_pictures(looker, base, others):
        found = _with_pictures(looker, base, alike)
    if found:
        raise SourceError(
            f"{looker.root / base}: {shown(found)} look like splits, not like classes: "
            "rename them to train/, val/ and test/, or give one of them as --input"
        )


def _find_base(looker: Walker) -> str:
    """The folder that holds the split folders or the class folders: the input, or one that single folders wrap."""
    chain = [""]
    while True:
        found = looker.contents(chain[-1])
        splits = {split_of(entry.name) for entry in found.folders} - {None}
        inside = _with_pictures(looker, chain[-1], found.folders)
        wraps_splits = "train" in splits or len(splits) > 1 or (splits and len(chain) == 1)
        if wraps_splits or len(inside) > 1:
            return chain[-1]
        is_class = len(chain) > 1 and any(looker.pictures_of(chain[-1], found.files))
        if is_class or not inside:
            break
        chain.append(inside[0])
    return chain[1] if len(chain) > 2 and _holds_images(chain[1]) else ""


def _part(looker: Walker, split: str, folder: str) -> Part:
    """A split, whose class folders may lie in a folder ``images`` of it."""
    found = looker.contents(folder)
    classes = _with_pictures(looker, folder, found.folders)
    if len(classes) == 1 and _holds_images(classes[0]):
        found = looker.contents(classes[0])
        flat = any(looker.pictures_of(classes[0], found.files)) or not _with_pictures(looker, classes[0], found.folders)
        return Part(split, folder, None if flat else classes[0])
    return Part(split, folder, folder if classes else None)


def _with_pictures(looker: Walker, folder: str, entries: list[Entry]) -> list[str]:
    """The first two of these folders that hold pictures."""
    found: list[str] = []
    for entry in entries:
        path = join(folder, entry.name)
        if len(found) < 2 and looker.has_picture(path):
            found.append(path)
    return found


def _holds_images(folder: str) -> bool:
    """A folder's name says that it holds pictures, of whatever class."""
    return folder.rpartition("/")[2].lower() in IMAGES_FOLDERS
