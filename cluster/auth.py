"""The token of Ray's authentication: where it lies, who may read it. The token itself is never printed or logged."""

import os
import secrets
import stat
from pathlib import Path

from cluster.errors import ClusterError


def token_path() -> Path:
    """The token file: RAY_AUTH_TOKEN_PATH, else Ray's default ~/.ray/auth_token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def read_token() -> str | None:
    """The token in Ray's own order: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token; None if there is none.

    Raises:
        ClusterError: the file is there and cannot be read, or is empty.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = token_path()
    try:
        token = path.read_text().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ClusterError(f"token file {path}: {error.strerror}; it must be a file that you can read") from error
    if not token:
        raise ClusterError(f"token file {path} is empty; delete it, and `python -m cluster up --local` makes a new one")
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
            _create(path)
            return path, "made a new token"
        if mode_too_wide(path) is not None:
            path.chmod(0o600)  # Ray itself writes it 0644 under the usual umask
            return path, "made the token file readable for you only"
    except OSError as error:
        raise ClusterError(f"token file {path}: {error.strerror or error}") from error
    return path, ""


def _create(path: Path) -> None:
    """Write a new token of 256 bits with mode 0600 from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secrets.token_hex(32))
