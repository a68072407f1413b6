"""``make test-mutations``: one constant or operator at a time is made wrong, and a fast test must notice.

A mutation is a text of a file and what stands there instead. The text must be in the file, once or with a number that
says which of several: an error names the mutation otherwise, so that the lists here cannot rot.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One wrong constant or operator.

    Attributes:
        name: unique.
        file: relative to the root.
        old: text that is replaced.
        new: by what.
        tests: files, or tests, that run first.
        nth: which of several such texts, from 1; 0: it must be the only one.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    nth: int = 0

    def apply(self, text: str) -> str:
        """The file's text with the mutation.

        Raises:
            LookupError: the text to replace is not there, or several times.
        """
        count = text.count(self.old)
        if count < max(1, self.nth) or (count > 1 and not self.nth):
            raise LookupError(f"{self.name}: {self.file} has {self.old!r} {count} times: mend it in tests/mutations/")
        parts = text.split(self.old)
        nth = max(1, self.nth)
        return self.old.join(parts[:nth]) + self.new + self.old.join(parts[nth:])


Change = tuple[str, str, str] | tuple[str, str, str, int]  # name, old, new, which of several
Group = tuple[str, tuple[str, ...], Callable[[], Iterator[Change]]]  # file, tests that run first, changes


def of_groups(groups: Sequence[Group]) -> Iterator[Mutation]:
    """The mutations of several files."""
    for file, tests, changes in groups:
        for name, old, new, *nth in changes():
            yield Mutation(name, file, old, new, tests, *nth)
