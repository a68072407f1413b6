"""The output folder while a data set is being made: who may write, what is there already, and how it becomes whole.

``OUTPUT/.work`` holds the lock, the settings of the run (``plan.json``), temporary files and the records of finished
shards. It is removed once the manifest is in place, so a complete data set is nothing but the data set.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.errors import DatasetError, FormatError, OutputError
from pipeline.files import AnyPath, is_url
from pipeline.manifest import (
    INFO_NAME,
    MANIFEST_NAME,
    QUARANTINE_NAME,
    STATISTICS_NAME,
    Manifest,
    ShardRecord,
    SplitRecord,
    file_sha256,
    path_inside,
    read_manifest,
    read_record,
    write_atomic,
)
from pipeline.preparation import faults
from pipeline.preparation.shard import WORK_NAME, ShardResult
from pipeline.preparation.statistics import Totals, summarize, to_npz
from pipeline.preparation.tar_writer import restore_index
from pipeline.record_checks import check_plan
from twotower import locks
from twotower.untrusted import read_regular
from twotower.words import listed

PLAN_NAME = "plan.json"
HASH_THREADS = 4


@contextlib.contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Holds the output folder for one run; the kernel lets go of it when the process ends, however it ends.

    Raises:
        OutputError: another run holds it, or the folder cannot be written.
    """
    path = output / WORK_NAME / "lock"
    refuse_links(output, (f"{WORK_NAME}/tmp", f"{WORK_NAME}/records", f"{WORK_NAME}/lock"))
    try:
        for name in ("tmp", "records"):
            (output / WORK_NAME / name).mkdir(parents=True, exist_ok=True)
        handle = locks.hold(path)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror}") from None
    if handle is None:
        raise OutputError(f"{output} is in use by another prepare; wait for it or stop it first")
    try:
        yield
    finally:
        if not (output / WORK_NAME / PLAN_NAME).exists():
            clear_work(output)  # nothing was begun, so nothing is left: a refusal does not touch a complete data set
        os.close(handle)


def refuse_links(output: Path, names: Iterable[str]) -> None:
    """Refuses an output that is a stranger's: what is written below it, and swept from it, must not lie elsewhere.

    Raises:
        OutputError: one of these places leads out of it.
    """
    try:
        for name in names:
            path_inside(output, name)
    except DatasetError as error:
        raise OutputError(f"--output {output}: {error}; or give another folder") from None


def check_places(source: AnyPath | None, output: Path | str) -> None:
    """Refuses an output inside the input, where the next run would read it, and an input inside the output.

    Args:
        source: the input; None where the source brings its own images.
        output: folder or URL of the data set.

    Raises:
        OutputError: one is inside the other, however links lead there; or DALI could not open the data set there.
    """
    given = _real(output)
    if given.encode(errors="replace").decode() != given:
        raise OutputError(
            f"--output {output}: its path is no UTF-8, and DALI cannot open a data set there; give another"
        )
    if source is None:
        return
    asked = _real(source)
    if f"{given}/".startswith(f"{asked}/"):
        raise OutputError(
            f"--output {output}: lies inside --input {source}, so the next run would read it; give a folder outside"
        )
    if f"{asked}/".startswith(f"{given}/"):
        raise OutputError(f"--input {source}: lies inside --output {output}; give another folder for the data set")


def _real(place: AnyPath | str) -> str:
    """Where a path leads, links followed; a URL as it is. Without slashes at its end."""
    text = re.sub(r"^(file|local)://", "", str(place))
    return (text if is_url(text) else os.path.realpath(text)).rstrip("/")


