"""Errors that a user can act on: what is wrong, the value, what was expected, the fix."""

import re

from twotower.words import one_line

# What a library's text may hold that is another one in every run or on every machine, and what stands for it.
UNREPRODUCIBLE = (
    (re.compile(r"<[^<>]*\b(?:object|at 0x)[^<>]*>"), "an object"),
    (re.compile(r"\b0x[0-9a-fA-F]+"), "an address"),
    (re.compile(r"""(?<![^\s'"(=])/[^\s'",;:)]+"""), "a path"),
)


class PipelineError(Exception):
    """Root of every error the pipeline raises on purpose; the command line prints it as one line and exits 2.

    Subclasses carry one message string only, so that they survive pickling between Ray workers.
    """


class ConfigError(PipelineError):
    """An option or a config field has a value that cannot be used."""


class SourceError(PipelineError):
    """The input is missing, is not what its source expects, or is damaged."""


class ImageError(PipelineError):
    """One image cannot be decoded or is refused; it goes to the quarantine list with this message as reason.

    The same image must give the same reason in every run, for the list is part of the data set's fingerprint: so no
    message holds an address of memory, a library's object or an absolute path. It is one line.
    """

    def __init__(self, reason: str) -> None:
        for pattern, instead in UNREPRODUCIBLE:
            reason = pattern.sub(instead, reason)
        super().__init__(one_line(" ".join(reason.split())))


class DatasetError(PipelineError):
    """A data set folder is missing, incomplete, or does not match its manifest."""


class FormatError(DatasetError):
    """A data set was made by another version, in a format that this one does not read."""


class OutputError(PipelineError):
    """The output folder is in use, holds something else, or cannot be written."""


def require(holds: bool, field: str, value: object, expected: str, error: type[Exception] = ConfigError) -> None:
    """The one check of a value that a user gave, with the one form of message: ``FIELD is VALUE: expected WHAT``.

    A command's option is named as it was typed: ``--shard-size 0: expected 1 to 10,000,000``.

    Args:
        holds: the value can be used.
        field: the option (``--shard-size``) or config field (``data.crop_px``).
        value: what was given.
        expected: what would be right, in words.
        error: class of the error.

    Raises:
        Exception: ``error``, if it does not hold.
    """
    if not holds:
        given = f"{field} {value}" if field.startswith("--") else f"{field} is {value!r}"
        raise error(f"{given}: expected {expected}")


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line: its first, or its class where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
