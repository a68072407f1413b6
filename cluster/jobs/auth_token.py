"""The token that a cluster asks for. It is never printed or logged, and never waited for where a file is a pipe."""

import contextlib
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import ClusterError

MAX_BYTES = 4096  # of a token file: a token has 64


@dataclass(frozen=True)
class Token:
    """A token and where it is from, in words."""

    text: str = field(repr=False)
    place: str


def token_path() -> Path:
    """The token file of clusters elsewhere: RAY_AUTH_TOKEN_PATH, else Ray's default ~/.ray/auth_token.

    Raises:
        ClusterError: there is no home folder.
    """
    try:
        return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    except RuntimeError:
        raise ClusterError("there is no home folder (HOME is not set): set HOME, or RAY_AUTH_TOKEN_PATH") from None


def find_token(path: Path | None = None) -> Token | None:
    """The token of a cluster; None if there is none.

    Args:
        path: the cluster's own file, of one that `up --local` started. None: looked for as Ray does, in RAY_AUTH_TOKEN,
            then in the file of `token_path`.

    Raises:
        ClusterError: the file is there and cannot be read, is empty, or holds something else.
    """
    if path is None:
        if text := os.environ.get("RAY_AUTH_TOKEN", "").strip():
            return Token(_checked(text, "RAY_AUTH_TOKEN"), "RAY_AUTH_TOKEN")
        path = token_path()
    try:
        text = _read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ClusterError(f"token file {path}: {error.strerror}; it must be a file that you can read") from error
    if not text:
        raise ClusterError(f"token file {path} is empty; delete it, and `python -m cluster up` makes a new one")
    return Token(_checked(text, f"token file {path}"), str(path))


def _read(path: Path) -> str:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe is not waited for
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(None, "it is no file")
        return stream.read(MAX_BYTES).decode(errors="replace").strip()


def _checked(text: str, place: str) -> str:
    """The token, if it can stand in a request's header."""
    if not all("!" <= mark <= "~" for mark in text):
        raise ClusterError(f"{place} holds no token: expected one word of ASCII; copy the cluster's again")
    return text


def mode_too_wide(path: Path) -> int | None:
    """The permission bits of `path` if group or others may touch it, else None."""
    mode = stat.S_IMODE(path.stat().st_mode)
    return mode if mode & 0o077 else None


def new_token(path: Path) -> None:
    """Write a new token in place of an old one, private from its first byte on: Ray itself writes it 0644.

    Raises:
        ClusterError: the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # never written through: it may be a link
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
    except OSError as error:
        raise ClusterError(f"token file {path}: {error.strerror or error}") from error


def ensure_token(path: Path) -> str:
    """Make sure that there is a token which only its owner can read; what was done in words ("" if nothing).

    Raises:
        ClusterError: the file cannot be made or read.
    """
    if find_token(path) is None:
        new_token(path)
        return "made a new token"
    if mode_too_wide(path) is not None:
        try:
            path.chmod(0o600)
        except OSError as error:
            raise ClusterError(f"token file {path}: {error.strerror or error}") from error
        return "made the token file readable for you only"
    return ""
