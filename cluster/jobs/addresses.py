"""Where a cluster's dashboard is: an address as a user writes it, made a URL or refused in one line."""

import ipaddress
import os
import re
from urllib.parse import SplitResult, urlsplit

from cluster.errors import ClusterError

DEFAULT_PORT = 8265
DEFAULT_ADDRESS = f"http://127.0.0.1:{DEFAULT_PORT}"
VARIABLE = "RAY_API_SERVER_ADDRESS"
_NAME = re.compile(r"(?!-)[\w-]{1,63}(?:\.[\w-]{1,63})*\.?")  # of a host; \w: also names that are not ASCII


def dashboard_address(address: str | None) -> str:
    """The dashboard's URL without a slash at its end.

    Args:
        address: http(s)://HOST[:PORT][/PATH], where the port is the scheme's own if it is not given, or HOST[:PORT],
            where it is 8265. None: RAY_API_SERVER_ADDRESS, else port 8265 of this machine. RAY_ADDRESS, which is where
            Ray's nodes meet, is not looked at.

    Raises:
        ClusterError: it is something else, or has a password in it.
    """
    source, text = "--address", address
    if text is None:
        source, text = VARIABLE, os.environ.get(VARIABLE) or DEFAULT_ADDRESS
    url = _split(text)
    if url is not None and url.username is not None:
        shown = f"{url.scheme}://***@{url.netloc.rpartition('@')[2]}"
        raise ClusterError(
            f"{source} {shown}: it would be sent in place of the token; leave out what stands before the @"
        )
    if url is None or url.scheme not in ("http", "https") or not _is_host(url.hostname or "") or url.query:
        shown = re.sub(r"^(\w+://)?.*@", r"\1***@", text)
        expected = f"expected the dashboard as http://HOST:PORT, such as {DEFAULT_ADDRESS}"
        raise ClusterError(f"{source} {shown!r}: {expected}")
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"


def _split(text: str) -> SplitResult | None:
    """The parts of an address, with a scheme; None if there is no sense in it."""
    if text in ("auto", "local") or not text.isprintable() or " " in text or "\\" in text:
        return None
    try:
        if "://" in text:
            url = urlsplit(text)
        else:
            url = urlsplit(f"http://{text}")
            if url.port is None and not url.netloc.endswith(":"):
                url = url._replace(netloc=f"{url.netloc}:{DEFAULT_PORT}")
        return url if url.port != 0 and not url.netloc.endswith(":") else None
    except ValueError:  # a port that is no number up to 65535, a bracket too few
        return None


def _is_host(name: str) -> bool:
    if ":" in name:
        return _address_of(name) is not None
    return len(name) <= 253 and _NAME.fullmatch(name) is not None


def _address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(name)
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found


def is_loopback(address: str) -> bool:
    """Whether the dashboard's URL points to this machine: a cluster here, or the end of a tunnel."""
    name = (urlsplit(address).hostname or "").rstrip(".")
    found = _address_of(name)
    if found is None:
        return name == "localhost" or name.endswith(".localhost")
    return found.is_loopback or found.is_unspecified
