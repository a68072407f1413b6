"""Checks a data set against its manifest, down to the sample, and names what is wrong."""

import dataclasses
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from pipeline.config import ImageSettings
from pipeline.errors import DatasetError, SourceError
from pipeline.inspection.over_shards import over_shards
from pipeline.manifest import QUARANTINE_NAME, Manifest, ShardRecord
from pipeline.preparation.output import file_damage, shard_damage
from pipeline.preparation.shard import seal_holds
from pipeline.preparation.tar_writer import END, INDEX_VERSION, header, index_line
from pipeline.quarantine import read_quarantine
from pipeline.sources.tar_reader import BLOCK, TarMember, TarSample, group_samples, range_reader, walk_tar
from twotower.verbosity import log
from twotower.words import listed, pluralize

DEFAULT = ImageSettings()


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong.

    Attributes:
        file: the file, relative to the data set.
        reason: what is wrong with it.
    """

    file: str
    reason: str


def check_dataset(
    folder: Path, manifest: Manifest, *, level: str = "hashes", report: Callable[[int], None] = lambda samples: None
) -> list[Problem]:
    """Checks every file of a data set.

    Args:
        folder: the data set.
        manifest: its manifest, already read, so it is valid.
        level: ``fast`` looks at sizes, tar headers, counts and indexes; ``hashes`` at every sha256 too; ``full`` at
            every sample's checksum too.
        report: called with the number of samples of each shard when it is done.
    """
    problems = [Problem(name, reason) for name, reason in file_damage(folder, manifest).items()]
    problems += found_problems(folder, manifest)
    for split in manifest.splits.values():
        size_bytes = sum(shard.size_bytes for shard in split.shards)
        found = over_shards(_check, (folder, manifest, level), split.shards, size_bytes=size_bytes)
        for shard, in_shard in zip(split.shards, found, strict=True):
            problems += in_shard
            log.debug("%s checked", shard.name)
            report(shard.num_samples)
    return problems + _strangers(folder, manifest)


def _check(shared: tuple[Path, Manifest, str], shard: ShardRecord) -> list[Problem]:
    folder, manifest, level = shared
    return check_shard(folder, manifest, shard, level=level)


def check_shard(folder: Path, manifest: Manifest, shard: ShardRecord, *, level: str) -> list[Problem]:
    """Checks one tar and its index."""
    damaged = shard_damage(folder, shard, hashes=level != "fast")
    problems = [Problem(name, reason) for name, reason in damaged.items()]
    if not (folder / shard.name).is_file():
        return problems
    try:
        samples = read_samples(folder / shard.name)
    except DatasetError as error:
        return [*problems, Problem(shard.name, str(error))]
    extensions = (manifest.image.extension, "cls", "json")
    problems += [Problem(shard.name, reason) for reason in _shape_problems(samples, shard, extensions)]
    if (folder / shard.index_name).is_file():
        problems += [Problem(shard.index_name, reason) for reason in index_problems(folder / shard.index_name, samples)]
    if level == "full" or shard.name in damaged:
        problems += [Problem(shard.name, reason) for reason in seal_problems(folder / shard.name, samples)]
    return problems


def undecodable(folder: Path, manifest: Manifest) -> list[Problem]:
    """The samples whose image DALI's decoder does not take, so that no training run is the first to find them."""
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    found = over_shards(_undecodable, (folder, manifest), shards, size_bytes=sum(shard.size_bytes for shard in shards))
    return [problem for in_shard in found for problem in in_shard]


def _undecodable(shared: tuple[Path, Manifest], shard: ShardRecord) -> list[Problem]:
    from pipeline.preparation.decoder_check import dali_accepts  # loads the codec library, which only --full needs

    folder, manifest = shared
    problems = []
    with (folder / shard.name).open("rb") as file:
        for sample in read_samples(folder / shard.name):
            image = sample.members[0]
            file.seek(image.offset)
            data = file.read(image.size)
            if is_larger(data, manifest):
                problems.append(Problem(shard.name, f"sample {sample.key} is larger than the manifest says"))
            elif not dali_accepts(data):
                problems.append(Problem(shard.name, f"DALI cannot decode sample {sample.key}"))
    return problems


def is_larger(data: bytes, manifest: Manifest) -> bool:
    """Whether an image says that it has more pixels than its data set's have: its decoding may take all memory."""
    form = manifest.image
    limit = (form.height_px or 0) * (form.width_px or 0) or manifest.settings.get("max_pixels") or DEFAULT.max_pixels
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            return bool(image.width * image.height > limit)
    except Exception:  # it is damaged, which the decoder will say
        return False


