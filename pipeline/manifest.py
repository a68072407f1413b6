"""The record of a prepared data set: ``manifest.json``, written last, so it exists only when all else is complete.

Layout of a data set folder::

    manifest.json             this record
    train/train-000000.tar    samples KEY.jpg|png|raw, KEY.cls, KEY.json, in USTAR, fixed mtime and order
    train/train-000000.idx    DALI index v1.2 of that tar
    val/...                   the other splits, the same way
    statistics.npz            mean image, mean RGB, RGB covariance, eigenvalues, eigenvectors, counts (train split)
    _info.json                shard list in the form timm reads
    quarantine.jsonl          every image left out or converted, and why
"""

import dataclasses
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline import raw_images
from pipeline.errors import DatasetError, FormatError
from pipeline.record_checks import INFO_NAME, MANIFEST_NAME, QUARANTINE_NAME, STATISTICS_NAME, check_manifest
from twotower.untrusted import open_regular, parse_json, read_regular
from twotower.words import one_line, shortened

__all__ = ["INFO_NAME", "MANIFEST_NAME", "QUARANTINE_NAME", "STATISTICS_NAME"]

FORMAT = 2  # 2: num_found, passed_over, dropped_splits

Record = TypeVar("Record")


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """One shard: a tar and its index.

    Attributes:
        name: path of the tar inside the data set, with ``/``, for example ``train/train-000000.tar``.
        num_samples: samples in the tar.
        size_bytes: size of the tar.
        sha256: hex digest of the tar.
        index_size_bytes: size of the index (the same name with suffix ``.idx``).
        index_sha256: hex digest of the index.
    """

    name: str
    num_samples: int
    size_bytes: int
    sha256: str
    index_size_bytes: int
    index_sha256: str

    @property
    def index_name(self) -> str:
        """Path of the index inside the data set."""
        return self.name.removesuffix(".tar") + ".idx"


@dataclasses.dataclass(frozen=True)
class ClassRecord:
    """One row of the class table; the row number is the label.

    Attributes:
        name: the source's own id: a WordNet id, a folder name, a digit.
        title: human-readable name(s); the same as ``name`` where the source has no other.
    """

    name: str
    title: str


@dataclasses.dataclass(frozen=True)
class ImageFormat:
    """What the stored images are.

    Attributes:
        encoding: ``jpeg``, ``png``, ``raw`` (uint8 HWC bytes) or ``original`` (bytes as the source had them).
        channels: 3 for RGB, 1 for gray.
        height_px: height of every image, or None where sizes differ.
        width_px: width of every image, or None where sizes differ.
    """

    encoding: str
    channels: int
    height_px: int | None
    width_px: int | None

    @property
    def extension(self) -> str:
        """The component name inside the tars: ``jpg``, ``png`` or ``raw`` (``original`` is stored as ``jpg``)."""
        return {"jpeg": "jpg", "png": "png", "raw": "raw", "original": "jpg"}[self.encoding]


@dataclasses.dataclass(frozen=True)
class SplitRecord:
    """One split, for example ``train`` or ``val``.

    Attributes:
        num_samples: samples in all shards.
        num_quarantined: images of the source that were left out (see quarantine.jsonl).
        shards: the shards in order.
    """

    num_samples: int
    num_quarantined: int
    shards: tuple[ShardRecord, ...]


