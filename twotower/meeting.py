"""Where towers meet: a file of this user alone where all are on one machine, and a secret that all of a run know.

A port can be asked by every user of the machine, and PyTorch's store has no passwords. So towers that we start on one
machine find each other in a file; those on several machines need a port, and show each other that they know the secret
(``trainer.parallel.proof``).
"""

import contextlib
import os
import secrets
from collections.abc import Iterator

from twotower.private import fresh_folder

STORE = "TWOTOWER_STORE"  # path of the file
SECRET = "TWOTOWER_SECRET"  # any text; the same in all processes of a run


def new_secret() -> str:
    """The secret of a run: the user's, or one that nobody has guessed, 256 bits."""
    return os.environ.get(SECRET) or secrets.token_hex(32)


@contextlib.contextmanager
def meeting_place() -> Iterator[dict[str, str]]:
    """The variables that towers of one machine need to find each other; what they name is removed at the end.

    Raises:
        OSError, NotPrivateError: there is no place for a file of this user alone.
    """
    with fresh_folder("towers") as folder:
        yield {STORE: str(folder / "store"), SECRET: new_secret()}
