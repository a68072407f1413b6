"""Secrets of a job (`submit --secret`): variables that stand neither in Ray's records of it nor in its logs.

A job's variables (`--env`) and its command are shown by Ray's dashboard and Jobs API, and are written to logs on every
node. So a secret travels in two halves, of which each alone is noise: random bytes in a variable of the job, and the
secret's bits, flipped by them, in the cluster's store of packages. Every process of the job puts them together when it
starts, and has the secret in its environment, as where there is no cluster; the half in the store is deleted when the
job ends. Who has the cluster's token can run code as the job does, and so can read all that the job can.
"""

import base64
import contextlib
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError

VARIABLE = "TWOTOWER_SECRETS"  # of a job: the store's key and the random half
HOOK = "cluster.jobs.job_secrets.load"  # what every worker of a job calls when it starts
MAX_BYTES = 64 << 10
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_secrets(words: Sequence[str]) -> dict[str, str]:
    """The secrets that `--secret NAME` and `--secret NAME=@FILE` name; a file's last newline is no part of it.

    Raises:
        ClusterError: naming the option and never the secret.
    """
    found = {}
    for word in words:
        name, equals, source = word.partition("=")
        if not _NAME.fullmatch(name) or (equals and not source.startswith("@")):
            shown = name if _NAME.fullmatch(name) else "..."
            raise ClusterError(
                f"--secret {shown}: expected NAME (of a variable here) or NAME=@FILE: everyone on this machine sees a "
                "secret in a command line"
            )
        value = _from_file(name, Path(source[1:])) if equals else os.environ.get(name)
        if not value:
            raise ClusterError(f"--secret {name}: it is {'empty' if equals or name in os.environ else 'not set'} here")
        if "\0" in value or len(os.fsencode(value)) > MAX_BYTES:
            raise ClusterError(f"--secret {name}: expected text of at most {MAX_BYTES >> 10} KiB, without null bytes")
        found[name] = value
    return found


def _from_file(name: str, path: Path) -> str:
    try:
        handle = os.open(path.expanduser(), os.O_RDONLY)
        with os.fdopen(handle, "rb") as stream:
            return stream.read(MAX_BYTES + 2).decode().removesuffix("\n").removesuffix("\r")
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else "there is no home folder"
        raise ClusterError(f"--secret {name}: file {path}: {why}") from None
    except UnicodeDecodeError:
        raise ClusterError(f"--secret {name}: file {path} is no text in UTF-8") from None


def split(found: Mapping[str, str]) -> tuple[str, bytes, str]:
    """The halves of a job's secrets.

    Returns:
        The store's key, the half that goes there, and the value of VARIABLE.
    """
    plain = json.dumps(dict(found)).encode()
    pad = secrets.token_bytes(len(plain))
    key = f"_ray_pkg_{secrets.token_hex(16)}.zip"  # as a package's: nothing else is stored by HTTP
    return key, _flipped(plain, pad), f"{key}:{base64.b64encode(pad).decode()}"


def join(stored: bytes, value: str) -> dict[str, str]:
    """The secrets from their halves, see `split`."""
    pad = base64.b64decode(value.partition(":")[2])
    return dict(json.loads(_flipped(stored, pad)))


def _flipped(data: bytes, pad: bytes) -> bytes:
    return bytes(one ^ other for one, other in zip(data, pad, strict=True))


def load() -> None:
    """Put the job's secrets into this process's environment; nothing outside a job that has some."""
    value = os.environ.get(VARIABLE)
    if not value:
        return
    stored = _store().internal_kv_get(_key(value), None)
    if stored is not None:  # None: the job has ended
        os.environ.update(join(stored, value))


def forget() -> None:
    """Delete the half in the cluster's store: the job is over."""
    if value := os.environ.get(VARIABLE):
        with contextlib.suppress(Exception):  # the cluster is going away, and the half with it
            _store().internal_kv_del(_key(value), False, None)


def _key(value: str) -> bytes:
    return f"gcs://{value.partition(':')[0]}".encode()


def _store() -> Any:
    """The cluster's store, through this worker's connection, or one of its own in the job's first process."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # half a second: only in a job with secrets
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    return internal_kv_get_gcs_client() or GcsClient(address=os.environ["RAY_ADDRESS"])
