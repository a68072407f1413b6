"""Processes that other processes start: they end with them, and find this very code."""

import ctypes
import os
import signal
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int, number: signal.Signals) -> bool:
    """Asks Linux to send this process a signal when its parent dies; that stays over execve.

    Returns:
        Whether the parent is still there: it may have died before it was asked for.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    return os.getppid() == parent


def python_path() -> str:
    """``PYTHONPATH`` of a process in any folder, in which this code is found first."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