def check_ours(output: Path) -> None:
    """Refuses a folder that holds something else than a data set of ours, complete or begun.

    Raises:
        OutputError: it does, or it is no folder.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"--output {output}: is not a folder")
    names = sorted(path.name for path in output.iterdir())
    if names and MANIFEST_NAME not in names and WORK_NAME not in names:
        there = listed(names, most=3)
        raise OutputError(f"--output {output}: holds something else ({there}); give an empty or a new folder")


def sweep(output: Path) -> None:
    """Removes what killed runs left half-written."""
    for path in (output / WORK_NAME / "tmp").iterdir():
        path.unlink(missing_ok=True)
    for path in output.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def load_manifest(output: Path) -> Manifest | None:
    """The manifest if there is a valid one, else None: a damaged one is regenerated like anything else.

    Raises:
        OutputError: a data set of another version is there; its settings cannot be compared.
    """
    if not (output / MANIFEST_NAME).is_file():
        return None
    try:
        return read_manifest(output)
    except FormatError as error:
        raise OutputError(f"--output {output}: {error}") from None
    except DatasetError:
        return None


def begin(output: Path, settings: dict[str, Any], totals: dict[str, int]) -> None:
    """Records the settings of this run, or checks that they are those of the run it continues.

    Args:
        output: folder of the data set.
        settings: everything that decides the bytes.
        totals: images planned for each split.

    Raises:
        OutputError: the folder was begun with other settings.
    """
    text = json.dumps({"settings": settings, "totals": totals}, sort_keys=True, ensure_ascii=False)
    begun = read_plan(output)
    if begun is not None:
        refuse_difference(output, begun["settings"], json.loads(text)["settings"])
    else:
        write_atomic(output / WORK_NAME / PLAN_NAME, text.encode())
    refuse_links(output, totals)
    for split in totals:
        (output / split).mkdir(exist_ok=True)


def read_plan(output: Path) -> dict[str, Any] | None:
    """Settings and totals of the run that was begun here; None if none was, or its record is damaged."""
    try:
        return read_record(read_regular(output / WORK_NAME / PLAN_NAME), _checked_plan, PLAN_NAME)
    except (OSError, DatasetError):
        return None


def _checked_plan(raw: Any) -> dict[str, Any]:
    check_plan(raw)
    return {"settings": raw["settings"], "totals": raw["totals"]}


def is_running(output: Path) -> bool:
    """Tells whether a prepare holds the lock."""
    return locks.is_held(output / WORK_NAME / "lock")


def refuse_difference(
    output: Path | str, there: dict[str, Any], asked: dict[str, Any], *, libraries: bool = True
) -> None:
    """Names every setting that differs.

    Args:
        output: folder or URL of the data set.
        there: its settings.
        asked: those of this run.
        libraries: compare the versions of libraries too. A complete data set stays complete under newer ones; only a
            run that makes shards must have the same.

    Raises:
        OutputError: one does.
    """
    ignored = set() if libraries else {"libraries"}
    keys = sorted(key for key in (there.keys() | asked.keys()) - ignored if there.get(key) != asked.get(key))
    if keys:
        differ = "; ".join(
            "the input's files: their names, classes or sizes have changed since"
            if key == "input_sha256"
            else f"{key}: {_short(there.get(key))} there, {_short(asked.get(key))} asked"
            for key in keys
        )
        raise OutputError(
            f"{output} was prepared with other settings ({differ}); give another --output or the same settings, or "
            "remove it"
        )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def damage(folder: Path, name: str, size_bytes: int, sha256: str, *, hashes: bool = True) -> str | None:
    """What is wrong with a file: missing, another size, another hash, not in the folder; None if nothing is."""
    try:
        path = path_inside(folder, name)
        found = path.stat().st_size
        if found != size_bytes:
            return f"has {found:,} bytes instead of {size_bytes:,}"
        if hashes and file_sha256(path) != sha256:
            return "its sha256 differs"
    except FileNotFoundError:
        return "is missing"
    except DatasetError:
        return "is a link that leads out of the folder"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def shard_damage(output: Path, shard: ShardRecord, *, hashes: bool = True) -> dict[str, str]:
    """What is wrong with a shard's files, by name."""
    if not shard.num_samples:
        return {}
    found = {
        shard.name: damage(output, shard.name, shard.size_bytes, shard.sha256, hashes=hashes),
        shard.index_name: damage(output, shard.index_name, shard.index_size_bytes, shard.index_sha256, hashes=hashes),
    }
    return {name: problem for name, problem in found.items() if problem}


def file_damage(output: Path, manifest: Manifest) -> dict[str, str]:
    """What is wrong with statistics.npz, _info.json and quarantine.jsonl, by name."""
    found = {
        name: damage(output, name, record["size_bytes"], record["sha256"]) for name, record in manifest.files.items()
    }
    return {name: problem for name, problem in found.items() if problem}


