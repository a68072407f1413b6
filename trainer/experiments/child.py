"""``python -m trainer.experiments.child PID COMMAND...``: becomes the command, and is stopped where process PID dies.

Without it a killed experiment would leave trainings behind, which hold their runs' locks. It is a program of its own
because Python code between fork and exec is unsafe in a process with threads, as torch has them.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h; it stays over execve


def main(parent: int, command: list[str]) -> None:
    """Becomes the command."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # training saves
    if os.getppid() != parent:  # it had died before
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
