"""Runs a command as a user without a name, a home folder or any rights of its own: ``docker run --user 12345``."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.training_commands import ROOT, command, environment

UID = "12345"
# Where the interpreter lies in a home folder that nobody else may enter, that folder is covered, and the interpreter's
# part of it put back; in a mount namespace of its own.
SCRIPT = """
home=$1 prefix=$2 spare=$3; shift 3
case $prefix in $home/*) sub=${prefix#$home/}; sub=${sub%%/*}
  mount --bind "$home/$sub" "$spare"; mount -t tmpfs -o mode=755 none "$home"; mkdir "$home/$sub"
  mount --bind "$spare" "$home/$sub";; esac
exec setpriv --reuid UID --regid UID --clear-groups env -u HOME -u USER -u LOGNAME "$@"
""".replace("UID", UID)


def run_as_nobody(spare: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m words...``; skips where one may not become another user.

    Args:
        spare: an empty folder, outside of the home folder.
        words: module and arguments.
    """
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("becoming another user, and a mount namespace of one's own, need root")
    own = ["unshare", "-m", "bash", "-c", SCRIPT, "nobody", str(Path.home()), sys.base_prefix, str(spare)]
    probe = subprocess.run([*own, sys.executable, "-c", ""], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"another user cannot read {shlex.quote(sys.executable)}")
    done = [*own, *command(*words)]
    return subprocess.run(done, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200, check=False)
