"""A data set at a URL, brought to a local cache and verified by hash: DALI reads local files only."""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.addresses import open_store, unfolded
from pipeline.errors import DatasetError, first_line
from pipeline.files import CACHE_VARIABLE, cache_folder
from pipeline.manifest import (
    MANIFEST_NAME,
    Manifest,
    file_sha256,
    from_json,
    path_inside,
    sync_folder,
    write_atomic,
)
from twotower.untrusted import MAX_JSON_BYTES

_PIECE_BYTES = 1 << 22
_STAGED: dict[str, Path] = {}
_LOGGER = logging.getLogger(__name__)


def is_url(data: str | Path) -> bool:
    """Whether ``data`` names something that fsspec has to fetch; pathlib's ``s3:/bucket`` counts too."""
    return unfolded(str(data)) is not None and not Path(data).exists()


def refuse_url(data: str | Path) -> None:
    """For what reads a data set without having been asked to fetch one: a run may name any address.

    Raises:
        DatasetError: it is an address.
    """
    if is_url(data):
        raise DatasetError(f"{data} is an address, and one is fetched only where --data names it: give it there")


def stage(data: str | Path, cache: Path | None = None) -> Path:
    """Makes a data set available as a local folder.

    Only what is missing or differs is fetched, each file under a temporary name, hashed while it comes, and given its
    name when the hash is right; the manifest comes last. Processes that stage the same data set wait for one another,
    and one process checks a data set once.

    Args:
        data: a folder, returned as it is, or a URL that fsspec knows (``s3://``, ``http://``, ``memory://``...).
        cache: where to keep data sets; default ``$TWOTOWER_CACHE``, else ``~/.cache/twotower``.

    Returns:
        The local folder.

    Raises:
        DatasetError: nothing there, not reachable, or a file that is not what the manifest says.
    """
    url = unfolded(str(data))
    if url is None or Path(data).exists():
        return Path(data)
    if url in _STAGED and (cache is None or _STAGED[url].parent == cache):
        return _STAGED[url]
    try:
        filesystem, root = open_store(url)
    except (ValueError, ImportError) as error:
        raise DatasetError(f"{url} cannot be opened: {error}") from None
    text = _fetch_text(filesystem, f"{root}/{MANIFEST_NAME}", url)
    manifest = from_json(text)
    cache = cache or _default_cache()
    folder = cache / manifest.fingerprint[:16]
    with _alone(cache, manifest.fingerprint[:16]):
        missing = [item for item in _files(manifest) if not _is_complete(folder, *item)]
        _LOGGER.info("%s: %d of %d files to fetch to %s", url, len(missing), len(_files(manifest)), folder)
        _check_room(cache, sum(size_bytes for _, size_bytes, _ in missing), url)
        for name, size_bytes, sha256 in missing:
            target = path_inside(folder, name)  # the name was checked where it was read, and here where it is written
            _fetch(filesystem, f"{root}/{name}", target, size_bytes=size_bytes, sha256=sha256)
        write_atomic(path_inside(folder, MANIFEST_NAME), text.encode())
    _STAGED[url] = folder
    return folder


def _default_cache() -> Path:
    """``$TWOTOWER_CACHE``, else ``~/.cache/twotower``.

    Raises:
        DatasetError: there is neither.
    """
    try:
        return cache_folder()
    except RuntimeError:
        raise DatasetError(f"there is no home folder (HOME is not set): name a folder with {CACHE_VARIABLE}") from None


def _files(manifest: Manifest) -> list[tuple[str, int, str]]:
    """Name, size and sha256 of every file but the manifest."""
    files = [(name, record["size_bytes"], record["sha256"]) for name, record in sorted(manifest.files.items())]
    for split in manifest.splits.values():
        for shard in split.shards:
            files.append((shard.index_name, shard.index_size_bytes, shard.index_sha256))
            files.append((shard.name, shard.size_bytes, shard.sha256))
    return files


def _is_complete(folder: Path, name: str, size_bytes: int, sha256: str) -> bool:
    try:
        path = path_inside(folder, name)
        return path.stat().st_size == size_bytes and file_sha256(path) == sha256
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DatasetError(f"{folder / name}: {error.strerror}: remove it, it is fetched again") from None


def _check_room(cache: Path, needed: int, url: str) -> None:
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise DatasetError(
            f"{url} needs {needed / 1e9:,.1f} GB and {cache} has {free / 1e9:,.1f} GB free: make room there, or name "
            f"another folder with {CACHE_VARIABLE}"
        )


def _fetch_text(filesystem: Any, path: str, url: str) -> str:
    try:
        with filesystem.open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)  # a server may send without end
        if len(data) <= MAX_JSON_BYTES:
            return bytes(data).decode()
    except FileNotFoundError:
        raise DatasetError(f"{url} has no {MANIFEST_NAME}: it is no data set, or preparing it never ended") from None
    except Exception as error:  # every store fails in its own classes; all of them mean the same to the user
        raise DatasetError(f"{url} cannot be read ({type(error).__name__}: {first_line(error)})") from None
    raise DatasetError(f"{url}: its {MANIFEST_NAME} is larger than {MAX_JSON_BYTES:,} bytes, so it is none")


def _fetch(filesystem: Any, source: str, target: Path, *, size_bytes: int, sha256: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, fetched = hashlib.sha256(), 0
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as out, filesystem.open(source, "rb") as file:
            while fetched <= size_bytes and (piece := file.read(_PIECE_BYTES)):
                digest.update(piece)
                fetched += len(piece)
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        if (fetched, digest.hexdigest()) != (size_bytes, sha256):
            raise DatasetError(f"{source} is not the file that its manifest records ({fetched} of {size_bytes} bytes)")
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except DatasetError:
        raise
    except Exception as error:  # see _fetch_text
        raise DatasetError(f"{source} cannot be fetched ({type(error).__name__}: {first_line(error)})") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    sync_folder(target.parent)


@contextlib.contextmanager
def _alone(cache: Path, name: str) -> Iterator[None]:
    """One process at a time; the lock goes with the process, also when it is killed."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        opened = (cache / f"{name}.lock").open("w")
    except OSError as error:
        why = error.strerror or error
        raise DatasetError(f"{cache} cannot be written ({why}): name another folder with {CACHE_VARIABLE}") from None
    with opened as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
