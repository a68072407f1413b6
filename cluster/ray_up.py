"""`up CLUSTER.yaml` and `down CLUSTER.yaml`: Ray's own commands, with this cluster's token and a clean tree.

`ray up` sends a folder as it lies there, with all that is in it. So the tree is sent from a copy that holds the files
that `submit` would send. The token is the file that CLUSTER.yaml mounts at ~/.ray/auth_token: `up` makes it if it is
not there, `down` deletes it with the cluster.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, last_line
from cluster.jobs.auth_token import ensure_token
from cluster.jobs.tree import TREE, choose, copy

THERE = "~/.ray/auth_token"  # where the nodes look for the token


def run(verb: str, config: Path, say: Callable[[str], None]) -> int:
    """Run `ray up` or `ray down`; its exit code.

    Raises:
        ClusterError: CLUSTER.yaml cannot be read, or mounts no token; the tree holds what looks like a secret.
    """
    record = _read(config)
    token = _token_file(config, record)
    if done := ensure_token(token):
        say(f"{done}: {token}")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with tempfile.TemporaryDirectory(prefix="tt-") as scratch:
        given = _with_clean_tree(record, config, Path(scratch), say) if verb == "up" else config
        words = [sys.executable, "-m", "ray.scripts.scripts", verb, "--yes", str(given)]
        code = subprocess.run(words, env=environment, check=False).returncode
    if verb == "down" and code == 0:
        token.unlink(missing_ok=True)
    elif verb == "up" and code == 0:
        say(f"its token, for commands through a tunnel: export RAY_AUTH_TOKEN_PATH={token}")
    return code


def _read(config: Path) -> dict[str, Any]:
    import yaml

    try:
        record = yaml.safe_load(config.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ClusterError(f"cluster file {config} cannot be read: {last_line(str(error))}") from None
    if not isinstance(record, dict) or not isinstance(record.get("file_mounts"), dict):
        raise ClusterError(f"cluster file {config}: expected file_mounts, as in cluster/deploy/ray-cluster.yaml")
    return record


def _token_file(config: Path, record: dict[str, Any]) -> Path:
    source = record["file_mounts"].get(THERE)
    if not isinstance(source, str):
        raise ClusterError(f"cluster file {config}: file_mounts has no {THERE}, so the nodes would run without a token")
    token = Path(source).expanduser().absolute()
    if token.is_relative_to(TREE):
        raise ClusterError(f"cluster file {config}: token file {token} lies in the tree; expected one in ~/.ray")
    return token


def _with_clean_tree(record: dict[str, Any], config: Path, scratch: Path, say: Callable[[str], None]) -> Path:
    """A copy of CLUSTER.yaml whose mounts of the tree are a copy of what `submit` would send; itself without such."""
    import yaml

    mounts = {there: str(here) for there, here in record["file_mounts"].items()}
    ours = [there for there, here in mounts.items() if Path(here).expanduser().absolute().resolve() == TREE]
    if not ours:
        return config
    tree = choose()
    say(f"sends {tree} of {TREE}")
    folder = scratch / "tree"
    copy(tree, folder)
    changed = record | {"file_mounts": mounts | dict.fromkeys(ours, str(folder))}
    path = scratch / config.name
    path.write_text(yaml.safe_dump(changed, sort_keys=False))
    return path
