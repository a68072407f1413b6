"""What a run keeps of its loader: where the next batch begins, and what must be equal for it to mean the same samples.

Of a DALI checkpoint only the reader's state (20 bytes) and the iteration number are kept. DALI accepts a checkpoint
only from a pipeline of the very same operators, so one made on a CPU would not continue on a GPU, nor one with
``decode = "replicated"`` as ``sharded``; so the reader's state is put into a checkpoint that the new pipeline makes of
itself.
The format is DALI's protobuf ``Checkpoint``: field 1, repeated: an operator's name (1) and state (2); field 2: the
external context, which holds the iteration.
"""

import base64
from collections.abc import Iterator
from typing import Any

from pipeline.errors import DatasetError
from pipeline.loader.graph import Reader
from pipeline.loader.open_split import describe_keys

READER = b"Reader"
_OPERATOR, _CONTEXT = 0x0A, 0x12  # tags: field 1 and field 2, both length-delimited
_FORMAT = 3


def identity(reader: Reader) -> dict[str, Any]:
    """What must be equal for a state to mean the same samples; the recipe's other fields may change in mid-run."""
    return {
        "format": _FORMAT,
        "data set": reader.split.manifest.fingerprint,
        "skipped keys": describe_keys(reader.split.skipped),
        "batch size": reader.batch_size,
        "seed": reader.seed,
        "shuffle": reader.config.shuffle,
        "shuffle_buffer": reader.config.shuffle_buffer,
        "last_batch": reader.config.last_batch,
    }


def save(reader: Reader, *, epoch: int, position: int, iteration: int, checkpoint: bytes) -> dict[str, Any]:
    """A state, JSON-able.

    Args:
        reader: what is read.
        epoch, position: of the next batch, for people.
        iteration: DALI's number of it.
        checkpoint: of :func:`strip`.
    """
    place = {"epoch": epoch, "position": position, "iteration": iteration}
    return identity(reader) | place | {"dali": base64.b64encode(checkpoint).decode()}


def restore(reader: Reader, state: dict[str, Any]) -> tuple[bytes, int]:
    """The checkpoint and the iteration of a state.

    Raises:
        DatasetError: it belongs to another run, names what differs; or it is damaged.
    """
    for name, expected in identity(reader).items():
        if name == "data set" and state.get(name) != expected:  # its name is a hash, which tells nobody anything
            raise DatasetError(
                f"the loader's state was saved with another data set than {reader.split.folder}: "
                "give the one that the run was trained on, or start a new run"
            )
        if state.get(name) != expected:
            raise DatasetError(
                f"the loader's state was saved with {name} {state.get(name)!r}, and this run has {expected!r}: "
                "continue with the same, or start a new run"
            )
    try:
        return strip(base64.b64decode(state["dali"], validate=True)), int(state["iteration"])
    except (KeyError, ValueError, TypeError) as error:
        raise DatasetError(f"the loader's state is damaged ({type(error).__name__}: {error})") from None


def strip(checkpoint: bytes) -> bytes:
    """The reader's state and the context of a DALI checkpoint.

    Raises:
        ValueError: it is no checkpoint of a pipeline with our reader.
    """
    kept = [(tag, body) for tag, body in _fields(checkpoint) if tag == _CONTEXT or _name(tag, body) == READER]
    if [tag for tag, _ in kept] != [_OPERATOR, _CONTEXT]:
        raise ValueError("no state of the reader in it")
    return _join(kept)


def graft(fresh: bytes, stripped: bytes) -> bytes:
    """A checkpoint of a new pipeline, with the reader's state and the context of another.

    Args:
        fresh: the new pipeline's own checkpoint, before its first iteration.
        stripped: of :func:`strip`.

    Raises:
        ValueError: either is damaged.
    """
    (_, reader), (_, context) = _fields(strip(stripped))
    own = [body if _name(tag, body) != READER else reader for tag, body in _fields(fresh) if tag == _OPERATOR]
    return _join([*((_OPERATOR, body) for body in own), (_CONTEXT, context)])


def _name(tag: int, body: bytes) -> bytes:
    return next((value for field, value in _fields(body) if field == 0x0A), b"") if tag == _OPERATOR else b""


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each length-delimited field, in order."""
    place = 0
    while place < len(message):
        tag, place = message[place], place + 1
        size, place = _varint(message, place)
        if tag & 7 != 2 or place + size > len(message):
            raise ValueError("not a DALI checkpoint")
        yield tag, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A protobuf integer and the place after it."""
    value = shift = 0
    while place < len(message):
        byte, place = message[place], place + 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, place
    raise ValueError("not a DALI checkpoint")


def _join(fields: list[tuple[int, bytes]]) -> bytes:
    return b"".join(bytes([tag]) + _length(len(body)) + body for tag, body in fields)


def _length(value: int) -> bytes:
    digits = []
    while True:
        value, digit = value >> 7, value & 0x7F
        digits.append(digit | (0x80 if value else 0))
        if not value:
            return bytes(digits)