@dataclasses.dataclass(frozen=True)
class PassedOver:
    """Files of the input that are no samples and no images that failed, for one reason.

    Attributes:
        split: the split they would belong to; empty where they belong to none.
        reason: why, a short fixed phrase.
        count: how many.
        examples: a few of their names, the first in the order of names.
    """

    split: str
    reason: str
    count: int
    examples: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A complete data set. Nothing of the input is lost: stored + quarantined + passed over = found.

    Attributes:
        format: version of this layout.
        source: name of the source (``digits``, ``folder``, ``imagenet``, ...).
        settings: every setting that decides the bytes (seed, shard size, resize, encoding, filter, orientation...).
        image: what the stored images are.
        classes: the class table; row number = label.
        label_order: how labels are ordered (``alphabetical``, ``ilsvrc``, ``source``).
        splits: the splits by name.
        files: size and sha256 of the other files (statistics.npz, _info.json, quarantine.jsonl), as
            ``{name: {"size_bytes": int, "sha256": hex}}``.
        num_found: files of the input, members of its archives or records of its arrays.
        passed_over: those that were not even tried, by split and reason.
        dropped_splits: splits whose images were all left out, so that they are not in ``splits``: how many they were.
    """

    format: int
    source: str
    settings: dict[str, Any]
    image: ImageFormat
    classes: tuple[ClassRecord, ...]
    label_order: str
    splits: dict[str, SplitRecord]
    files: dict[str, dict[str, Any]]
    num_found: int
    passed_over: tuple[PassedOver, ...] = ()
    dropped_splits: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Samples of all splits."""
        return sum(split.num_samples for split in self.splits.values())

    @property
    def num_left_out(self) -> int:
        """Images that could not be used (see quarantine.jsonl), those of dropped splits included."""
        return sum(split.num_quarantined for split in self.splits.values()) + sum(self.dropped_splits.values())

    @property
    def num_passed_over(self) -> int:
        """Files of the input that were not tried."""
        return sum(row.count for row in self.passed_over)

    def found_lines(self) -> list[str]:
        """What became of everything that the input held, a line each reason."""
        parts = {"stored": self.num_samples, "left out (quarantine.jsonl)": self.num_left_out}
        return found_lines(self.num_found, parts, self.passed_over)

    def to_json(self) -> str:
        """The manifest as canonical JSON text: sorted keys, so the same data set gives the same bytes.

        Its field ``sha256`` is the digest of the text without that field, so that a reader notices damage.
        """
        raw = dataclasses.asdict(self)
        raw["picture"] = raw.pop("image")  # its name in every data set that exists
        return _canonical(raw | {"sha256": hashlib.sha256(_canonical(raw).encode()).hexdigest()})

    @property
    def fingerprint(self) -> str:
        """sha256 of the manifest's bytes: the identity of the data set, every image included."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def found_lines(num_found: int, parts: dict[str, int], passed_over: tuple[PassedOver, ...]) -> list[str]:
    """What became of everything that the input holds, a line each reason: the parts and what is passed over make it up.

    Args:
        num_found: all of it.
        parts: words -> how many, of what was not passed over.
        passed_over: the rest.
    """
    parts = parts | {"passed over": sum(row.count for row in passed_over)}
    lines = [f"found {num_found:,} = " + " + ".join(f"{count:,} {words}" for words, count in parts.items())]
    for row in passed_over:
        where = f"{row.split}: " if row.split else ""
        more = ", ..." if row.count > len(row.examples) else ""
        lines.append(f"passed over: {where}{row.count:,} {row.reason} ({one_line(', '.join(row.examples))}{more})")
    return lines


def from_json(text: str | bytes) -> Manifest:
    """Parses a manifest.

    Raises:
        DatasetError: the text is not a manifest of this format.
    """

    def build(raw: dict[str, Any]) -> Manifest:
        manifest = _from_raw(raw)
        if manifest.to_json() != (text if isinstance(text, str) else text.decode()):
            raise DatasetError(f"{MANIFEST_NAME} is damaged (its sha256 does not match its content): run prepare again")
        return manifest

    return read_record(text, build, MANIFEST_NAME)


def read_record(text: str | bytes, build: Callable[[Any], Record], name: str) -> Record:
    """The one reader of our JSON files: parses ``text`` and makes a record of it.

    Args:
        text: the file's content, in UTF-8.
        build: makes the record; a missing key or a value of another type is its ordinary Python error.
        name: of the file, for the message.

    Raises:
        DatasetError: it is damaged.
    """
    try:
        return build(parse_json(text))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise DatasetError(f"{name} is damaged ({type(error).__name__}: {error}): run prepare again") from None


def _from_raw(raw: dict[str, Any]) -> Manifest:
    if raw["format"] != FORMAT:
        raise FormatError(
            f"manifest format {shortened(raw['format'])} is not supported (expected {FORMAT}): prepare the data set "
            "again, into a new folder"
        )
    check_manifest(raw)
    return Manifest(
        format=raw["format"],
        source=raw["source"],
        settings=raw["settings"],
        image=ImageFormat(**raw["picture"]),
        classes=tuple(ClassRecord(**row) for row in raw["classes"]),
        label_order=raw["label_order"],
        splits={
            name: SplitRecord(
                num_samples=split["num_samples"],
                num_quarantined=split["num_quarantined"],
                shards=tuple(ShardRecord(**shard) for shard in split["shards"]),
            )
            for name, split in raw["splits"].items()
        },
        files=raw["files"],
        num_found=raw["num_found"],
        passed_over=tuple(PassedOver(**row | {"examples": tuple(row["examples"])}) for row in raw["passed_over"]),
        dropped_splits=raw["dropped_splits"],
    )


def _canonical(raw: dict[str, Any]) -> str:
    return json.dumps(raw, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a data set folder.

    Raises:
        DatasetError: there is no complete data set in ``folder``.
    """
    if not folder.is_dir():
        raise DatasetError(
            f"no data set folder at {folder}: make one with python -m pipeline prepare --output {folder}"
        )
    path = folder / MANIFEST_NAME
    try:
        return from_json(read_regular(path_inside(folder, MANIFEST_NAME)))
    except FileNotFoundError:
        if advice := "" if (folder / ".work").exists() else raw_images.advice(folder):
            raise DatasetError(f"{folder} is no prepared data set: {advice}") from None
        raise DatasetError(
            f"{folder} has no {MANIFEST_NAME}: preparing it never ended; run the same prepare command again"
        ) from None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EISDIR):  # a pipe, which would be waited for, a device, a folder
            raise DatasetError(f"{path} is no file: remove it, and run prepare again") from None
        raise DatasetError(f"{path} cannot be read ({error.strerror})") from None


def path_inside(folder: Path, name: str) -> Path:
    """The path of a data set's file, and that it lies in the data set's folder, wherever links lead.

    Raises:
        DatasetError: it does not. A folder of links, as the cache of a hub has it, is copied by ``cp -rL``.
    """
    path, root = folder / name, os.path.realpath(folder)
    if not os.path.realpath(path).startswith(root.rstrip("/") + "/"):
        raise DatasetError(f"{path} leads out of {folder}, by a link: cp -rL makes a copy with the files themselves")
    return path


def file_sha256(path: Path) -> str:
    """Hex sha256 of a regular file.

    Raises:
        OSError: it cannot be read, or is none.
    """
    with open_regular(path) as handle, open(handle, "rb", closefd=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file that is either whole under its name or absent: temporary name, fsync, rename, fsync of folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    # Not tempfile, whose files are 0600: these have the permissions that umask and folder give to any new file.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