def valid_shards(output: Path, shards: Iterable[ShardRecord]) -> set[str]:
    """Names of the shards whose files are as recorded, hashes included; several are read at a time."""
    shards = list(shards)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        problems = pool.map(functools.partial(shard_damage, output), shards)
    return {shard.name for shard, problem in zip(shards, problems, strict=True) if not problem}


def restore_indexes(output: Path, shards: Iterable[ShardRecord]) -> set[str]:
    """Writes damaged indexes again from their tars, where those are valid; names of the shards that are valid then."""
    return {
        shard.name
        for shard in shards
        if shard_damage(output, shard).keys() == {shard.index_name}
        and restore_index(output / shard.name, shard.index_sha256)
    }


def finish(output: Path, draft: Manifest, results: list[ShardResult], totals: Totals | None) -> Manifest:
    """Writes everything beside the shards, the manifest last.

    Args:
        output: folder of the data set.
        draft: the manifest without what comes from the shards: splits, files and the size of the images.
        results: every shard's record, in the order of the plan.
        totals: statistics of the train split, None without one.

    Raises:
        OutputError: there is no usable image at all.
    """
    faults.reach("statistics")
    splits, dropped = _splits(results)
    sizes = {result.size_px for result in results if result.shard.num_samples}
    size_px = next(iter(sizes)) if len(sizes) == 1 else None
    height, width = size_px or (None, None)
    quarantine = [line for result in results for line in result.quarantine]
    files = {
        QUARANTINE_NAME: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in quarantine).encode(),
        INFO_NAME: _timm_info(splits),
    }
    if totals is not None and "train" in splits:
        files[STATISTICS_NAME] = to_npz(summarize(totals))
    for name, data in files.items():
        write_atomic(output / name, data)
    for split in dropped:
        with contextlib.suppress(FileNotFoundError):
            (output / split).rmdir()
    manifest = dataclasses.replace(
        draft,
        image=dataclasses.replace(draft.image, height_px=height, width_px=width),
        splits=splits,
        dropped_splits=dropped,
        files={
            name: {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
    )
    faults.reach("manifest-before")
    _write_manifest(output, manifest)
    return manifest


def write_info(output: Path, manifest: Manifest) -> None:
    """Writes ``_info.json`` again."""
    write_atomic(output / INFO_NAME, _timm_info(manifest.splits))


def clear_work(output: Path) -> None:
    """Removes the work folder of a complete data set; the lock goes with it."""
    shutil.rmtree(output / WORK_NAME, ignore_errors=True)


def _write_manifest(output: Path, manifest: Manifest) -> None:
    data = manifest.to_json().encode()
    if os.environ.get(faults.VARIABLE, "").startswith("manifest-half"):
        (output / f".{MANIFEST_NAME}.truncated.tmp").write_bytes(data[: len(data) // 2])
        faults.reach("manifest-half")
    write_atomic(output / MANIFEST_NAME, data)
    faults.reach("manifest-renamed")


def _splits(results: list[ShardResult]) -> tuple[dict[str, SplitRecord], dict[str, int]]:
    """The splits; and those without a usable image, which are dropped: how many images they had."""
    by_split: dict[str, list[ShardResult]] = {}
    for result in results:
        by_split.setdefault(result.split, []).append(result)
    splits, dropped = {}, {}
    for split, rows in by_split.items():
        shards = tuple(row.shard for row in rows if row.shard.num_samples)
        if not shards:
            dropped[split] = sum(row.num_left_out for row in rows)
            continue
        splits[split] = SplitRecord(
            num_samples=sum(shard.num_samples for shard in shards),
            num_quarantined=sum(row.num_left_out for row in rows),
            shards=shards,
        )
    if not splits:
        first = next((line["reason"] for result in results for line in result.quarantine), "no images")
        raise OutputError(f"no image can be used; the first reason: {first}")
    return splits, dropped


def _timm_info(splits: dict[str, SplitRecord]) -> bytes:
    """``_info.json`` as timm's webdataset reader wants it; it looks for "validation" under that name."""
    info = {
        name: {
            "name": name,
            "filenames": [shard.name for shard in split.shards],
            "shard_lengths": [shard.num_samples for shard in split.shards],
            "num_samples": split.num_samples,
            "num_bytes": sum(shard.size_bytes for shard in split.shards),
        }
        for name, split in splits.items()
    }
    return (json.dumps({"splits": info}, indent=1, sort_keys=True) + "\n").encode()
