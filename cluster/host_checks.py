"""The checks of `doctor` that concern this machine, and what a check reports.

Versions are read from metadata: nothing heavy is imported.
"""

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from cluster.jobs.auth_token import mode_too_wide, token_path
from twotower import listeners

GIB = 1 << 30
MANY_SHARDS = 4096


@dataclass(frozen=True)
class Finding:
    """What a check reports.

    Attributes:
        level: ok; note (worth knowing); bad (something to do).
        check: what was checked.
        seen: what was found.
        fix: what to do about it, "" if nothing.
    """

    level: str
    check: str
    seen: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level:4}  {self.check}: {self.seen}" + (f"\n      -> {self.fix}" if self.fix else "")


def ok(check: str, seen: str) -> Finding:
    """All is well."""
    return Finding("ok", check, seen)


def note(check: str, seen: str, fix: str = "") -> Finding:
    """Worth knowing."""
    return Finding("note", check, seen, fix)


def bad(check: str, seen: str, fix: str) -> Finding:
    """Something to do."""
    return Finding("bad", check, seen, fix)


def check_host(folder: Path) -> Iterator[Finding]:
    """All checks of this machine but the token's; `folder` is the local cluster's."""
    yield from check_disk(folder)
    yield from check_shared_memory()
    yield from check_file_limit()
    yield from check_gpu()
    yield from check_dali()


def check_token(of_cluster: Path | None = None) -> Iterator[Finding]:
    """The token file: the cluster's own, of one that `up --local` started, else that of clusters elsewhere."""
    path = of_cluster or token_path()
    if os.environ.get("RAY_AUTH_TOKEN") and not of_cluster:
        fix = "keep it in a file of mode 0600: an environment variable shows in /proc and is passed to every child"
        yield note("token", "set in RAY_AUTH_TOKEN", fix)
    elif not path.exists():
        fix = "python -m cluster up --local makes a cluster with its own; else copy the cluster's"
        yield bad("token", f"none in {path}", fix)
    elif (mode := mode_too_wide(path)) is not None:
        yield bad("token", f"{path} has mode {mode:04o}: others can read it", f"chmod 600 {path}")
    else:
        yield ok("token", f"{path}, mode 0600")


def check_disk(folder: Path) -> Iterator[Finding]:
    """Free disk where Ray keeps logs and spills objects."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    usage = shutil.disk_usage(existing)
    seen = f"{usage.free / GIB:.0f} GiB free of {usage.total / GIB:.0f} at {existing}"
    if usage.free < 0.05 * usage.total or usage.free < 5 * GIB:
        yield bad("disk", seen, "free some: Ray places no work on a disk that is 95 % full; or choose --folder DIR")
    else:
        yield ok("disk", seen)


def check_shared_memory(path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Room for Ray's object store."""
    fix = "docker run --shm-size=8g; in Kubernetes an emptyDir of medium Memory at /dev/shm"
    if not path.exists():
        yield bad("shared memory", f"no {path}", fix)
    elif (free := shutil.disk_usage(path).free) < GIB:
        yield bad("shared memory", f"{free / GIB:.2f} GiB free in {path}", fix)
    else:
        yield ok("shared memory", f"{free / GIB:.1f} GiB free in {path}")


def check_file_limit() -> Iterator[Finding]:
    """The limit of open files: DALI opens every tar of a data set at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < MANY_SHARDS:
        yield note("open files", f"limit {soft}: too few for data sets of that many shards", f"ulimit -n {hard}")
    else:
        yield ok("open files", f"limit {soft}")


def check_gpu() -> Iterator[Finding]:
    """GPUs, the driver, and whether NCCL and DALI's CUDA fit it."""
    if not shutil.which("nvidia-smi"):
        yield note("GPU", "none here (no nvidia-smi): the towers train on CPUs and talk through gloo")
        return
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30, check=True)
        names = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (subprocess.SubprocessError, OSError) as error:
        yield bad("GPU", f"nvidia-smi fails: {str(error).splitlines()[0]}", "install or restart the NVIDIA driver")
        return
    yield from judge_gpus(names, done.stdout, installed())


def judge_gpus(names: str, table: str, packages: dict[str, str]) -> Iterator[Finding]:
    """Findings from the output of `nvidia-smi -L` and `nvidia-smi`, and from the installed packages."""
    count = sum(line.startswith("GPU ") for line in names.splitlines())
    if count < 2:
        yield note("GPU", f"{count}: both towers share it and talk through gloo; NCCL needs one GPU per tower")
    else:
        yield ok("GPU", f"{count}: one per tower")
    nccl = next((version for name, version in packages.items() if name.startswith("nvidia-nccl")), None)
    if nccl is None:
        yield bad("NCCL", "not installed", "pip install -e . -c constraints.txt (torch's CUDA build brings it)")
    else:
        yield ok("NCCL", nccl)
    driver = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", table)
    wheel = next((re.search(r"cuda(\d\d)", name) for name in packages if name.startswith("nvidia-dali-cuda")), None)
    if driver and wheel and int(driver[1]) < int(wheel[1]):
        fix = f"update the driver to one for CUDA {wheel[1]}, or install nvidia-dali-cuda{driver[1]}0"
        yield bad("driver", f"supports CUDA {driver[1]}.{driver[2]}, and DALI here is built for CUDA {wheel[1]}", fix)


def check_dali() -> Iterator[Finding]:
    """Whether DALI is installed, and only once."""
    found = {name: version for name, version in installed().items() if name.startswith("nvidia-dali-cuda")}
    if not found:
        yield bad("DALI", "not installed", "pip install -e . -c constraints.txt (Linux only)")
    elif len(found) > 1:
        yield bad("DALI", f"several: {', '.join(found)}", f"pip uninstall {' '.join(found)}, then install one again")
    else:
        ((name, version),) = found.items()
        yield ok("DALI", f"{name} {version}")


def installed() -> dict[str, str]:
    """Versions of all installed packages, by name in small letters."""
    return {str(package.metadata["Name"]).lower(): package.version for package in distributions()}


def open_ports(pids: set[int]) -> set[int]:
    """The TCP ports on which these processes listen on another interface than loopback."""
    inodes = {inode for pid in pids for inode in listeners.inodes_of(pid)}
    return {one.port for one in listeners.listening() if one.inode in inodes and not one.address.is_loopback}
