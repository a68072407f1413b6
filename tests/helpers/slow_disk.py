"""Files that are slow on purpose: read at so many bytes per second and never cached, whoever reads them.

A tar is covered by a FUSE file system whose root is one file. So no names, folders or inodes are needed, and no
library: six requests of the kernel's protocol (``linux/fuse.h``, version 7) are answered here. Nothing simpler slows
DALI's reader, which reads in C++: a pipe cannot seek, and block devices and control groups take a real disk.
"""

import contextlib
import ctypes
import multiprocessing
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

GETATTR, OPEN, READ, RELEASE, FLUSH, INIT = 3, 14, 15, 18, 25, 26
DIRECT_IO = 1  # every read comes to us, nothing is cached
READ_ONLY, DETACH = 1, 2  # flags of mount and of umount2
HEADER = struct.Struct("<IIQQIIII")


def serve(device: int, data: bytes, bytes_per_s: float) -> None:
    """Answers the kernel's requests about one file until it is unmounted."""
    attributes = struct.pack(
        "<QQQQQQIIIIIIIIII", 1, len(data), len(data) // 512 + 1, 0, 0, 0, 0, 0, 0, 0o100444, 1, *(0, 0, 0, 4096, 0)
    )
    answers = {
        INIT: struct.pack("<IIIIHHIIHHI28x", 7, 31, 1 << 17, 0, 8, 6, 1 << 17, 1, 32, 0, 0),
        GETATTR: struct.pack("<QII", 3600, 0, 0) + attributes,
        OPEN: struct.pack("<QII", 1, DIRECT_IO, 0),
        RELEASE: b"",
        FLUSH: b"",
    }
    free_at = 0.0
    while True:
        try:
            request = os.read(device, 1 << 21)
        except OSError:  # unmounted
            return
        _, operation, unique, *_ = HEADER.unpack_from(request)
        body = answers.get(operation)
        if operation == READ:
            _, offset, size = struct.unpack_from("<QQI", request, HEADER.size)
            body, now = data[offset : offset + size], time.monotonic()
            free_at = max(now, free_at) + len(body) / bytes_per_s
            time.sleep(free_at - now)
        code = 0 if body is not None else -38  # ENOSYS
        with contextlib.suppress(OSError):  # whoever asked has gone
            os.write(device, struct.pack("<IiQ", 16 + len(body or b""), code, unique) + (body or b""))


@contextlib.contextmanager
def slow_file(path: Path, mb_per_s: float) -> Iterator[None]:
    """Makes a file slow.

    Raises:
        OSError: this machine or container does not let us mount.
    """
    libc, target = ctypes.CDLL(None, use_errno=True), os.fsencode(path)
    data, device = path.read_bytes(), os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=100000,user_id={os.getuid()},group_id={os.getgid()}"
    if libc.mount(b"slow", target, b"fuse", READ_ONLY, options.encode()):
        os.close(device)
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    server = multiprocessing.get_context("fork").Process(target=serve, args=(device, data, mb_per_s * 1e6), daemon=True)
    server.start()
    os.close(device)
    try:
        yield
    finally:
        libc.umount2(target, DETACH)
        server.kill()
        server.join()
