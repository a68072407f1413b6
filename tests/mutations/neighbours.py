"""Who is trusted made wrong: whom the token is sent to, what a job gets, what other users of the machine may enter."""

from collections.abc import Iterator

from tests.mutations import Change, Group

ADDRESSES = "tests/cluster/test_addresses.py"
COMMANDS = "tests/cluster/test_commands.py"
TREE = "tests/cluster/test_tree.py"
SECRETS = "tests/cluster/test_secrets.py"
MACHINE = "tests/pipeline/preparation/test_machine.py"


def of_the_client() -> Iterator[Change]:
    """cluster/jobs/client.py: when the token is sent."""
    yield "token: also unasked", "if self._token and self.asks_for_token:", "if self._token:"
    yield "token: for every 401", "if answer.text.strip() != ASKS_FOR_TOKEN:", "if False:"
    yield "token: to every user's program", "        self._check_port()\n", ""
    yield "token: after a redirect", "allow_redirects=False", "allow_redirects=True"
    yield "token: after a lost connection", "self.asks_for_token = False  # who", "pass  # who"


def of_listeners() -> Iterator[Change]:
    """twotower/listeners.py: whose a port is."""
    yield "listener: every user is trusted", "one.uid not in trusted", "False"
    yield "listener: 0.0.0.0 is nobody", "one.port == port and (anywhere or", "one.port == port and ("


def of_the_tree() -> Iterator[Change]:
    """cluster/jobs/tree.py: what is sent."""
    yield "tree: untracked files, too", "(unknown if untracked else set())", "unknown"
    yield "tree: secret names", "looks_secret(name) or looks_secret(real) or", ""
    yield "tree: the name behind a link", "looks_secret(real) or ", ""
    yield "tree: what a key looks like", " or holds_secret(folder / name)", ""
    yield "tree: links out of it", 'return "a link out of the tree"', "return None"
    yield "tree: .rayignore", 'known -= _listed(folder, "--cached", "--ignored", *ignore)', "pass"
    yield "tree: a folder names what is in it", "if name not in named", "if name not in named | below"


def of_secrets() -> Iterator[Change]:
    """cluster/jobs/job_secrets.py: two halves."""
    yield "secret: in the clear", "secrets.token_bytes(len(plain))", "bytes(len(plain))"


def of_the_token() -> Iterator[Change]:
    """cluster/jobs/auth_token.py: its file."""
    yield "token file: for all", "os.O_NOFOLLOW, 0o600)", "os.O_NOFOLLOW, 0o666)"
    yield "token file: an old one stays", "path.unlink()  # never", "pass  # never"


def of_the_session() -> Iterator[Change]:
    """pipeline/preparation/machine.py: a Ray of our own."""
    yield "session: token for all", "os.O_WRONLY, 0o600)", "os.O_WRONLY, 0o666)"
    yield "session: stays", "shutil.rmtree(private, ignore_errors=True)", "pass"
    yield (
        "session: no authentication",
        "os.environ.pop(name, None)\n        os.environ |=",
        "pass\n        os.environ |=",
    )


GROUPS: tuple[Group, ...] = (
    ("cluster/jobs/client.py", (ADDRESSES,), of_the_client),
    ("twotower/listeners.py", (ADDRESSES, MACHINE), of_listeners),
    ("cluster/jobs/tree.py", (TREE,), of_the_tree),
    ("cluster/jobs/job_secrets.py", (SECRETS,), of_secrets),
    ("cluster/jobs/auth_token.py", (COMMANDS,), of_the_token),
    ("pipeline/preparation/machine.py", (MACHINE,), of_the_session),
)
