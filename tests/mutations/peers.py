"""Processes beside each other made wrong: who talks through NCCL, who is taken for lost, what is said of it."""

from collections.abc import Iterator

from tests.mutations import Change

BACKEND = "tests/trainer/parallel/test_backend.py"
WATCH = "tests/trainer/parallel/test_watch.py"
CROSSING = "tests/trainer/parallel/test_crossing.py"


def of_backend() -> Iterator[Change]:
    """trainer/parallel/backend.py: NCCL or gloo."""
    yield "backend: one card is enough for NCCL", "not (one.shares and other.shares)", "False"
    yield "backend: hosts do not matter", "(one.gpu, one.host) == (other.gpu, other.host)", "one.gpu == other.gpu"
    yield "backend: one of two may share a card", "one.shares and other.shares", "one.shares or other.shares"
    yield "backend: several ranks a card with any NCCL", "nccl_version() >= MULTI_RANK_SINCE", "True"
    yield "backend: gloo is not to be had", '"gloo" if "gloo" in asked or why_not', '"gloo" if why_not'
    yield "backend: all ranks on one host", "or 'twotower'}-{rank}\"", "or 'twotower'}\""


def of_watch() -> Iterator[Change]:
    """trainer/parallel/watch.py: who is lost."""
    yield "watch: a peer that stands still is not behind", "theirs >= mine or theirs != self.seen", "True"
    yield "watch: a peer that moves is behind", "theirs >= mine or theirs != self.seen", "theirs >= mine"
    yield "watch: one that ended well is missed", "            del self._peers[rank]\n", ""
    yield "watch: nobody is woken", "run_for(ABORT_S, self._facts.abort)", "pass"
    yield "watch: a host that hangs may hang", "            end_process(error)", "            pass"
    yield "watch: NCCL may fail", "self._exchange(state) or self._own_fault()", "self._exchange(state)"


def of_failures() -> Iterator[Change]:
    """trainer/parallel/failures.py: the first loss counts."""
    yield "failures: the last loss counts", "self.known = self.known or error", "self.known = error"


def of_link() -> Iterator[Change]:
    """trainer/parallel/link.py: what the watch is told."""
    yield "link: no message is counted", "        self.started += 1\n", ""


GROUPS = (
    ("trainer/parallel/backend.py", (BACKEND,), of_backend),
    ("trainer/parallel/watch.py", (WATCH,), of_watch),
    ("trainer/parallel/failures.py", (WATCH,), of_failures),
    ("trainer/parallel/link.py", (f"{CROSSING}::test_both_towers_start_the_same_messages_in_the_same_order",), of_link),
)
