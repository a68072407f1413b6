"""The token that a cluster asks for. It is never printed or logged."""

import os
import secrets
import stat
from pathlib import Path

from cluster.errors import ClusterError


def token_path() -> Path:
    """The token file: RAY_AUTH_TOKEN_PATH, else Ray's default ~/.ray/auth_token.

    Raises:
        ClusterError: there is no home folder.
    """
    try:
        return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    except RuntimeError:
        raise ClusterError("there is no home folder (HOME is not set): set HOME, or RAY_AUTH_TOKEN_PATH") from None


def read_token() -> str | None:
    """The token, looked for as Ray does: RAY_AUTH_TOKEN, then the file; None if there is none.

    Raises:
        ClusterError: the file is there and cannot be read, is empty, or holds something else.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return _checked(token, "RAY_AUTH_TOKEN")
    path = token_path()
    try:
        token = path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ClusterError(f"token file {path}: {error.strerror}; it must be a file that you can read") from error
    if not token:
        raise ClusterError(f"token file {path} is empty; delete it, and `python -m cluster up --local` makes a new one")
    return _checked(token, f"token file {path}")


def _checked(token: str, place: str) -> str:
    """The token, if it can stand in a request's header."""
    if not all("!" <= mark <= "~" for mark in token):
        raise ClusterError(f"{place} holds no token: expected one word of ASCII; copy the cluster's again")
    return token


def mode_too_wide(path: Path) -> int | None:
    """The permission bits of `path` if group or others may touch it, else None."""
    mode = stat.S_IMODE(path.stat().st_mode)
    return mode if mode & 0o077 else None


def ensure_token() -> tuple[Path, str]:
    """Make sure that there is a token which only its owner can read.

    Returns:
        The token file, and what was done in words ("" if nothing).

    Raises:
        ClusterError: the file cannot be made or read.
    """
    path = token_path()
    if os.environ.get("RAY_AUTH_TOKEN"):
        return path, ""
    try:
        if read_token() is None:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)  # private from its first byte on
            with os.fdopen(descriptor, "w") as stream:
                stream.write(secrets.token_hex(32))
            return path, "made a new token"
        if mode_too_wide(path) is not None:
            path.chmod(0o600)  # Ray itself writes it 0644 under the usual umask
            return path, "made the token file readable for you only"
    except OSError as error:
        raise ClusterError(f"token file {path}: {error.strerror or error}") from error
    return path, ""
