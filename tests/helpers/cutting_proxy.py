"""A proxy before a dashboard that cuts the connections over which logs are followed, as proxies on the way do."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlparse

STREAM = b"/api/v0/logs/stream"
STEP_BYTES = 600  # the first connection ends after so many bytes of the answer, the next after twice as many, ...


@dataclass
class Proxy:
    """Its address, and how often it has cut."""

    address: str
    cuts: int = 0


@contextlib.contextmanager
def cutting_proxy(target: str) -> Iterator[Proxy]:
    """Passes everything on to `target`, http://HOST:PORT."""
    url = urlparse(target)
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = Proxy(f"http://127.0.0.1:{server.getsockname()[1]}")
        place = (url.hostname or "", url.port or 0)
        threading.Thread(target=_accept, args=(server, place, proxy), daemon=True).start()
        yield proxy
        server.shutdown(socket.SHUT_RDWR)


def _accept(server: socket.socket, place: tuple[str, int], proxy: Proxy) -> None:
    with contextlib.suppress(OSError):  # closed
        while True:
            near, _ = server.accept()
            threading.Thread(target=_serve, args=(near, place, proxy), daemon=True).start()


def _serve(near: socket.socket, place: tuple[str, int], proxy: Proxy) -> None:
    """One connection, over which several requests may come."""
    streaming = threading.Event()
    with near, socket.create_connection(place) as far, contextlib.suppress(OSError):
        threading.Thread(target=_pass_requests_on, args=(near, far, streaming), daemon=True).start()
        left = STEP_BYTES * (proxy.cuts + 1)
        while data := far.recv(STEP_BYTES):
            near.sendall(data)
            left -= len(data) if streaming.is_set() else 0
            if left <= 0:
                proxy.cuts += 1
                near.shutdown(socket.SHUT_RDWR)
                return
        near.shutdown(socket.SHUT_WR)


def _pass_requests_on(near: socket.socket, far: socket.socket, streaming: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while data := near.recv(65536):
            if STREAM in data:
                streaming.set()
            far.sendall(data)
        far.shutdown(socket.SHUT_WR)
