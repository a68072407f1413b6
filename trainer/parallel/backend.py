"""Which library carries tensors between processes: NCCL where each can have its GPU in NCCL's eyes, gloo otherwise.

NCCL refuses two ranks on one GPU, unless it believes them on two hosts (each has another ``NCCL_HOSTID``), or it is
told to allow it (``NCCL_MULTI_RANK_GPU_ENABLE=1``, from 2.30 on). No process can see that of itself: each tells the
others where it stands, in the store that they meet in, and all come to the same decision from the same facts.
"""

import dataclasses
import datetime
import itertools
import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from trainer.errors import PeerError
from twotower.untrusted import parse_json
from twotower.words import one_line

BACKENDS = ("auto", "nccl", "gloo")  # of --backend
MULTI_RANK = "NCCL_MULTI_RANK_GPU_ENABLE"
MULTI_RANK_SINCE = (2, 30)
HOST_ID = "NCCL_HOSTID"
ON_ONE_HOST = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}  # ranks that only pretend to be on several hosts


@dataclasses.dataclass(frozen=True)
class Standing:
    """What decides for one process.

    Attributes:
        asked: of ``BACKENDS``.
        gpu: its GPU's own number (UUID); empty on a CPU.
        host: ``NCCL_HOSTID``, or empty.
        shares: its NCCL takes several ranks on one GPU.
    """

    asked: str
    gpu: str
    host: str
    shares: bool


def standing_of(asked: str, device: str, environment: Mapping[str, str] = os.environ) -> Standing:
    """This process's own; ``device``: ``cpu`` or ``cuda:N``."""
    gpu = ""
    if device.startswith("cuda") and dist.is_nccl_available():
        properties = torch.cuda.get_device_properties(device)
        gpu = str(getattr(properties, "uuid", device))
    return Standing(asked, gpu, environment.get(HOST_ID, ""), takes_several_ranks(environment))


def takes_several_ranks(environment: Mapping[str, str]) -> bool:
    """Whether NCCL allows several ranks on one GPU here."""
    return environment.get(MULTI_RANK) == "1" and nccl_version() >= MULTI_RANK_SINCE


def nccl_version() -> tuple[int, ...]:
    """NCCL's, as (2, 30, 7); (0,) where torch was built without it."""
    if not dist.is_nccl_available():
        return (0,)
    found = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return tuple(found) if isinstance(found, tuple) else (found // 1000, found // 100 % 10)


def decide(standings: Sequence[Standing]) -> str:
    """``nccl`` or ``gloo``, for all processes; by rank.

    Raises:
        PeerError: they are not asked for the same, or for what cannot be.
    """
    asked = {each.asked for each in standings}
    if len(asked) > 1:
        told = ", ".join(f"rank {rank} {each.asked}" for rank, each in enumerate(standings))
        raise PeerError(f"--backend is not the same in all processes: {told}")
    why_not = _why_not_nccl(standings)
    if "nccl" in asked and why_not:
        raise PeerError(f"--backend nccl: {why_not}; leave --backend out, or say --backend gloo")
    return "gloo" if "gloo" in asked or why_not else "nccl"


def _why_not_nccl(standings: Sequence[Standing]) -> str:
    """What NCCL would refuse; empty where it takes all of them."""
    for rank, each in enumerate(standings):
        if not each.gpu:
            return f"rank {rank} has no GPU"
    for (a, one), (b, other) in itertools.combinations(enumerate(standings), 2):
        if (one.gpu, one.host) == (other.gpu, other.host) and not (one.shares and other.shares):
            return (
                f"ranks {a} and {b} are on one GPU, and NCCL takes one rank a GPU, unless each has another {HOST_ID} "
                f"(with {', '.join(f'{name}={value}' for name, value in ON_ONE_HOST.items())}), or, from version "
                f"{'.'.join(map(str, MULTI_RANK_SINCE))} on, with {MULTI_RANK}=1"
            )
    return ""


def agree(store: Any, rank: int, world: int, mine: Standing) -> str:
    """:func:`decide` by what all processes tell; every one must call it.

    Args:
        store: that they meet in.
        rank: this process's.
        world: how many there are.
        mine: where this one stands.

    Raises:
        PeerError: as of :func:`decide`, or one tells something else.
        RuntimeError: one does not come.
    """
    store.set(f"standing-{rank}", json.dumps(dataclasses.astuple(mine)))
    return decide([_parse(other, store.get(f"standing-{other}")) for other in range(world)])


def _parse(rank: int, text: bytes) -> Standing:
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    match found:
        case [str(asked), str(gpu), str(host), bool(shares)] if asked in BACKENDS:
            return Standing(asked, gpu, host, shares)
    shown = one_line(text[:80].decode(errors="backslashreplace"))
    raise PeerError(f"rank {rank} does not tell which GPU it has: is it of the same version? it tells {shown!r}")


def nccl_environment(rank: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What NCCL needs besides for a tower that is started beside others on one GPU; empty where it is told already.

    Only for who asks for NCCL by name: gloo serves as well there, and is sure to.

    Args:
        rank: the tower's.
        environment: the launcher's; what the user has said there is left as it is.
    """
    if takes_several_ranks(environment):
        return {}
    given = {name: environment.get(name) or value for name, value in ON_ONE_HOST.items()}
    return {HOST_ID: f"{environment.get(HOST_ID) or 'twotower'}-{rank}"} | given


def _nccl(group: Any) -> Any:
    """What torch calls the backend of a group."""
    return group._get_backend(torch.device("cuda"))


def fault_of(groups: Sequence[Any]) -> str:
    """What NCCL, or torch's watchdog of it, has found wrong; empty while all is well."""
    for group in groups:
        error = getattr(_nccl(group), "get_error", lambda: None)()
        if error is not None and error.name != "SUCCESS":
            return str(error.name).lower().replace("_", " ")
    return ""


def abort_groups(groups: Sequence[Any]) -> None:
    """Ends communicators without their peers, each in a thread: one may wait for another."""
    threads = [threading.Thread(target=_nccl(group).abort, daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def reason_of(error: Exception) -> str:
    """An exception in a line; NCCL's own words stand at the end of it, and what torch says of them before."""
    told, _, ncclss = str(error).partition("Last error:")
    lines = (ncclss.strip() or told).splitlines()
    return lines[0] if lines else type(error).__name__


def set_timeout(timeout: datetime.timedelta, group: dist.ProcessGroup) -> None:
    """``dist.set_timeout``, which older versions of torch have under another name."""
    change = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    change(timeout, group)
