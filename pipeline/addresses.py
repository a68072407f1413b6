"""Addresses that fsspec opens: only of the kinds on a list, and none through another, unless somebody asks for it.

fsspec has some forty protocols, and chains of them: ``zip::``, ``simplecache::`` and ``reference://`` unpack, write to
this machine or fetch from wherever a file says. An address may come from a recipe, a script or a stranger's page.
"""

import os
import re
from typing import Any

from twotower.words import one_line, shortened

SCHEMES = (
    *("file", "local", "memory", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"),
    *("hf", "hdfs", "webhdfs", "sftp", "ssh"),
)
MORE_SCHEMES = "TWOTOWER_SCHEMES"  # further ones, with commas
_FOLDED = re.compile(r"^((?:[A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
_OF_THIS_MACHINE = ("file", "local")  # a third slash of theirs begins the path


def is_address(text: str) -> bool:
    """Tells an address from a path."""
    return "://" in text


def unfolded(text: str) -> str | None:
    """An address as it was before pathlib made its two slashes one, without any at its end; None for a path."""
    if is_address(text):
        return text.rstrip("/")
    found = _FOLDED.match(text)
    if found is None:
        return None
    slashes = "///" if found.group(1).rpartition(":")[2] in _OF_THIS_MACHINE else "//"
    return f"{found.group(1)}:{slashes}{text[found.end() :]}".rstrip("/")


def check_address(address: str) -> None:
    """Refuses protocols that are not on the list, wherever in the address they stand.

    Raises:
        ValueError: names the protocol and how to ask for it.
    """
    asked = {word.strip() for word in os.environ.get(MORE_SCHEMES, "").split(",") if word.strip()}
    links = [part.partition("://")[0].lower() for part in address.split("::")]
    refused = [scheme for scheme in links if scheme not in asked and scheme not in SCHEMES]
    if not refused and len(links) > 1 and links[0] not in asked:
        refused = links[:1]
    if refused:
        wanted = ",".join(dict.fromkeys([*sorted(asked), *refused]))
        raise ValueError(
            f"protocol {shortened(refused[0])} is opened only where {MORE_SCHEMES}={one_line(wanted)} asks for it; "
            f"without that: {', '.join(SCHEMES)}"
        )


def open_store(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
        ValueError: its protocol is not on the list, or fsspec does not know it.
        ImportError: a package for it is missing.
    """
    check_address(address)
    import fsspec  # only where an address is given

    filesystem, path = fsspec.core.url_to_fs(address)
    return filesystem, str(path).rstrip("/")