def read_samples(tar: Path) -> list[TarSample]:
    """Walks a tar of ours, reading headers only; every byte of them, and the end, must be what prepare writes.

    Raises:
        DatasetError: the tar is truncated or a header is damaged.
    """
    size, read = tar.stat().st_size, range_reader(tar)
    try:
        samples = list(group_samples(walk_tar(read, 0, size, tar.name)))
    except SourceError as error:
        raise DatasetError(str(error).removeprefix(f"{tar.name}: ")) from None
    end = 0
    for member in (member for sample in samples for member in sample.members):
        if member.offset != end + BLOCK or read(end, BLOCK) != _header(member):
            raise DatasetError(f"damaged header at byte {end:,}")
        end = member.offset + member.size + -member.size % BLOCK
    if end + len(END) != size or read(end, len(END)) != END:
        raise DatasetError(f"the end of the tar is damaged at byte {end:,}")
    return samples


def index_problems(index: Path, samples: list[TarSample]) -> Iterator[str]:
    """Compares an index with the samples of its tar, line by line."""
    lines = index.read_bytes().decode("ascii", "replace").split("\n")
    if lines[0] != f"{INDEX_VERSION} {len(samples)}":
        yield f"its first line is {lines[0][:40]!r} instead of '{INDEX_VERSION} {len(samples)}'"
    if len(lines) != len(samples) + 2 or lines[-1]:
        yield f"has {pluralize(len(lines) - 2, 'sample')} instead of {len(samples)}"
    for sample, line in zip(samples, lines[1:], strict=False):
        if index_line(sample) != line:
            yield f"the line of sample {sample.key} does not match the tar"


def seal_problems(tar: Path, samples: list[TarSample]) -> Iterator[str]:
    """Checks the checksum of every sample and the padding around its data."""
    with tar.open("rb") as file:
        for sample in samples:
            data = [_data(file, member) for member in sample.members]
            if any(padding.strip(b"\0") for _, padding in data):
                yield f"sample {sample.key} has bytes in its padding"
            *others, sealed = [content for content, _ in data]
            if not seal_holds(sealed, *others):
                yield f"sample {sample.key} is damaged (its checksum does not match)"


def _data(file: BinaryIO, member: TarMember) -> tuple[bytes, bytes]:
    file.seek(member.offset)
    return file.read(member.size), file.read(-member.size % BLOCK)


def _shape_problems(samples: list[TarSample], shard: ShardRecord, extensions: tuple[str, ...]) -> Iterator[str]:
    if len(samples) != shard.num_samples:
        yield f"has {pluralize(len(samples), 'sample')} instead of {shard.num_samples}"
    for sample in samples:
        found = tuple(member.extension for member in sample.members)
        if found != extensions:
            yield f"sample {sample.key} has {listed(found)} instead of {', '.join(extensions)}"


def found_problems(folder: Path, manifest: Manifest) -> list[Problem]:
    """Checks that nothing was lost: stored + left out + passed over = found, each left-out image being listed."""
    problems = []
    parts = (manifest.num_samples, manifest.num_left_out, manifest.num_passed_over)
    if sum(parts) != manifest.num_found:
        problems.append(
            Problem("manifest.json", f"{manifest.num_found} found, but stored, left out, passed over: {parts}")
        )
    if not (folder / QUARANTINE_NAME).is_file():
        return problems  # file_damage names it, if there should be one
    try:
        lines = Counter(row["split"] for row in read_quarantine(folder) if row["action"] == "left_out")
    except DatasetError as error:
        return [*problems, Problem(QUARANTINE_NAME, str(error))]
    stated = {name: split.num_quarantined for name, split in manifest.splits.items()} | manifest.dropped_splits
    return problems + [
        Problem(QUARANTINE_NAME, f"{lines[split]} images of {split} are left out instead of {stated.get(split, 0)}")
        for split in sorted(stated.keys() | lines.keys())
        if lines[split] != stated.get(split, 0)
    ]


def _strangers(folder: Path, manifest: Manifest) -> list[Problem]:
    """Tars and indexes that the manifest does not know: a reader that lists the folder would take them."""
    known = {
        name for split in manifest.splits.values() for shard in split.shards for name in (shard.name, shard.index_name)
    }
    found = (path.relative_to(folder).as_posix() for split in manifest.splits for path in (folder / split).glob("*"))
    return [Problem(name, "is not in the manifest") for name in sorted(found) if name not in known]


def _header(member: TarMember) -> bytes | None:
    """The header that prepare would have written; None for a name or size that it never writes."""
    try:
        return header(member.name, member.size)
    except (ValueError, AssertionError):
        return None
