"""One shard: a tar, its index and its record, each whole under its name or absent, the record last."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.config import ImageSettings
from pipeline.errors import DatasetError, ImageError, OutputError, SourceError
from pipeline.files import UrlPath, prefetch
from pipeline.manifest import ImageFormat, ShardRecord, read_record, sync_folder
from pipeline.preparation import faults
from pipeline.preparation.image import Payload, StoredImage, load_libraries, make_images
from pipeline.preparation.statistics import Accumulator, Totals, totals_from_json
from pipeline.preparation.tar_writer import TarWriter
from pipeline.record_checks import check_result
from pipeline.sources.listing import Item, Source, printable
from twotower.untrusted import read_regular

WORK_NAME = ".work"
BUFFER_BYTES = 2**20
MAX_SUMS_BYTES = 2**26  # four bytes for each channel of the positions that are summed: a million at most
SEAL_BYTES = 22  # , "crc32": "01234567"}
_ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps would make one for each sample


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """What all shards of a run share.

    Attributes:
        output: folder of the data set.
        source: reads the images.
        image: what to make of them.
        class_names: the class table's names.
        fail_on_error: stop at the first image that cannot be used, instead of leaving it out.
    """

    output: Path
    source: Source
    image: ImageSettings
    class_names: tuple[str, ...]
    fail_on_error: bool


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One shard to write.

    Attributes:
        name: path of the tar inside the data set.
        split: its split.
        start: position in the split of its first image.
        items: its images in order.
    """

    name: str
    split: str
    start: int
    items: list[Item]

    @property
    def stem(self) -> str:
        """The tar's name without folder and suffix."""
        return Path(self.name).stem


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """The record of a shard on its way to the manifest.

    Attributes:
        shard: its row in the manifest; a shard without any sample has no files and no row.
        split: its split.
        num_planned: images planned for it.
        quarantine: lines for quarantine.jsonl.
        size_px: (height, width) if all its images have one size, else None.
        totals: its statistics (without the sums per position, when read without them).
        began_s: when work on its first image began, in seconds since 1970; not in the record.
    """

    shard: ShardRecord
    split: str
    num_planned: int
    quarantine: tuple[dict[str, str], ...]
    size_px: tuple[int, int] | None
    totals: Totals
    began_s: float = dataclasses.field(default=math.inf, compare=False)

    @property
    def num_left_out(self) -> int:
        """Images that could not be used."""
        return self.num_planned - self.shard.num_samples


def build_shard(job: ShardJob, task: ShardTask) -> ShardResult:
    """Makes one shard from its images.

    Running it again, even at the same time in another process, ends with the same bytes under the same names.

    Raises:
        SourceError: the input is gone, or an image cannot be used and the job says to stop then.
        OutputError: the output cannot be written.
    """
    with temporary_file(job, task, task.stem) as temporary:
        return _build(job, task, temporary)


@contextlib.contextmanager
def temporary_file(job: ShardJob, task: ShardTask, stem: str) -> Iterator[Path]:
    """A name in the work folder for this process alone; what is left under it is removed.

    Raises:
        OutputError: the output cannot be written.
    """
    path = job.output / WORK_NAME / "tmp" / f"{stem}.{socket.gethostname()}-{os.getpid()}"
    try:
        yield path
    except OSError as error:
        raise OutputError(f"cannot write {job.output / task.name}: {error.strerror or error}") from None
    finally:
        path.unlink(missing_ok=True)


def _build(job: ShardJob, task: ShardTask, temporary: Path) -> ShardResult:
    with temporary.open("wb", buffering=BUFFER_BYTES) as file:
        writer = TarWriter(file)
        filler = fill(job, task, writer)
        finish_tar(writer, file)
    faults.reach("tar-written", task.stem)
    return commit_shard(job, task, temporary, writer, filler.result())


def finish_tar(writer: TarWriter, file: BinaryIO) -> None:
    """Writes the tar's end, and sees that all of it is on the disk."""
    writer.finish()
    file.flush()
    os.fsync(file.fileno())


