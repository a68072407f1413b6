"""What Ray needs of this machine or of the cluster, asked before anything is written. Imports no Ray.

Ray says most of it as an OSError of a path that the user never gave, or waits for minutes.
"""

import os
import re
import secrets
import socket
import tempfile
from pathlib import Path

from pipeline.config import PrepareOptions
from pipeline.errors import PipelineError

LOCAL = "local"
# Read when Ray is imported: its own handler would print a stack trace on SIGTERM.
BEFORE_RAY = {"RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1"}
CONNECT_S = 5.0
LOOPBACK = "127.0.0.1"
SOCKET_BYTES = 107  # the longest path of a Unix socket
LONGEST_NAME = "/ray/session_2026-11-27_10-24-00_123456_4194304/sockets/plasma_store"  # what Ray appends
FOLDER_FIX = "set RAY_TMPDIR to a local folder with a short path, for example RAY_TMPDIR=/tmp"
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def ray_address(options: PrepareOptions) -> tuple[str, str]:
    """The cluster's address, ``local`` for one of our own on this machine; and how it was given, for messages."""
    if options.address:
        return options.address, f"--address {options.address}"
    address = os.environ.get("RAY_ADDRESS") or LOCAL
    return address, f"RAY_ADDRESS={address} (unset it to work on this machine alone)"


def check_machine(options: PrepareOptions) -> None:
    """Refuses where Ray could not work.

    Raises:
        PipelineError: no cluster answers at the address, or this machine has no folder for Ray's sockets.
    """
    address, given = ray_address(options)
    if address == LOCAL:
        ray_folder()
        _check_loopback()
    found = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if not found:
        return  # "local" or "auto"
    try:
        socket.create_connection((found.group(1), int(found.group(2))), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:  # Ray itself would wait for minutes
        raise PipelineError(f"{given}: no Ray cluster answers there ({error})") from None


def ray_folder() -> Path:
    """The folder for sockets and logs of a Ray on this machine: ``ray`` in $RAY_TMPDIR, else in $TMPDIR, else in /tmp.

    Raises:
        PipelineError: it cannot hold them; the message names the variable to set.
    """
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "TMPDIR")
    folder = Path(os.environ.get(variable) or "/tmp")
    given = f"{variable} is {os.fsencode(folder).decode(errors='backslashreplace')}"
    longest = SOCKET_BYTES - len(LONGEST_NAME)
    size = len(os.fsencode(folder))
    if not folder.is_absolute() or os.fsencode(folder).decode(errors="replace") != str(folder):
        raise PipelineError(f"{given}: expected an absolute path in UTF-8; {FOLDER_FIX}")
    if size > longest:
        raise PipelineError(
            f"{given}: {size} bytes long, and the paths of Ray's sockets leave room for {longest}; {FOLDER_FIX}"
        )
    try:
        ours = folder / "ray" if (folder / "ray").exists() else folder
        with tempfile.TemporaryDirectory(prefix="probe-", dir=ours) as probe, socket.socket(socket.AF_UNIX) as end:
            end.bind(f"{probe}/socket")
    except OSError as error:
        raise PipelineError(f"{given}: Ray cannot make its sockets there ({error.strerror}); {FOLDER_FIX}") from None
    return folder / "ray"


def _check_loopback() -> None:
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=CONNECT_S).close()
    except OSError as error:
        raise PipelineError(
            f"no connection to {LOOPBACK} on this machine ({error.strerror}), and Ray needs some"
        ) from None


def token_environment() -> dict[str, str]:
    """A token for a Ray of our own, unless one is given: it would write one into HOME, which may not be writable."""
    if any(os.environ.get(name) for name in TOKEN_VARIABLES):
        return {}
    return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
