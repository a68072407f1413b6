"""What is in a folder, to the byte: for tests that nothing in it has changed."""

import hashlib
from pathlib import Path


def tree(folder: Path) -> dict[str, tuple[object, ...]]:
    """Every entry by its path: mode, and of files the time of change and the content's hash; {} where nothing is."""
    return {str(path.relative_to(folder)): _facts(path) for path in sorted(folder.rglob("*"))}


def _facts(path: Path) -> tuple[object, ...]:
    found = path.lstat()
    if path.is_symlink():
        return (found.st_mode, str(path.readlink()))
    if path.is_dir():
        return (found.st_mode,)
    return (found.st_mode, found.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
