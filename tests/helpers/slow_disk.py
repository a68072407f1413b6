"""A file system that is slow on purpose: a folder seen through FUSE, read at so many bytes a second and never cached.

    python tests/helpers/slow_disk.py SOURCE MOUNT 2.5          serves SOURCE at MOUNT with 2.5 MB/s until it is ended

Speaks the kernel's protocol (``linux/fuse.h``, version 7) on ``/dev/fuse`` itself, read-only: no library is needed.
"""

import contextlib
import ctypes
import errno
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 14, 15, 17, 18
FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, INTERRUPT, BATCH_FORGET = 25, 26, 27, 28, 29, 36, 42
DIRECT_IO = 1  # every read comes to us, nothing is cached
MNT_DETACH = 2
HEADER = struct.Struct("<IIQQIIII")
VALID_S = 3600


class SlowDisk:
    """Answers the kernel's requests.

    Args:
        device: descriptor of ``/dev/fuse``.
        source: what is shown.
        bytes_per_s: how fast it can be read.
    """

    def __init__(self, device: int, source: Path, bytes_per_s: float) -> None:
        self.device, self.bytes_per_s, self.free_at = device, bytes_per_s, 0.0
        self.paths = {1: source}
        self.nodes = {source: 1}
        self.handlers = {
            INIT: self.init, LOOKUP: self.lookup, GETATTR: self.getattr, OPEN: self.open, OPENDIR: self.open,
            READ: self.read, READDIR: self.readdir, STATFS: lambda *_: b"\0" * 80,
            RELEASE: lambda *_: b"", RELEASEDIR: lambda *_: b"", FLUSH: lambda *_: b"",
        }  # fmt: skip

    def serve(self) -> None:
        """Until the file system is unmounted."""
        while True:
            try:
                request = os.read(self.device, 1 << 21)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                raise
            _, operation, unique, node, *_ = HEADER.unpack_from(request)
            if operation in (FORGET, BATCH_FORGET, INTERRUPT):
                continue
            code, body = errno.ENOSYS, b""
            if operation in self.handlers:
                try:
                    code, body = 0, self.handlers[operation](node, request[HEADER.size :])
                except OSError as error:
                    code = error.errno or errno.EIO
            os.write(self.device, struct.pack("<IiQ", 16 + len(body), -code, unique) + body)

    def init(self, _node: int, body: bytes) -> bytes:
        """Version 7.31, no options."""
        readahead = struct.unpack_from("<III", body)[2]
        return struct.pack("<IIIIHHIIHHI28x", 7, 31, readahead, 0, 8, 6, 1 << 17, 1, 32, 0, 0)

    def _attributes(self, node: int) -> bytes:
        found = self.paths[node].stat()
        times = (int(found.st_mtime),) * 3
        blocks = (found.st_size + 511) // 512
        return struct.pack(
            "<QQQQQQIIIIIIIIII",
            *(node, found.st_size, blocks, *times, 0, 0, 0, found.st_mode, found.st_nlink),
            *(os.getuid(), os.getgid(), 0, 4096, 0),
        )

    def lookup(self, node: int, body: bytes) -> bytes:
        """A name in a folder."""
        path = self.paths[node] / os.fsdecode(body.rstrip(b"\0"))
        path.stat()
        found = self.nodes.setdefault(path, len(self.nodes) + 1)
        self.paths[found] = path
        return struct.pack("<QQQQII", found, 0, VALID_S, VALID_S, 0, 0) + self._attributes(found)

    def getattr(self, node: int, _body: bytes) -> bytes:
        """Size, times, mode."""
        return struct.pack("<QII", VALID_S, 0, 0) + self._attributes(node)

    def open(self, node: int, _body: bytes) -> bytes:
        """The node is its own handle."""
        return struct.pack("<QII", node, DIRECT_IO, 0)

    def read(self, node: int, body: bytes) -> bytes:
        """Bytes of a file, not before their time."""
        _, offset, size = struct.unpack_from("<QQI", body)
        with self.paths[node].open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        now = time.monotonic()
        self.free_at = max(now, self.free_at) + len(data) / self.bytes_per_s
        time.sleep(self.free_at - now)
        return data

    def readdir(self, node: int, body: bytes) -> bytes:
        """Entries from an offset on, as many as fit."""
        _, offset, size = struct.unpack_from("<QQI", body)
        found = b""
        for number, path in enumerate(sorted(self.paths[node].iterdir()), start=1):
            name = os.fsencode(path.name)
            entry = (
                struct.pack("<QQII", 1000 + number, number, len(name), stat.S_IFMT(path.stat().st_mode) >> 12) + name
            )
            entry += b"\0" * (-len(entry) % 8)
            if number > offset and len(found) + len(entry) <= size:
                found += entry
        return found


def main(source: str, mount: str, mb_per_s: str) -> None:
    """Mounts, says so, serves."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    if libc.mount(b"slow", os.fsencode(mount), b"fuse", 7, options.encode()):  # read-only, no suid, no devices
        sys.exit(f"cannot mount: {os.strerror(ctypes.get_errno())}")
    signal.signal(signal.SIGTERM, lambda *_: libc.umount2(os.fsencode(mount), MNT_DETACH))
    print("mounted", flush=True)
    SlowDisk(device, Path(source), float(mb_per_s) * 1e6).serve()


@contextlib.contextmanager
def slow_disk(source: Path, mount: Path, mb_per_s: float) -> Iterator[None]:
    """``source`` at ``mount``, slowly.

    Raises:
        OSError: this machine or container does not let us mount.
    """
    mount.mkdir()
    command = [sys.executable, __file__, str(source), str(mount), str(mb_per_s)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None and server.stderr is not None
        if server.stdout.readline() != "mounted\n":
            raise OSError(server.stderr.read().strip().splitlines()[-1])
        yield
    finally:
        ctypes.CDLL(None).umount2(os.fsencode(mount), MNT_DETACH)
        server.terminate()
        server.wait(20)
        for stream in (server.stdout, server.stderr):
            if stream:
                stream.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
