"""``python -m trainer.experiments.child PID COMMAND...``: becomes the command, and is stopped where process PID dies.

Without it a killed experiment would leave trainings behind, which hold their runs' locks. It is a program of its own
because Python code between fork and exec is unsafe in a process with threads, as torch has them.
"""

import os
import signal
import sys

from twotower.processes import die_with


def main(parent: int, command: list[str]) -> None:
    """Becomes the command."""
    if not die_with(parent, signal.SIGTERM):  # training saves
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
