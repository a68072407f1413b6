"""What processes tell each other besides tensors, as JSON bytes; and the proof that each knows the run's secret.

Nothing here is pickle: whoever answers in the place of a tower can send wrong numbers, and no program. PyTorch's own
``all_gather_object`` unpickles what it gets.
"""

import hashlib
import hmac
import json
import os
import secrets
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import PeerError
from twotower.meeting import SECRET
from twotower.untrusted import parse_json
from twotower.words import one_line

MOST_BYTES = 1 << 20  # of what a process tells at the start; a recipe has a few thousand
NONCE_BYTES = 16
Group = dist.ProcessGroup | None


def store_prefix(start: str) -> str:
    """Where the keys of a start lie in the store: who does not know the secret does not find the others."""
    return f"start-{start}" + (f"-{_sign(b'store ' + start.encode()).hex()}" if os.environ.get(SECRET) else "")


def prove_secret(group: Group) -> None:
    """Every process of a gloo group shows that it knows the run's secret, by a MAC of fresh numbers: nobody sees it.

    Between a port that is open and the peer that is meant somebody else may come. All members must call it; without
    a secret (``TWOTOWER_SECRET``) nothing is asked.

    Raises:
        PeerError: one does not know it.
    """
    if not os.environ.get(SECRET):
        return
    rank = dist.get_rank(group)
    nonces = b"".join(all_gather_bytes(secrets.token_bytes(NONCE_BYTES), group))
    for number, answer in enumerate(all_gather_bytes(_sign(nonces + rank.to_bytes(4)), group)):
        if not hmac.compare_digest(answer, _sign(nonces + number.to_bytes(4))):
            raise PeerError(
                f"who answers in the place of process {number} does not know the secret of this run ({SECRET}): "
                "another program has come between the towers; start again, on a network or a machine that you trust"
            )


def _sign(message: bytes) -> bytes:
    return hmac.new(os.environ[SECRET].encode(errors="surrogateescape"), message, hashlib.sha256).digest()


def all_gather_bytes(mine: bytes, group: Group) -> list[bytes]:
    """The bytes of all processes of a gloo group, by rank; as many from each."""
    everyone = [torch.zeros(len(mine), dtype=torch.uint8) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, _tensor(mine), group=group)
    return [bytes(found.tolist()) for found in everyone]


def all_gather_json(mine: Any, group: Group) -> list[Any]:
    """What all processes of a gloo group tell, by rank.

    Raises:
        PeerError: one sent too much, or no JSON.
    """
    text = json.dumps(mine).encode()
    lengths = [int.from_bytes(found, "little") for found in all_gather_bytes(len(text).to_bytes(8, "little"), group)]
    for rank, length in enumerate(lengths):
        if length > MOST_BYTES:
            raise PeerError(f"process {rank} would send {length} bytes at the start: expected at most {MOST_BYTES}")
    padded = all_gather_bytes(text.ljust(max(lengths)), group)  # spaces: nothing in JSON
    return [_parse(rank, found) for rank, found in enumerate(padded)]


def _parse(rank: int, text: bytes) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise PeerError(f"process {rank} does not tell JSON at the start: {one_line(str(error)[:80])}") from None


def _tensor(found: bytes) -> Tensor:
    return torch.frombuffer(bytearray(found), dtype=torch.uint8) if found else torch.zeros(0, dtype=torch.uint8)