def fill(job: ShardJob, task: ShardTask, writer: TarWriter) -> "_Filler":
    """Makes a task's images and appends them to a tar."""
    load_libraries(job.image)
    filler = _Filler(job, task, writer)
    read = prefetch if isinstance(getattr(job.source, "root", None), UrlPath) else map
    made = make_images(read(filler.read, task.items), job.image)
    for position, (item, image) in enumerate(zip(task.items, made, strict=True)):
        if position == len(task.items) // 2:
            faults.reach("tar-half", task.stem)
        filler.add(position, item, image)
    return filler


def commit_shard(job: ShardJob, task: ShardTask, temporary: Path, writer: TarWriter, filled: "Filled") -> ShardResult:
    """Gives a tar that is whole under its temporary name its final one; then the index, then the record."""
    final, index = job.output / task.name, writer.index()
    result = _result(task, writer, index, filled)
    if writer.num_samples:
        _rename(temporary, final)
        faults.reach("tar-renamed", task.stem)
        _commit(temporary, final.with_suffix(".idx"), index, point="index")
    _commit_record(job.output / WORK_NAME, temporary, task.stem, result)
    return dataclasses.replace(result, totals=dataclasses.replace(result.totals, position_sum=None))


@dataclasses.dataclass(frozen=True)
class Filled:
    """What is known of samples beside their bytes.

    Attributes:
        quarantine: lines for quarantine.jsonl.
        sizes_px: every (height, width) of their images.
        totals: their statistics.
        began_s: when work on the first of them began.
    """

    quarantine: tuple[dict[str, str], ...]
    sizes_px: frozenset[tuple[int, int]]
    totals: Totals
    began_s: float


class _Filler:
    """Turns a task's images into samples of a tar, keeping the counts."""

    def __init__(self, job: ShardJob, task: ShardTask, writer: TarWriter) -> None:
        self._job = job
        self._task = task
        self._writer = writer
        self._extension = ImageFormat(job.image.encoding, job.image.channels, None, None).extension
        self._statistics = Accumulator(job.image.channels)
        self._quarantine: list[dict[str, str]] = []
        self._sizes: set[tuple[int, int]] = set()
        self._began_s = time.time()

    def read(self, item: Item) -> Payload | ImageError:
        """One image of the source, or why it cannot be read."""
        try:
            return read_item(self._job.source, item, self._job.image)
        except ImageError as error:
            return error

    def add(self, position: int, item: Item, image: StoredImage | ImageError) -> None:
        """Appends one sample, or the line that says why not."""
        if isinstance(image, ImageError):
            if self._job.fail_on_error:
                raise SourceError(f"{printable(item.name)}: {image}")
            self._report(item, "left_out", str(image))
            return
        if image.converted:
            self._report(item, "converted", "; ".join(image.converted))
        key = key_of(self._task.split, self._task.start + position)
        self._writer.add_sample(key, self._components(item, image))
        self._sizes.add((image.pixels.shape[0], image.pixels.shape[1]))
        if self._task.split == "train":
            self._statistics.add(image.pixels)

    def result(self) -> Filled:
        """What was written, beside its bytes."""
        return Filled(tuple(self._quarantine), frozenset(self._sizes), self._statistics.totals(), self._began_s)

    def _components(self, item: Item, image: StoredImage) -> list[tuple[str, bytes]]:
        label = b"%d" % item.label
        body = {
            "source": printable(item.name),
            "class": self._job.class_names[item.label],
            "label": item.label,
            "width": image.width_px,
            "height": image.height_px,
            "converted": "; ".join(image.converted),
        }
        return [(self._extension, image.data), ("cls", label), ("json", sealed_json(body, image.data, label))]

    def _report(self, item: Item, action: str, reason: str) -> None:
        self._quarantine.append(
            {
                "split": self._task.split,
                "source": printable(item.name),
                "class": self._job.class_names[item.label],
                "action": action,
                "reason": reason,
            }
        )


def read_item(source: Source, item: Item, settings: ImageSettings) -> Payload:
    """Reads one image, unless it is too large to be read at all: a sparse file may claim terabytes.

    Raises:
        ImageError: this image cannot be read.
        SourceError: the whole input cannot be read.
    """
    if item.size > settings.max_bytes:
        raise ImageError(f"{item.size:,} bytes, more than --max-bytes {settings.max_bytes:,}")
    return source.read(item)


