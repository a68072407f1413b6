"""Which files of the working tree a job gets: those that git knows, and no key, password or token.

Ray itself sends all that .gitignore does not name: also an .env or a key that lies in the folder.
"""

import fnmatch
import hashlib
import io
import os
import re
import subprocess
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cluster.errors import ClusterError
from twotower.words import one_line, pluralize

TREE = Path(__file__).resolve().parents[2]
MAX_BYTES = 512 << 20  # Ray's own limit
# Of a tree without history, such as an unpacked archive: what the project consists of, and nothing beside it.
PARTS = (
    "pipeline",
    "trainer",
    "cluster",
    "twotower",
    "configs",
    "tests",
    "pyproject.toml",
    "constraints.txt",
    "LICENSE",
)
HEAD_BYTES = 4096
# Names of what is secret, in small letters, as in the shell; with a slash: the end of a path.
SECRETS = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".my.cnf", ".htpasswd", ".pypirc", ".npmrc"),
    *(
        ".git-credentials",
        ".vault-token",
        ".boto",
        ".s3cfg",
        ".passwd-s3fs",
        ".dockercfg",
        "rclone.conf",
        "kaggle.json",
    ),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p8", "*.p12", "*.pfx", "*.jks", "*.ppk"),
    *("*.keystore", "*.kdbx", "*.gpg", "*.asc", "kubeconfig*", "*.kubeconfig", "credentials", "credentials.*"),
    *("client_secret*", "*service*account*.json", "application_default_credentials.json", "*.tfstate", "*.tfvars"),
    *("auth_token", "token", "token.txt", "*.token", ".*token*", "secrets.*", "secret.*", "password*.txt", "*.ovpn"),
    *(".aws/*", ".ssh/*", ".gnupg/*", ".kube/*", ".docker/config.json", ".azure/*", ".config/gcloud/*", ".ray/*"),
)
HARMLESS = ("*.pub", ".env.example", ".env.sample", ".env.template", "*.py", "*.md", "*.rst")
_KEY = re.compile(rb"\s*(?:-----BEGIN [A-Z0-9 ]*PRIVATE KEY|PuTTY-User-Key-File)")
_SERVICE_ACCOUNT = re.compile(rb'"type"\s*:\s*"(?:service_account|authorized_user|external_account)"')


@dataclass(frozen=True)
class Tree:
    """What a job gets of a folder.

    Attributes:
        folder: the working tree.
        files: paths inside it, with slashes, in order.
        sizes: bytes of each.
        left_out: what git knows and cannot be sent, with the reason.
        unknown: what git neither knows nor ignores, and nobody asked for.
    """

    folder: Path
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    left_out: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{pluralize(len(self.files), 'file')}, {sum(self.sizes) / 1e6:.1f} MB"


def choose(folder: Path = TREE, include: Sequence[str] = (), untracked: bool = False) -> Tree:
    """The files that are sent: tracked ones as they are now, less what .rayignore names, and what is asked for.

    Args:
        folder: the working tree. Without git, or where it is no checkout of its own: `PARTS`.
        include: files and folders in it that are sent, too. A file that is named itself is sent whatever its name.
        untracked: also files that git does not know and .gitignore does not name.

    Raises:
        ClusterError: one looks like a secret, is not in the folder, or all are too large.
    """
    named = {_inside(folder, text) for text in include}
    below = {name for place in named for name in _files_below(folder, place)}
    names, unknown = _known_to_git(folder) or (None, set[str]())
    if names is None:
        if untracked:
            raise ClusterError(f"--untracked: {folder} is no git checkout; name what is to be sent with --include PATH")
        names = {name for part in PARTS for name in _files_below(folder, part)}
    names |= below | (unknown if untracked else set())
    files, left_out = [], []
    for name in sorted(names):
        reason = _why_not(folder, name)
        if reason is None:
            files.append(name)
        elif reason:
            left_out.append(f"{name}: {reason}")
    _refuse_secrets(folder, [name for name in files if name not in named])
    sizes = tuple((folder / name).stat().st_size for name in files)
    if sum(sizes) >= MAX_BYTES:
        raise ClusterError(
            f"{folder} is larger than Ray's 512 MiB ({sum(sizes) >> 20} MiB); name what no job needs in .rayignore"
        )
    return Tree(folder, tuple(files), sizes, tuple(left_out), tuple(sorted(unknown - names)))


