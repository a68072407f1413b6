"""Folders and files of this user alone: what lies in a place that others can write to is checked before it is believed.

Names in /tmp are anybody's. Whoever is there first may have left a folder, a link or a record for us, so a name that
can be guessed is used only if what has it is ours: its owner, its mode, and no link.
"""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

OTHERS = 0o077
OTHERS_WRITE = 0o022
RECORD_BYTES = 1 << 20  # records are a few hundred bytes


class NotPrivateError(Exception):
    """A folder or file that somebody else made, or may change; the text names it and says why."""


def runtime_folder() -> Path | None:
    """$XDG_RUNTIME_DIR, a folder of this user's session; None where there is none, or it is not private.

    It is often memory, so only small things belong there.
    """
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if not given.startswith("/"):
        return None
    try:
        check_folder(Path(given))
    except (NotPrivateError, OSError):  # left by ``su``: the other user's
        return None
    return Path(given)


@contextlib.contextmanager
def fresh_folder(purpose: str) -> Iterator[Path]:
    """A new folder that only this user can look into, removed at the end.

    Args:
        purpose: a word of its name.

    Raises:
        OSError: there is no place for it.
        NotPrivateError: the place for temporary files is one where others could exchange it.
    """
    place = runtime_folder()
    if place is None or not os.access(place, os.W_OK | os.X_OK):
        place = Path(tempfile.gettempdir())
        _check_place(place)
    folder = Path(tempfile.mkdtemp(prefix=f"twotower-{purpose}-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Makes a folder of this user alone under a name that can be guessed, or takes the one that is there.

    Raises:
        NotPrivateError: the one that is there is not ours, or is a link, or no folder.
        OSError: it cannot be made.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    _check(folder, folder.lstat(), stat.S_ISDIR, "a folder", may_have=OTHERS)
    folder.chmod(0o700)  # ours, and perhaps made under another umask
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Raises NotPrivateError where a folder is not this user's alone, or is a link; OSError where there is none."""
    _check(folder, folder.lstat(), stat.S_ISDIR, "a folder", may_have=0)
    _check_place(folder.parent)


def read_record(path: Path) -> bytes:
    """The content of a small file that only this user can have written.

    Raises:
        NotPrivateError: it is a link, no file, too large, or somebody else's, or others may write to it.
        OSError: there is none, or it cannot be read.
    """
    _check(path, path.lstat(), stat.S_ISREG, "a file", may_have=OTHERS & ~OTHERS_WRITE)
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)  # of what was opened: the name may have been given to another file since
        _check(path, found, stat.S_ISREG, "a file", may_have=OTHERS & ~OTHERS_WRITE)
        if found.st_nlink != 1:
            raise NotPrivateError(f"{path} has a second name elsewhere: expected a file of this user alone")
        if found.st_size > RECORD_BYTES:
            raise NotPrivateError(f"{path} has {found.st_size} bytes: expected a small record")
        return file.read(RECORD_BYTES)


def _check(path: Path, found: os.stat_result, kind: object, words: str, *, may_have: int) -> None:
    """Owner, kind and mode; ``may_have``: bits of others that it may have."""
    if stat.S_ISLNK(found.st_mode):
        raise NotPrivateError(f"{path} is a link: expected {words} of this user alone")
    if not kind(found.st_mode):  # type: ignore[operator]
        raise NotPrivateError(f"{path} is not {words}: expected one of this user alone")
    if found.st_uid != os.geteuid():
        raise NotPrivateError(f"{path} belongs to user {found.st_uid}: expected {words} of this user alone")
    if found.st_mode & OTHERS & ~may_have:
        raise NotPrivateError(f"{path} has mode {stat.S_IMODE(found.st_mode):04o}, so that others may use it")


def _check_place(place: Path) -> None:
    """Refuses a path on which somebody else could exchange a folder: others may write there, without the sticky bit."""
    for folder in (place, *place.parents):
        mode = folder.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise NotPrivateError(f"{folder} has mode {stat.S_IMODE(mode):04o}: anybody may exchange what is in it")
