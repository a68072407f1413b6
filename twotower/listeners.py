"""Whom a secret would reach that is sent to a port of this machine: who listens there, from /proc/net/tcp, or a proxy.

/proc is read by hand, for it takes a few lines: psutil, which comes inside Ray only, does not tell whose a socket is.
"""

import contextlib
import ipaddress
import os
import random
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
LOOPBACK = "127.0.0.1"
NO_PROXY = ("no_proxy", "NO_PROXY", "no_grpc_proxy")
CONNECT_S = 5.0
LISTENS = "0A"  # the kernel's TCP_LISTEN
LENT_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")  # what the kernel gives to those who ask for any port
OUR_PORTS = range(20000, 32768)  # below what it lends by default, and above those that programs are known for


@dataclass(frozen=True)
class Listener:
    """A TCP socket that takes connections.

    Attributes:
        address: where it listens; unspecified (0.0.0.0, ::) is every interface.
        port: its port.
        uid: the user who made it.
        inode: its number, as in the link /proc/PID/fd/N.
    """

    address: Address
    port: int
    uid: int
    inode: str


def listening() -> Iterator[Listener]:
    """Every listening TCP socket of this machine (of this container)."""
    for table in TABLES:
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            fields = line.split()
            address, _, port = fields[1].rpartition(":")
            if fields[3] == LISTENS:
                yield Listener(_ip(address), int(port, 16), int(fields[7]), fields[9])


def addresses_here(host: str) -> set[Address]:
    """The addresses of a host that are this machine's own; empty for another machine, and for no host at all."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    return {_unmapped(ipaddress.ip_address(str(row[4][0]).partition("%")[0])) for row in found if _is_here(row)}


def _is_here(row: tuple[Any, ...]) -> bool:
    """Whether an address, as getaddrinfo has it, is this machine's: only then can a socket be bound to it."""
    try:
        with socket.socket(row[0], row[1]) as probe:
            probe.bind(row[4])
    except OSError:
        return False
    return True


def listeners_at(addresses: set[Address], port: int) -> list[Listener]:
    """Those that may answer who connects to a port at one of these addresses of this machine."""
    anywhere = any(address.is_unspecified for address in addresses)  # 0.0.0.0 as a target is this machine
    return [
        one
        for one in (listening() if addresses else ())
        if one.port == port and (anywhere or one.address in addresses or one.address.is_unspecified)
    ]


def stranger_at(addresses: set[Address], port: int) -> int | None:
    """The user, neither this one nor root, who may answer at a port of this machine; None if there is none."""
    trusted = {0, os.getuid()}
    return next((one.uid for one in listeners_at(addresses, port) if one.uid not in trusted), None)


def reach(address: str) -> tuple[str, int] | None:
    """Host and port of a Ray cluster's address, HOST:PORT or ray://HOST:PORT, once somebody has answered there.

    Returns:
        None for another address, which is Ray's to find, such as ``auto``.

    Raises:
        OSError, OverflowError: nobody answers.
    """
    found = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if not found:
        return None
    host, port = found[1].strip("[]"), int(found[2])
    socket.create_connection((host, port), timeout=CONNECT_S).close()
    return host, port


def refusal(address: str) -> str:
    """Why no Ray cluster of ours can be at an address, in words; empty where one may be, and where it names no port."""
    try:
        server = reach(address)
    except (OSError, OverflowError) as error:
        return f"no Ray cluster answers: {error}"
    return stranger_words(*server) if server else ""


def stranger_words(host: str, port: int) -> str:
    """What to say where another user of this machine listens, who would get the token; else an empty text."""
    stranger = stranger_at(addresses_here(host), port)
    if stranger is None:
        return ""
    return (
        f"{host}:{port} belongs to another user of this machine (uid {stranger}); expected a cluster of your own or of "
        "root's"
    )


def no_proxy_here(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep connections to this machine from a proxy, for Ray's processes: their token would go to it."""
    before = [environment[name] for name in NO_PROXY if environment.get(name)]
    words = dict.fromkeys(word for text in (*before, "127.0.0.1,localhost,::1") for word in text.split(","))
    return dict.fromkeys(NO_PROXY, ",".join(words))


def inodes_of(pid: int) -> set[str]:
    """The sockets that a process holds; empty for one that has ended or is another user's."""
    inodes = set()
    descriptors: list[Path] = []
    with contextlib.suppress(OSError):
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # it was closed while we looked, and the others are open
            target = os.readlink(descriptor)  # noqa: PTH115 - Path.readlink would normalize "socket:[1]"
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    return inodes


def _ip(text: str) -> Address:
    """An address of /proc/net/tcp: words of 32 bits, each in the machine's byte order."""
    words = [int(text[start : start + 8], 16).to_bytes(4, sys.byteorder) for start in range(0, len(text), 8)]
    return _unmapped(ipaddress.ip_address(b"".join(words)))


def _unmapped(address: Address) -> Address:
    return getattr(address, "ipv4_mapped", None) or address


def free_ports(count: int, host: str = LOOPBACK) -> list[int]:
    """Ports at an address ("" is all) that nobody has, and that the kernel lends to nobody before they are used.

    A port that it has lent, and taken back, may be lent to the next program that connects to anything.
    """
    lowest = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        lowest = int(LENT_PORTS.read_text().split()[0])
    candidates = [port for port in OUR_PORTS if port < lowest]
    random.SystemRandom().shuffle(candidates)
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        for port in (*candidates, *[0] * count):  # any port, where the kernel lends all of these
            if len(found) == count:
                break
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind((host, port))
                found.append(probe.getsockname()[1])
        return found
