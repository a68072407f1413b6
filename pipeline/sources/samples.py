"""Samples of tars that others wrote: an image and a label under one key, every other member counted."""

from collections.abc import Callable, Iterator

from pipeline.errors import ImageError, SourceError
from pipeline.files import AnyPath, read_range
from pipeline.sources import reasons
from pipeline.sources.listing import Item, Tally, nfc, printable
from pipeline.sources.tar_reader import (
    TarMember,
    TarSample,
    group_samples,
    is_hidden,
    plain_name,
    refuse_two,
    walk_file,
)
from twotower.words import one_line

# Components that are images, the first that a sample has is taken; what it is, its content tells.
IMAGES = ("jpg", "png", "webp", "gif", "bmp", "tif", "avif")
SYNONYMS = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "tiff": "tif"}
LABEL = "cls"
LABEL_BYTES = 64  # a number with white space around it
EXPECTED = "expected KEY.jpg (or png, webp, ...) and KEY.cls with the label's number, one behind the other"
DOTS = "a key ends at its first dot, so no key may have one: write v1_0.jpg, not v1.0.jpg"


class LabelTexts:
    """The labels of a source as its samples spell them.

    Attributes:
        text_of: number -> how it is written.
    """

    def __init__(self) -> None:
        self.text_of: dict[int, str] = {}

    def number(self, content: bytes, where: str) -> int:
        """The number that a sample's ``cls`` states.

        Raises:
            SourceError: it is none, or another sample writes the same number in another way.
        """
        text = content.removeprefix(b"\xef\xbb\xbf").strip()
        if not text.isdigit() or len(content) > LABEL_BYTES:
            raise SourceError(f"{where}: its cls is {text[:20]!r}: expected a label number of 0 or more, as text")
        number = int(text)
        known = self.text_of.setdefault(number, text.decode("ascii"))
        if known != text.decode("ascii"):
            raise SourceError(
                f"{where}: its cls is {text.decode('ascii')}, elsewhere {known}: write each label one way"
            )
        return number


def labeled_images(path: AnyPath, name: str, texts: LabelTexts, tally: Tally, split: str) -> Iterator[Item]:
    """The images of a tar, each with the number of its label; every member that is neither is counted.

    Args:
        path: the tar.
        name: the tar's path relative to the source's input.
        texts: gets the labels.
        tally: gets the counts.
        split: the split of the tar, for the counts; empty where it has none.

    Raises:
        SourceError: the tar cannot be read, or a sample is not what was expected.
    """

    def count(reason: str, member: TarMember) -> None:
        tally.add(reason, f"{name}/{plain_name(member.name)}", split=split)

    without_key: list[TarMember] = []
    seen: dict[str, TarMember] = {}
    for sample in group_samples(_visible(path, count), without_key):
        found = _image_and_label(sample, path)
        for member in sample.members:
            if member not in (found or ()):
                count(reasons.NO_COMPONENT if found else reasons.NO_SAMPLE, member)
        if found:
            image, label = found
            twin = seen.setdefault(nfc(sample.key).casefold(), image)  # one file where a disk ignores case
            refuse_two(path, twin, image)
            number = texts.number(_read(path, label), f"{path}: sample {_shown(sample.key)}")
            yield Item(f"{name}/{plain_name(image.name)}", number, name, image.offset, image.size)
    for member in without_key:
        count(reasons.NO_EXTENSION, member)


def _visible(path: AnyPath, count: Callable[[str, TarMember], None]) -> Iterator[TarMember]:
    """The members of a tar that are not hidden; those are counted."""
    try:
        for member in walk_file(path):
            if is_hidden(member.name):
                count(reasons.HIDDEN, member)
            else:
                yield member
    except (ImageError, OSError) as error:  # the whole tar cannot be read
        raise SourceError(f"{path}: {error}") from None


def _image_and_label(sample: TarSample, path: AnyPath) -> tuple[TarMember, TarMember] | None:
    """A sample's image and its label; None if it has neither.

    Raises:
        SourceError: it has one of them only, or two of one, or its key was meant to have dots.
    """
    components: dict[str, TarMember] = {}
    for member in sample.members:
        extension = SYNONYMS.get(member.extension.lower(), member.extension.lower())
        twin = components.setdefault(extension, member)
        if extension in (*IMAGES, LABEL):
            refuse_two(path, twin, member)
    image = next((components[extension] for extension in IMAGES if extension in components), None)
    label = components.get(LABEL)
    _refuse_dots(path, sample, components, complete=bool(image and label))
    if image and label:
        return image, label
    if image or label:
        has = _shown(", ".join(components))
        hint = "; labels in JSON are not read" if "json" in components and not label else ""
        raise SourceError(f"{path}: sample {_shown(sample.key)} has {has} only: {EXPECTED}{hint}")
    return None


def _refuse_dots(path: AnyPath, sample: TarSample, components: dict[str, TarMember], *, complete: bool) -> None:
    """Refuses ``v1.0.jpg`` and ``v1.0.cls``; beside a complete sample an image or a label alone may have a dot."""
    dotted: dict[str, set[str]] = {}
    for extension, member in components.items():
        before, _, last = extension.rpartition(".")
        kind = LABEL if last == LABEL else "image" if SYNONYMS.get(last, last) in IMAGES else ""
        if before and kind:
            dotted.setdefault(before, set()).add(kind)
            if not complete or len(dotted[before]) == 2:
                raise SourceError(
                    f"{path}: {_shown(member.name)} is component {_shown(extension)} of sample {_shown(sample.key)}: "
                    f"{DOTS}"
                )


def _read(path: AnyPath, member: TarMember) -> bytes:
    try:
        return read_range(path, member.offset, min(member.size, LABEL_BYTES + 1))
    except ImageError as error:
        raise SourceError(f"{path}: {error}") from None


def _shown(name: str) -> str:
    return one_line(printable(name))
