"""Checks of a cluster and of this machine; every finding says what to do."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import requests

from cluster.auth import mode_too_wide, token_path
from cluster.client import Client, is_loopback
from cluster.errors import ClusterError

GIB = 1 << 30
OLDEST_SAFE_RAY = (2, 55)


@dataclass(frozen=True)
class Finding:
    """One result: level ok, note or bad; what was seen; what to do about it."""

    level: str
    check: str
    seen: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level:4}  {self.check}: {self.seen}" + (f"\n      -> {self.fix}" if self.fix else "")


def examine(address: str, folder: Path) -> list[Finding]:
    """All findings, in a fixed order.

    Args:
        address: the dashboard.
        folder: the folder of the local cluster, for the check of free disk.
    """
    findings: list[Finding] = []
    for check in CHECKS:
        findings.extend(check(address, folder))
    return findings


def check_ray(address: str, folder: Path) -> Iterator[Finding]:
    """Ray's version here."""
    ours = version("ray")
    if tuple(int(part) for part in ours.split(".")[:2]) < OLDEST_SAFE_RAY:
        fix = "pip install -e . -c constraints.txt"
        yield Finding("bad", "ray", f"{ours} here has known holes (CVE-2023-48022, CVE-2026-27482)", fix)
    else:
        yield Finding("ok", "ray", f"{ours} here")


def check_token(address: str, folder: Path) -> Iterator[Finding]:
    """The token file."""
    path = token_path()
    if os.environ.get("RAY_AUTH_TOKEN"):
        fix = "keep it in a file of mode 0600: an environment variable shows in /proc and is passed to every child"
        yield Finding("note", "token", "set in RAY_AUTH_TOKEN", fix)
    elif not path.exists():
        yield Finding("bad", "token", f"none in {path}", "python -m cluster up --local makes one")
    elif (mode := mode_too_wide(path)) is not None:
        yield Finding("bad", "token", f"{path} has mode {mode:04o}: others can read it", f"chmod 600 {path}")
    else:
        yield Finding("ok", "token", f"{path}, mode 0600")


def check_cluster(address: str, folder: Path) -> Iterator[Finding]:
    """The cluster: does it answer, does it ask for the token, is it the same Ray."""
    try:
        status = requests.get(f"{address}/api/jobs/", timeout=10, proxies={"http": "", "https": ""}).status_code
    except requests.RequestException:
        yield Finding("note", "cluster", f"nothing answers at {address}", "python -m cluster up --local")
        return
    if status == 401:
        yield Finding("ok", "cluster", f"{address} answers 401 without the token")
    else:
        fix = "anyone who reaches it can run code: restart it with RAY_AUTH_MODE=token (`up --local` does)"
        yield Finding("bad", "cluster", f"{address} answers {status} without a token", fix)
    try:
        theirs = Client(address).version()
    except ClusterError as error:
        yield Finding("bad", "cluster", str(error), "copy the cluster's token file, mode 0600")
        return
    same = theirs == version("ray")
    fix = "" if same else "install the same version on both: pip install -e . -c constraints.txt"
    yield Finding("ok" if same else "bad", "cluster", f"runs Ray {theirs}", fix)
    if not is_loopback(address) and address.startswith("http://"):
        yield Finding("bad", "cluster", f"{address} is not encrypted", "use an SSH tunnel: ray dashboard CLUSTER.yaml")


def check_disk(address: str, folder: Path) -> Iterator[Finding]:
    """Free disk where Ray spills objects, and shared memory for its object store."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    usage = shutil.disk_usage(place)
    seen = f"{usage.free / GIB:.0f} GiB free of {usage.total / GIB:.0f} at {place}"
    if usage.free < 0.05 * usage.total or usage.free < 5 * GIB:
        yield Finding("bad", "disk", seen, "free some: Ray stops placing work at 95 % full; or choose --folder DIR")
    else:
        yield Finding("ok", "disk", seen)
    shm = Path("/dev/shm")
    if not shm.exists():
        yield Finding("bad", "shared memory", "no /dev/shm", "mount a tmpfs there: Ray's object store needs it")
        return
    free = shutil.disk_usage(shm).free
    fix = "" if free >= GIB else "docker run --shm-size=8g, or an emptyDir of medium Memory at /dev/shm in Kubernetes"
    yield Finding("ok" if free >= GIB else "bad", "shared memory", f"{free / GIB:.1f} GiB free in /dev/shm", fix)


CHECKS: tuple[Callable[[str, Path], Iterator[Finding]], ...] = (check_ray, check_token, check_cluster, check_disk)
