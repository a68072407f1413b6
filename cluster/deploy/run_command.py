"""For plain `ray submit`, which copies one script to the head of a `ray up` cluster and runs it there.

Example:
    ray submit my.yaml cluster/deploy/run_command.py -- python -m pipeline prepare --source digits --output /shared/d

The project must lie in ~/twotower on the head, where ray-cluster.yaml puts it, or in TWOTOWER_ROOT. The command's
output comes back over SSH, and its exit code is the script's. `python -m cluster submit` needs none of this.
"""

import os
import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Become `python -m cluster.jobs.entry -- ARGUMENTS` in the project's folder, with its own interpreter."""
    command = arguments[1:] if arguments[:1] == ["--"] else arguments  # nothing of ours can be imported here
    root = Path(os.environ.get("TWOTOWER_ROOT", "~/twotower")).expanduser()
    if not command:
        sys.exit("error: no command; expected: ray submit CLUSTER.yaml cluster/deploy/run_command.py -- python -m ...")
    if not (root / "cluster" / "jobs" / "entry.py").is_file():
        sys.exit(f"error: the project is not in {root}; ray-cluster.yaml puts it there, or set TWOTOWER_ROOT")
    python = root / ".venv" / "bin" / "python"
    program = str(python) if python.exists() else sys.executable
    os.chdir(root)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ADDRESS", "auto")
    os.execv(program, [program, "-m", "cluster.jobs.entry", "--", *command])


if __name__ == "__main__":
    main(sys.argv[1:])