def _result(task: ShardTask, writer: TarWriter, index: bytes, filled: Filled) -> ShardResult:
    """The record of what was written."""
    shard = ShardRecord(
        name=task.name,
        num_samples=writer.num_samples,
        size_bytes=writer.size_bytes,
        sha256=writer.sha256(),
        index_size_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    return ShardResult(
        shard=shard,
        split=task.split,
        num_planned=len(task.items),
        quarantine=filled.quarantine,
        size_px=next(iter(filled.sizes_px)) if len(filled.sizes_px) == 1 else None,
        totals=filled.totals,
        began_s=filled.began_s,
    )


def key_of(split: str, position: int) -> str:
    """The key of the sample at this position of the shuffled split: unique in the data set, only ``a-z0-9-``."""
    return f"{split}-{position:08d}"


def sealed_json(body: dict[str, Any], *others: bytes) -> bytes:
    """JSON text ending in a CRC-32 of the sample's other components and of itself, so that verify can name a sample."""
    text = _ENCODER.encode(body)[:-1]
    return f'{text}, "crc32": "{_crc(text.encode(), *others):08x}"}}'.encode()


def seal_holds(sealed: bytes, *others: bytes) -> bool:
    """Tells whether a sample's components are those that :func:`sealed_json` saw."""
    text, seal = sealed[:-SEAL_BYTES], sealed[-SEAL_BYTES:]
    return seal == b', "crc32": "%08x"}' % _crc(text, *others)


def read_result(work: Path, stem: str, *, with_positions: bool) -> ShardResult | None:
    """Reads the record of a shard, None if there is no complete one.

    Args:
        work: the work folder.
        stem: the tar's name without folder and suffix.
        with_positions: read the sums per position too.
    """

    def build(raw: dict[str, Any]) -> ShardResult:
        check_result(raw)
        position_sum = None
        if with_positions and raw["positions_sha256"]:
            data = read_regular(work / "records" / f"{stem}.sums", MAX_SUMS_BYTES)
            if hashlib.sha256(data).hexdigest() != raw["positions_sha256"]:
                raise DatasetError(f"{stem}.sums is damaged")
            position_sum = np.frombuffer(data, "<u4").reshape(raw["totals"]["shape"]).astype(np.uint64)
        return ShardResult(
            shard=ShardRecord(**raw["shard"]),
            split=raw["split"],
            num_planned=raw["num_planned"],
            quarantine=tuple(raw["quarantine"]),
            size_px=None if raw["size_px"] is None else (raw["size_px"][0], raw["size_px"][1]),
            totals=totals_from_json(raw["totals"], position_sum),
        )

    try:
        return read_record(read_regular(work / "records" / f"{stem}.json"), build, f"{stem}.json")
    except (OSError, DatasetError):
        return None  # no record or a damaged one: the shard is regenerated


def _commit_record(work: Path, temporary: Path, stem: str, result: ShardResult) -> None:
    sums = result.totals.position_sum
    data = b"" if sums is None else sums.astype("<u4").tobytes()  # 255 * MAX_SHARD_SIZE fits
    if data:
        _commit(temporary, work / "records" / f"{stem}.sums", data, point="sums")
    raw = {
        "shard": dataclasses.asdict(result.shard),
        "split": result.split,
        "num_planned": result.num_planned,
        "quarantine": result.quarantine,
        "size_px": result.size_px,
        "totals": result.totals.to_json(),
        "positions_sha256": hashlib.sha256(data).hexdigest() if data else None,
    }
    _commit(temporary, work / "records" / f"{stem}.json", json.dumps(raw).encode(), point="record")


def _commit(temporary: Path, final: Path, data: bytes, *, point: str) -> None:
    """Writes a whole file under its final name; tests kill the process before and after the rename."""
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    faults.reach(f"{point}-written", final.stem)
    _rename(temporary, final)
    faults.reach(f"{point}-renamed", final.stem)


def _rename(temporary: Path, final: Path) -> None:
    temporary.replace(final)
    sync_folder(final.parent)


def _crc(text: bytes, *others: bytes) -> int:
    crc = zlib.crc32(text)
    for data in others:
        crc = zlib.crc32(data, crc)
    return crc
