"""Who is trusted made wrong: what a run may lead to, what another user left, and who is taken for a tower."""

from collections.abc import Iterator

from tests.mutations import Change, Group

RUNS = "tests/trainer/test_strange_runs.py"
PRIVATE = "tests/test_private.py"
STRANGERS = "tests/trainer/parallel/test_strangers.py"
MASKED = "tests/test_masked.py"
WEIGHTS = "tests/trainer/model/test_strange_weights.py"


def of_run_files() -> Iterator[Change]:
    """trainer/training/run_files.py: what a run may hold."""
    yield "run: links are followed", "if stat.S_ISLNK(mode):", "if False:"
    yield "run: links below trained_on", 'for name in ("trained_on", ".start", "loggers"):', "for name in ():"
    yield "run: a share above 1", "is_number(value) and 0 <= value <= 1", "is_number(value)"
    yield "run: rows of other types", "and not wrong_field(row, checks)", ""


def of_checkpoints() -> Iterator[Change]:
    """trainer/training/checkpoint.py: what a record may say."""
    yield "checkpoint: no files are whole", "if record.files.keys() not in _FILE_SETS:", "if False:"
    yield "checkpoint: NaN", "if not bool(tensor.sum().isfinite())", "if False"


def of_private() -> Iterator[Change]:
    """twotower/private.py: whose a file is."""
    yield "private: another user's", "if found.st_uid != os.geteuid():", "if False:"
    yield "private: others may write", "if found.st_mode & OTHERS & ~may_have:", "if False:"
    yield "private: a link", "if stat.S_ISLNK(found.st_mode):", "if False:"
    yield "private: no sticky bit", "mode & stat.S_IWOTH and not mode & stat.S_ISVTX", "False"


def of_locks() -> Iterator[Change]:
    """twotower/locks.py: a lock that is a link."""
    yield "lock: a link is followed", "os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW", "os.O_RDWR | os.O_CREAT"


def of_nodes() -> Iterator[Change]:
    """cluster/local.py: which process is ended."""
    yield "node: any command", " and PROGRAM.encode() in command", ""


def of_proof() -> Iterator[Change]:
    """trainer/parallel/proof.py: who is a tower."""
    yield "proof: prefix without the secret", 'if os.environ.get(SECRET) else "")', 'if False else "")'
    yield "proof: any length", "if length > MOST_BYTES:", "if False:"


def of_addresses() -> Iterator[Change]:
    """twotower/addresses.py: what is masked."""
    yield "masked: not the user", "text = _USER.sub(", "text or _USER.sub("
    yield "masked: not the query", "text = _QUERY.sub(", "text or _QUERY.sub("


def of_weights() -> Iterator[Change]:
    """trainer/model/files_2012.py and weight_files.py: files of weights."""
    yield "weights: a zip that grows", "if grown > min(", "if grown < 0 * min("


GROUPS: tuple[Group, ...] = (
    ("trainer/training/run_files.py", (RUNS,), of_run_files),
    ("trainer/training/checkpoint.py", (RUNS,), of_checkpoints),
    ("twotower/private.py", (PRIVATE,), of_private),
    ("twotower/locks.py", (PRIVATE,), of_locks),
    ("cluster/local.py", (PRIVATE,), of_nodes),
    ("trainer/parallel/proof.py", (STRANGERS,), of_proof),
    ("twotower/addresses.py", (MASKED,), of_addresses),
    ("trainer/model/files_2012.py", (WEIGHTS,), of_weights),
)
