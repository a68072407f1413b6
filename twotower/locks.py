"""The lock of a folder that one process writes: a data set while it is prepared, a run while it is trained.

flock itself and not filelock, which opens the file for writing only: who merely asks (:func:`is_held`) may not be able
to write the folder. The kernel lets go of a lock when the last process that holds its handle ends, however it ends; an
NFS server does so too.
"""

import errno
import fcntl
import os
import stat
import time
from pathlib import Path

ATTEMPTS, PAUSE_S = 3, 0.05
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without locks


def hold(path: Path) -> int | None:
    """Makes, opens and locks a file; opens it again if the last holder removed it meanwhile.

    Returns:
        The handle, to be closed where the lock ends; None where another process holds it.

    Raises:
        OSError: the file cannot be made; or its file system has no locks (:func:`has_no_locks`).
    """
    attempts = 0
    while True:
        handle = make(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            attempts += 1
            if attempts == ATTEMPTS:
                os.close(handle)
                return None
            time.sleep(PAUSE_S)  # perhaps somebody has only asked
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def make(path: Path) -> int:
    """Opens a lock's file to read and write, and makes it where there is none.

    Raises:
        OSError: it cannot be; or it is a link, a pipe or a device, which whoever made the folder has put there.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(error.errno, f"{path.name} is a link", str(path)) from None
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, f"{path.name} is not a file", str(path))


def is_held(path: Path) -> bool:
    """Tells whether a process holds the lock; False where there is none, or it cannot be asked."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if not has_no_locks(error):
            raise
    finally:
        os.close(handle)
    return False


def has_no_locks(error: OSError) -> bool:
    """Tells a file system without locks from other errors of :func:`hold`."""
    return error.errno in _NO_LOCKS
