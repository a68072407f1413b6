"""What Ray needs of this machine or of the cluster, asked before anything is written. Imports no Ray.

Ray says most of it as an OSError of a path that the user never gave, or waits for minutes.
"""

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import signals
from pipeline.config import PrepareOptions
from pipeline.errors import PipelineError
from twotower.listeners import CONNECT_S, NO_PROXY, no_proxy_here, reach, stranger_words

LOCAL = "local"
# Read when Ray is imported: its own handler would print a stack trace on SIGTERM.
BEFORE_RAY = {"RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1"}
LOOPBACK = "127.0.0.1"
SOCKET_BYTES = 107  # the longest path of a Unix socket
PREFIX = "tt"  # of the folder of one session, to which tempfile adds 8 characters
LONGEST_NAME = (
    f"/{PREFIX}12345678/r/session_2026-11-27_10-24-00_123456_4194304/sockets/plasma_store"  # what Ray appends
)
FOLDER_FIX = "set RAY_TMPDIR to a local folder with a short path, for example RAY_TMPDIR=/tmp"
TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


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
    try:
        server = reach(address)
    except (OSError, OverflowError) as error:  # Ray itself would wait for minutes
        raise PipelineError(f"{given}: no Ray cluster answers there ({error})") from None
    if server:
        check_owner(*server, given)


def check_owner(host: str, port: int, given: str) -> None:
    """Refuses another user's program on this machine: Ray would send it the token, and run what it sends.

    Raises:
        PipelineError: naming the user.
    """
    if told := stranger_words(host, port):
        raise PipelineError(f"{given}: {told}")


def ray_folder() -> Path:
    """Where the folders of a Ray on this machine are made: $RAY_TMPDIR, else $TMPDIR, else /tmp.

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
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder) as probe, socket.socket(socket.AF_UNIX) as end:
            end.bind(f"{probe}/socket")
    except OSError as error:
        raise PipelineError(f"{given}: Ray cannot make its sockets there ({error.strerror}); {FOLDER_FIX}") from None
    return folder


def _check_loopback() -> None:
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=CONNECT_S).close()
    except OSError as error:
        raise PipelineError(
            f"no connection to {LOOPBACK} on this machine ({error.strerror}), and Ray needs some"
        ) from None


@dataclass
class Session:
    """What one Ray of our own has for itself.

    Attributes:
        folder: for sockets and logs; it lies in a folder that nobody else can enter, for Ray makes its own 0777.
        keep: whether the folder stays, for somebody to look at.
    """

    folder: Path
    keep: bool = False


@contextlib.contextmanager
def private_session() -> Iterator[Session]:
    """A folder and a token for one Ray of our own; both are gone at the end, and the environment is as it was.

    The token is a file, private from its first byte on, and Ray is told where: Ray would write one 0644 into HOME, and
    take it for all clusters. A token or an authentication mode of the user's is for other clusters.

    Raises:
        PipelineError: see `ray_folder`.
    """
    before = {name: os.environ.get(name) for name in (*TOKEN_VARIABLES, *NO_PROXY)}
    try:
        for name in TOKEN_VARIABLES:
            os.environ.pop(name, None)
        os.environ |= no_proxy_here(os.environ)
        private = Path(tempfile.mkdtemp(prefix=PREFIX, dir=ray_folder()))  # 0700
        signals.temporary.add(private)
        session = Session(private / "r")
        token = private / "token"
        handle = os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "w") as stream:
            stream.write(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        try:
            yield session
        finally:
            token.unlink(missing_ok=True)
            signals.temporary.discard(private)
            if not session.keep:
                shutil.rmtree(private, ignore_errors=True)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
