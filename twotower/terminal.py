"""stdout and stderr whose reader may go away: ``| head``, a terminal that is closed, ``> /dev/full``.

Left alone, Python raises an error out of whichever ``print`` comes next, and a training run would end for the sake of a
progress line. Here what nobody can read is dropped, once and for all, and the command goes on.
"""

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any

from twotower.addresses import masked
from twotower.words import MOST_OF_A_LINE, cut, one_line

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # of a pipe, of a terminal, of a descriptor
_LOST: dict[int, OSError] = {}
_NOTES: list[str] = []


class _Descriptor(io.FileIO):
    """A file descriptor that always takes what is written to it."""

    def write(self, data: Any, /) -> int:
        """Writes, or drops from the first failure on; waits where the other end is slow and does not block."""
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])
            return written
        except OSError as error:
            _drop(self.fileno(), error)
            return memoryview(data).nbytes


def _drop(number: int, error: OSError) -> None:
    """From now on everything that is written to a descriptor vanishes, also what libraries and new processes write."""
    _LOST[number] = error
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
    for note in _NOTES if number == 1 else ():
        text = f"warning: stdout cannot be written ({error.strerror}): {note}\n"
        with contextlib.suppress(OSError):  # not sys.stderr, which a progress bar lets go through stdout
            os.write(2, text.encode(errors="backslashreplace"))


def print_error(error: object) -> None:
    """The one place where a command says what is wrong: a line of its own, whatever names and addresses are in it."""
    print(f"error: {cut(one_line(masked(str(error))), MOST_OF_A_LINE)}", file=sys.stderr, flush=True)


def warn(text: object) -> None:
    """The same for what a user should know although the command goes on."""
    print(f"warning: {one_line(masked(str(text)))}", file=sys.stderr, flush=True)


def warn_of_loss(note: str) -> None:
    """What to say on stderr, at the moment when stdout is lost."""
    _NOTES.append(note)


def protect() -> None:
    """Makes this process's stdout and stderr safe to write to, whatever becomes of their readers.

    A descriptor that was closed from the start (``>&-``) is opened on nothing, or the next file would get its number,
    and whatever a library prints. A character that the terminal's encoding lacks is written as its number.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    sys.stdout = _protected(sys.stdout, 1)
    sys.stderr = _protected(sys.stderr, 2)


def _protected(old: Any, number: int) -> io.TextIOWrapper:
    """A text stream on a descriptor, as Python made the old one; that is None where the descriptor was closed."""
    if old is not None:
        old.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(number, "w", closefd=False)),
        encoding=old.encoding if old else "utf-8",
        errors="backslashreplace",
        line_buffering=number == 2 or (old is not None and old.line_buffering),
        write_through=old is not None and old.write_through,
    )


def lost_output() -> OSError | None:
    """Why stdout takes nothing any more; None where it still does."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    return _LOST.get(1)


def delivered(status: int) -> int:
    """The status of a command that is called for its output: 2 where a full disk lost that and all else went well."""
    lost = lost_output()
    if lost is None or is_gone(lost) or status:
        return status
    why = f"error: the output cannot be written ({lost.strerror}), but the command has done its work"
    print(why, file=sys.stderr)
    return 2


def is_gone(error: OSError) -> bool:
    """Whether a reader went away, as ``head`` does when it has seen enough; otherwise somebody wants the output."""
    return error.errno in GONE
