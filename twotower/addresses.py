"""Addresses as they may be written down and shown: without the passwords and keys that stand in them.

Whoever reads a log, a report or a run folder sees where a data set was, not how to get in.
"""

import re
from collections.abc import Sequence

MASK = "***"
# user:password@ and token@ before a host; what follows up to the last @ before the path, for passwords hold @ and :
_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:/{1,3})(?P<user>[^\s/?#'\"]+)@")
# query and fragment of an address: all values, for keys have too many names (sig, X-Amz-Signature, sv, token, ...)
_QUERY = re.compile(r"(?P<address>[A-Za-z][A-Za-z0-9+.-]*:/{1,3}[^\s?#'\"<>]*)(?P<rest>[?#][^\s'\"<>]+)")
_VALUE = re.compile(r"=[^&;#?]*")
# options and variables: --token X, AWS_SECRET_ACCESS_KEY=X
_SECRET = re.compile(
    r"[\w.-]*(?:password|passwd|secret|token|api[_-]?key|access[_-]?key|credential|authorization)[\w-]*", re.IGNORECASE
)


def masked(text: str) -> str:
    """Text with every password, token and key of the addresses in it replaced by ``***``."""
    if ":/" in text:
        text = _USER.sub(rf"\g<scheme>{MASK}@", text)
        text = _QUERY.sub(lambda found: found["address"] + _mask_query(found["rest"]), text)
    return text


def _mask_query(rest: str) -> str:
    return _VALUE.sub(f"={MASK}", rest) if "=" in rest else rest[0] + MASK


def masked_words(words: Sequence[str]) -> list[str]:
    """A command's words, fit to be kept: addresses as :func:`masked` has them; of options named as secrets no value."""
    shown: list[str] = []
    for word in words:
        name, equals, _ = word.partition("=")
        after_secret = shown and _SECRET.fullmatch(shown[-1]) and not word.startswith("-")
        shown.append(f"{name}={MASK}" if equals and _SECRET.fullmatch(name) else MASK if after_secret else masked(word))
    return shown
