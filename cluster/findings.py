"""What a check of `doctor` reports."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One result.

    Attributes:
        level: ok; note (worth knowing); bad (something to do).
        check: what was checked.
        seen: what was found.
        fix: what to do about it, "" if nothing.
    """

    level: str
    check: str
    seen: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level:4}  {self.check}: {self.seen}" + (f"\n      -> {self.fix}" if self.fix else "")


def ok(check: str, seen: str) -> Finding:
    """All is well."""
    return Finding("ok", check, seen)


def note(check: str, seen: str, fix: str = "") -> Finding:
    """Worth knowing."""
    return Finding("note", check, seen, fix)


def bad(check: str, seen: str, fix: str) -> Finding:
    """Something to do."""
    return Finding("bad", check, seen, fix)