def pack(tree: Tree) -> tuple[str, bytes]:
    """The tree's name on the cluster, a hash of its content, and its zip file; the same for the same files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as package:
        for name in tree.files:
            path = tree.folder / name
            member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            member.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            package.writestr(member, path.read_bytes())
    content = buffer.getvalue()
    return f"_ray_pkg_{hashlib.sha256(content).hexdigest()[:32]}.zip", content


def copy(tree: Tree, target: Path) -> None:
    """Write the tree into a folder, for `ray up`, which sends folders."""
    for name in tree.files:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((tree.folder / name).read_bytes())
        path.chmod(0o755 if os.access(tree.folder / name, os.X_OK) else 0o644)


def looks_secret(name: str) -> bool:
    """Whether a path is named like a key, a password or a token."""
    path = PurePosixPath(name.lower())
    if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in HARMLESS):
        return False
    return any(
        fnmatch.fnmatchcase(f"/{path}", f"*/{pattern}") if "/" in pattern else fnmatch.fnmatchcase(path.name, pattern)
        for pattern in SECRETS
    )


def holds_secret(path: Path) -> bool:
    """Whether a file begins like a private key, or is the key of a cloud's service account."""
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    return bool(_KEY.match(head)) or (head.lstrip()[:1] == b"{" and _SERVICE_ACCOUNT.search(head) is not None)


def _refuse_secrets(folder: Path, names: Iterable[str]) -> None:
    found = []
    for name in names:
        real = (folder / name).resolve().relative_to(folder.resolve()).as_posix()  # of a link: what would be sent
        if looks_secret(name) or looks_secret(real) or holds_secret(folder / name):
            found.append(one_line(name))
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ClusterError(
            f"{', '.join(found[:3])}{more}: looks like a secret, and a job's files are readable by all who use the "
            f"cluster; leave it out in .rayignore, or send it all the same with --include {found[0]}"
        )


def _inside(folder: Path, text: str) -> str:
    """A path of the command line as a path inside the folder; relative ones are looked for here, then there."""
    path = next((place for place in (Path.cwd() / text, folder / text) if place.exists()), None)
    if path is None:
        raise ClusterError(f"--include {text}: no such file or folder")
    path = Path(os.path.normpath(path))
    if not path.is_relative_to(folder) or path == folder:
        raise ClusterError(f"--include {text}: expected a file or folder in {folder}, for only that is sent")
    return path.relative_to(folder).as_posix()


def _files_below(folder: Path, name: str) -> Iterator[str]:
    """A file, or the files of a folder but for hidden folders and Python's own; links to folders are not followed."""
    path = folder / name
    if not path.is_dir():
        if path.exists():
            yield name
        return
    for place, folders, files in os.walk(path):
        folders[:] = [
            one for one in folders if one[0] != "." and one != "__pycache__" and not one.endswith(".egg-info")
        ]
        inside = Path(place).relative_to(folder)
        yield from ((inside / file).as_posix() for file in files if not file.endswith(".pyc"))


def _known_to_git(folder: Path) -> tuple[set[str], set[str]] | None:
    """What git knows of a checkout, and what it neither knows nor ignores; both without what .rayignore names.

    None where the folder is no checkout of its own, or there is no git.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or Path(os.fsdecode(top).rstrip("\n")).resolve() != folder.resolve():
        return None
    ignore = [f"--exclude-from={folder / '.rayignore'}"] if (folder / ".rayignore").is_file() else []
    known = _listed(folder, "--cached")
    if ignore:
        known -= _listed(folder, "--cached", "--ignored", *ignore)
    return known, _listed(folder, "--others", "--exclude-standard", *ignore)


def _listed(folder: Path, *words: str) -> set[str]:
    listed = _git(folder, "ls-files", "-z", *words)
    if listed is None:
        raise ClusterError(f"git does not list the files of {folder}; `git -C {folder} status` says why")
    return {os.fsdecode(name) for name in listed.split(b"\0") if name}


def _git(folder: Path, *words: str) -> bytes | None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # set in a hook
    command = ["git", "--no-optional-locks", "-C", str(folder), "-c", "core.fsmonitor=false", *words]
    try:
        return subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _why_not(folder: Path, name: str) -> str | None:
    """Why a file cannot be sent; "" if it is not there any more, None if it can."""
    path = folder / name
    if not path.exists():
        return "a link to nothing" if path.is_symlink() else ""
    if not path.resolve().is_relative_to(folder.resolve()):
        return "a link out of the tree"
    if path.is_dir():
        return "a link to a folder" if path.is_symlink() else "a repository inside this one; name it with --include"
    if not path.is_file():
        return "no file"
    if "\\" in name or os.fsencode(name).decode(errors="replace") != name:
        return "its name is not for every system: a backslash, or no UTF-8"
    return None
