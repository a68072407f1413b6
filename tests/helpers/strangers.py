"""Another user of this machine, played by root: a program of his that listens on a port, and notes what it is sent."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator

NOBODY = 65534


@contextlib.contextmanager
def strangers_port(answer: bytes = b"", host: str = "127.0.0.1") -> Iterator[int]:
    """A port on which another user's process listens; it gives every connection the same bytes."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        server = socket.create_server((host, 0))
        os.write(told, str(server.getsockname()[1]).encode())
        os.close(told)
        while True:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                if answer:
                    connection.recv(65536)
                    connection.sendall(answer)
    os.close(told)
    try:
        with os.fdopen(ready) as stream:
            yield int(stream.read())
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
