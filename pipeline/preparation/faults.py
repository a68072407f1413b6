"""Exact points at which tests kill or hold a process. Off unless ``TWOTOWER_FAULT`` is set; read here only.

``TWOTOWER_FAULT=POINT[@SHARD]:MARKER`` sends SIGKILL to the process that reaches POINT (while working on SHARD, a
tar's stem such as ``train-000001``), once: MARKER is a file that must not exist and is made just before. With
``hold-POINT`` the process waits there for ever instead, for a signal.
"""

import os
import signal
import threading
from pathlib import Path

VARIABLE = "TWOTOWER_FAULT"
HOLD = "hold-"
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

STAGES = (  # where signals are tested, beside some of the above
    "command",  # options read, nothing done
    "listed",  # the source is listed, nothing written
    "ray-starting",  # in the start of Ray
    "statistics",  # every shard in place, statistics not yet
    "publishing",  # some files put to the URL, no manifest
    "summary",  # all done and told
)


def reach(point: str, shard: str = "") -> None:
    """Dies or waits here if the environment asks for it."""
    asked = os.environ.get(VARIABLE)
    if not asked:
        return
    where, marker = asked.split(":", 1)
    point_asked, _, wanted = where.partition("@")
    name = point_asked.removeprefix(HOLD)
    assert name in POINTS + STAGES, f"{VARIABLE}: no point {name}"
    if name != point or (wanted and wanted != shard):
        return
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return
    if point_asked.startswith(HOLD):
        threading.Event().wait()
    os.kill(os.getpid(), signal.SIGKILL)
