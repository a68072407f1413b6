"""Two real processes, one of them killed while the other's host hangs as it would in a GPU's queue: exit code 4."""

import functools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from trainer import stopping
from trainer.errors import TrainerError
from trainer.parallel import mesh, watch
from trainer.parallel.launch import tower_environment
from twotower.meeting import meeting_place
from twotower.terminal import print_error

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("abort", ["works", "hangs"])
def test_a_killed_peer_ends_the_other_with_one_line(abort: str) -> None:
    with meeting_place() as meeting:
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.trainer.parallel.test_lost_peer", abort],
                env=tower_environment(rank, meeting) | {"OMP_NUM_THREADS": "1"},
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        try:
            said = [child.communicate(timeout=200)[1] for child in children]
        finally:
            for child in children:
                child.kill()
    assert [child.returncode for child in children] == [4, -signal.SIGKILL], said
    (line,) = said[0].splitlines()
    assert line.startswith("error: tower b (rank 1) is lost at conv3 forward: ") and "Connection closed" in line


def child(abort: str) -> int:
    """One of them; the status as the command line would give it."""
    mesh.make_mesh = functools.partial(mesh.make_mesh, watched=True)
    watch.END_S = 1.0
    found = mesh.connect(150.0, "gloo")
    awake, never = threading.Event(), threading.Event()
    wake = awake.set if abort == "works" else never.wait
    found.watch._facts = watch.Facts(found.watch._facts.started, found.watch._facts.where, abort=wake)
    found.begin_steps()
    half = torch.zeros(2, 3)
    failed = True
    try:
        found.link.wait(found.link.exchange("conv3", "forward", half))
        if found.coord.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        awake.wait()
        found.link.exchange("fc6", "forward", half)
        failed = False
    except TrainerError as error:
        print_error(error)
        return error.status
    finally:
        found.close(failed=failed)
    return 0


if __name__ == "__main__":
    sys.exit(stopping.leave(child(sys.argv[1])))
