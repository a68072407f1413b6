"""A data set put to a URL (``s3://`` and what else fsspec knows) by the same protocol as on a disk: manifest last.

The data set is made whole in a local folder first; then its files go up, those that are there already are passed over,
and the manifest goes last. While that lasts, the object ``.work/fingerprint`` says which data set is coming.
"""

import hashlib
from pathlib import Path
from typing import Any

from pipeline.addresses import open_store
from pipeline.config import PrepareOptions
from pipeline.errors import DatasetError, OutputError, first_line
from pipeline.files import CACHE_VARIABLE, cache_folder
from pipeline.manifest import MANIFEST_NAME, Manifest, from_json
from pipeline.preparation import faults
from pipeline.preparation.output import refuse_difference
from pipeline.preparation.plan import make_request
from pipeline.progress import ProgressLine

MARK_NAME = ".work/fingerprint"


def staging_folder(url: str) -> Path:
    """Where a data set for this URL is made: below ``$TWOTOWER_CACHE``, else ``~/.cache/twotower``.

    Raises:
        OutputError: there is no HOME.
    """
    try:
        cache = cache_folder()
    except RuntimeError:
        raise OutputError(
            f"no home folder to make the data set in: set {CACHE_VARIABLE} to a folder with room"
        ) from None
    return cache / "prepare" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


class Remote:
    """A folder of a remote file system.

    Args:
        url: its URL.

    Raises:
        OutputError: fsspec does not know it or cannot reach it.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._files, self._root = open_store(self.url)
            self._sizes = self._list()
        except Exception as error:  # every file system has errors of its own
            raise OutputError(f"--output {url}: {first_line(error)}") from None

    def published(self, options: PrepareOptions) -> Manifest | None:
        """The manifest if what was asked for is there, whole; None if it must be (further) published.

        Raises:
            OutputError: another data set or something else is there.
        """
        manifest = self._manifest()
        if manifest is None:
            others = self._sizes.keys() - {MARK_NAME}
            if others and MARK_NAME not in self._sizes:
                raise OutputError(f"--output {self.url}: holds something else ({min(others)}); give another URL")
            return None
        refuse_difference(self.url, manifest.settings, make_request(options).settings, libraries=False)
        return None if self._missing(manifest) else manifest

    def publish(self, folder: Path, manifest: Manifest) -> None:
        """Puts every file that is not there yet, the manifest last.

        Raises:
            OutputError: another data set is coming or there, or the file system refuses.
        """
        try:
            self._claim(manifest)
            names = self._missing(manifest)
            with ProgressLine(len(names), verb="published", unit="files") as progress:
                for name in names:
                    self._files.put_file(str(folder / name), f"{self._root}/{name}")
                    progress.advance(1)
                    faults.reach("publishing")
            self._sizes = self._list()
            missing = self._missing(manifest)
            if missing:
                raise OutputError(f"{self.url}/{missing[0]}: was put, but is not there with its size")
            self._files.put_file(str(folder / MANIFEST_NAME), f"{self._root}/{MANIFEST_NAME}")
            self._files.rm_file(f"{self._root}/{MARK_NAME}")
        except OutputError:
            raise
        except Exception as error:  # as above
            raise OutputError(f"cannot write {self.url}: {first_line(error)}; run the same command again") from None

    def _claim(self, manifest: Manifest) -> None:
        if MARK_NAME in self._sizes:
            coming = self._files.cat_file(f"{self._root}/{MARK_NAME}").decode()
            if coming != manifest.fingerprint:
                raise OutputError(f"{self.url}: another data set is being published there ({coming[:12]})")
        self._files.makedirs(f"{self._root}/{MARK_NAME}".rsplit("/", 1)[0], exist_ok=True)
        for split in manifest.splits:
            self._files.makedirs(f"{self._root}/{split}", exist_ok=True)
        self._files.pipe_file(f"{self._root}/{MARK_NAME}", manifest.fingerprint.encode())

    def _missing(self, manifest: Manifest) -> list[str]:
        """Names of the files, but for the manifest, that are not there with their size."""
        sizes = {name: record["size_bytes"] for name, record in manifest.files.items()}
        for split in manifest.splits.values():
            for shard in split.shards:
                sizes |= {shard.name: shard.size_bytes, shard.index_name: shard.index_size_bytes}
        return [name for name, size in sizes.items() if self._sizes.get(name) != size]

    def _manifest(self) -> Manifest | None:
        if MANIFEST_NAME not in self._sizes:
            return None
        try:
            return from_json(self._files.cat_file(f"{self._root}/{MANIFEST_NAME}"))
        except DatasetError:
            raise OutputError(f"{self.url}/{MANIFEST_NAME} is damaged: remove that data set first") from None

    def _list(self) -> dict[str, int]:
        self._files.invalidate_cache()
        found: dict[str, Any] = self._files.find(self._root, detail=True) if self._files.exists(self._root) else {}
        root = self._root.rstrip("/") + "/"
        return {name.removeprefix(root): int(row["size"]) for name, row in found.items()}
