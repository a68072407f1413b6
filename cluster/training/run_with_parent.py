"""A command that must not outlive its parent: `python -m cluster.training.run_with_parent PID COMMAND...` (Linux).

A Ray worker that is killed leaves the processes it started behind; here the kernel kills them with it, so that a
restarted run never meets the old one in its folder. Signals that Ray workers block are let through again.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Tie this process to its parent and become the command."""
    parent, command = int(arguments[0]), arguments[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it stays over execve
    if os.getppid() != parent:  # it died before we were tied to it
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
