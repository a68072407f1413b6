"""Which process of how many this is, as torchrun, Ray or a scheduler told it by the environment."""

import dataclasses
import os
import socket
from collections.abc import Mapping

from trainer.config import check_world
from trainer.errors import PeerError
from twotower.meeting import STORE

NEEDED = ("RANK", "WORLD_SIZE")
PLACES = (STORE, "MASTER_ADDR", "MASTER_PORT")  # where they meet: the file, or else both others
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
MOST_PORT = 65535


@dataclasses.dataclass(frozen=True)
class World:
    """Where a process stands among those that somebody else has started.

    Attributes:
        rank: 0 .. size - 1.
        size: processes in all, an even number.
        local_rank: number on this machine.
        local_size: processes on this machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


def read_world(processes: int | None, environment: Mapping[str, str] = os.environ) -> World | None:
    """The world that this process is to join; None where it is alone, or starts the others itself.

    RANK decides: without it the other variables mean nothing. WORLD_SIZE = 1 is no world.

    Args:
        processes: of ``--processes``: 1 means one, whatever the environment says; None where it was not given.
        environment: of this process.

    Raises:
        PeerError: naming the variable that is missing, or has a value that cannot be.
    """
    if processes == 1 or not environment.get("RANK"):
        return None
    unset = "; unset RANK, or say --processes 1, where nothing has started several processes"
    needed = NEEDED if environment.get(STORE) else (*NEEDED, *PLACES[1:])
    missing = [name for name in needed if not environment.get(name)]
    size = _number(environment, "WORLD_SIZE", unset, least=1) if environment.get("WORLD_SIZE") else None
    if size == 1:
        return None
    if missing or size is None:
        raise PeerError(f"RANK={environment['RANK']} is set, and {', '.join(missing)} not{unset}")
    rank = _number(environment, "RANK", unset, most=size - 1)
    if not environment.get(STORE):
        _number(environment, "MASTER_PORT", unset, least=1, most=MOST_PORT)
    try:
        check_world(size)
    except PeerError as error:
        raise PeerError(f"WORLD_SIZE={size}: {error}{unset}") from None
    check_interfaces(environment)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", unset, least=1, most=size, default=2)
    known = bool(environment.get("LOCAL_WORLD_SIZE"))
    local_rank = _number(
        environment, "LOCAL_RANK", unset, most=local_size - 1 if known else size - 1, default=rank % local_size
    )
    return World(rank, size, local_rank, local_size)


def _number(
    environment: Mapping[str, str],
    name: str,
    unset: str,
    *,
    least: int = 0,
    most: int | None = None,
    default: int | None = None,
) -> int:
    """The whole number in a variable.

    Raises:
        PeerError: it is none, or out of range.
    """
    text = environment.get(name) or (None if default is None else str(default))
    number = int(text) if text is not None and text.isascii() and text.isdigit() else -1
    if number < least or (most is not None and number > most):
        expected = f"a whole number from {least}" + (f" to {most}" if most is not None else "")
        raise PeerError(f"{name}={text}: expected {expected}{unset}")
    return number


def has_interface(names: str) -> bool:
    """Whether this machine has one of the network interfaces in a list as GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME
    have them: ``eth0,eth1``; NCCL's also ``^docker`` (any but these), ``=eth0`` (not its prefix).
    """
    here = [name for _, name in socket.if_nameindex()]
    if names.startswith("^"):
        return any(not name.startswith(tuple(names[1:].split(","))) for name in here)
    exact = names.removeprefix("=").split(",")
    return any(name in exact or (not names.startswith("=") and name.startswith(tuple(exact))) for name in here)


def check_interfaces(environment: Mapping[str, str]) -> None:
    """Checks what gloo and NCCL would look for.

    Raises:
        PeerError: naming the variable.
    """
    for name in INTERFACES:
        value = environment.get(name)
        if value and not has_interface(value):
            here = ", ".join(each for _, each in socket.if_nameindex())
            raise PeerError(f"{name}={value}: no such network interface here; there are {here}")
