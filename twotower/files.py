"""Opening files that others may have made: no link to a device or a pipe is waited for, and none is read without end."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_file(path: Path, *, follow: bool = True) -> BinaryIO:
    """Opens a regular file to read it, and nothing else by its name.

    Args:
        path: the file.
        follow: whether it may be a link to one.

    Raises:
        OSError: it is none, or cannot be opened; its ``strerror`` is for users.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(error.errno, "it is a link, which may lead anywhere", str(path)) from None
        raise
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, "it is not a file", str(path))
    return os.fdopen(handle, "rb")


def read_file(path: Path, most_bytes: int, *, follow: bool = True) -> bytes:
    """The content of a file, which is not read where it has more than ``most_bytes``; raises as :func:`open_file`."""
    with open_file(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most_bytes + 1) if size <= most_bytes else b""
        if max(size, len(content)) > most_bytes:  # files of /proc say that they have no size
            raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes, which none of its kind has", str(path))
        return content
