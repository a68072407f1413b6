"""Exact points at which tests kill a process. Off unless ``TWOTOWER_FAULT`` is set; read here only.

``TWOTOWER_FAULT=POINT[@SHARD]:MARKER`` sends SIGKILL to the process that reaches POINT (while working on SHARD, a
tar's stem such as ``train-000001``), once: MARKER is a file that must not exist and is made just before.
"""

import os
import signal
from pathlib import Path

VARIABLE = "TWOTOWER_FAULT"
POINTS = (
    "tar-half",  # worker: half of the samples written
    "tar-written",  # worker: tar whole under its temporary name
    "tar-renamed",  # worker: tar under its final name, no index yet
    "index-written",  # worker: index whole under its temporary name
    "index-renamed",  # worker: index in place, no record yet
    "sums-written",  # worker: sums per position whole under their temporary name
    "sums-renamed",  # worker: sums in place, no record yet
    "record-written",  # worker: record whole under its temporary name
    "record-renamed",  # worker: record in place, driver not told yet
    "driver-shard-done",  # driver: told of a finished shard
    "manifest-before",  # driver: every other file in place, no manifest
    "manifest-half",  # driver: half of the manifest under its temporary name
    "manifest-renamed",  # driver: manifest in place, work folder still there
)


def reach(point: str, shard: str = "") -> None:
    """Dies here if the environment asks for it."""
    asked = os.environ.get(VARIABLE)
    if not asked:
        return
    where, marker = asked.split(":", 1)
    name, _, wanted = where.partition("@")
    assert name in POINTS, f"{VARIABLE}: no point {name}"
    if name != point or (wanted and wanted != shard):
        return
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
