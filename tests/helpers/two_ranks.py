"""Two ranks on one device, gloo on a CPU or NCCL on a GPU: what they do, started as two processes; without DALI.

``python -m tests.helpers.two_ranks MODE DEVICE FOLDER`` is one of them; :func:`start` starts both.
"""

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from tests.helpers import tower_work as work
from trainer import stopping
from trainer.bench.timing import TimedTrainer
from trainer.config import Config, load_config
from trainer.errors import DivergedError, TrainerError
from trainer.model.layers import DropoutDraws
from trainer.parallel.backend import nccl_environment
from trainer.parallel.launch import tower_environment
from trainer.parallel.link import Link
from trainer.parallel.mesh import Mesh, connect
from trainer.training.optimizer import PaperSGD
from twotower.meeting import meeting_place
from twotower.terminal import print_error

ROOT = Path(__file__).resolve().parents[2]
PEER_TIMEOUT_S = 8.0  # of the rank that is stopped; steps here take milliseconds once they are warm
BATCH, STEPS, WARM = 16, 5, 4
BYTES = {0: 1, 1: 1, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2}  # of NCCL's data types, by number
SEND = re.compile(r"NCCL INFO Send: .*? count (\d+) datatype (\d+) ")


def start(mode: str, device: str, folder: Path, *, timeout_s: float = 100.0) -> tuple[list[int | None], list[str]]:
    """Runs both ranks; their exit codes (None: still there when the other had ended), and what they said on stderr."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if device != "cpu":
        log = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "COLL,P2P", "NCCL_DEBUG_FILE": f"{folder}/nccl-%p"}
        environment |= log if mode == "facts" else {}
    command = [sys.executable, "-m", "tests.helpers.two_ranks", mode, device, str(folder)]
    with meeting_place() as meeting:
        children = []
        for rank in (0, 1):
            own = nccl_environment(rank, os.environ) if device != "cpu" else {}
            every = {"TORCH_CPP_LOG_LEVEL": "FATAL"} | tower_environment(rank, meeting) | own | environment
            said = (folder / f"said-{rank}").open("wb")
            children.append(subprocess.Popen(command, env=every, cwd=ROOT, stderr=said))
        try:
            children[0].wait(timeout_s)
            if mode == "facts":
                children[1].wait(timeout_s)
            codes = [child.poll() for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
    return codes, [(folder / f"said-{rank}").read_text() for rank in (0, 1)]


def results(folder: Path) -> list[dict[str, Any]]:
    """What both ranks of mode ``facts`` have found."""
    return [torch.load(folder / f"result-{rank}") for rank in (0, 1)]


def recipe() -> Config:
    """A small net of the paper's structure that the trainer can train on noise."""
    small = ("model.hidden=[32, 32]", f"train.batch_size={BATCH}", "train.threads=1", "train.precision=fp32")
    return load_config(ROOT / "configs" / "digits.toml", small)


def train(link: Link | None, device: str) -> dict[str, Any]:
    """Loss and gradients of the first of five updates, weights after the last; float64; ``{tower.layer: tensor}``."""
    config = recipe()
    net = work.make_net(config, link).to(device, torch.float64)
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    losses, gradients = [], {}
    for step in range(STEPS):
        images, labels = work.a_batch(config, step, BATCH)
        optimizer.zero_grad()
        loss = net.loss(images.to(device, torch.float64), labels.to(device), DropoutDraws(work.SEED, step))
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or on_cpu(work.gradients_of(net))
        optimizer.step()
    return {"losses": losses, "gradients": gradients, "weights": on_cpu(work.weights_of(net))}


def on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def facts(mesh: Mesh, device: str, folder: Path) -> dict[str, Any]:
    """All that is looked at in one start of two processes."""
    found: dict[str, Any] = {"backend": mesh.backend, "trained": train(mesh.link, device)}
    outwards = f"{mesh.coord.tower}->"
    found["sent"] = [row.to_dict() for row in mesh.link.ledger.rows() if row.direction.startswith(outwards)]
    found["nccl"] = sent_by_nccl(folder, os.getpid()) if device != "cpu" else []
    found["overlap"] = overlap_of_a_step(mesh, device)
    found["resumed"] = resume(mesh, device, folder)
    found["diverged"] = diverge(mesh, device, folder)
    return found


def sent_by_nccl(folder: Path, pid: int) -> list[int]:
    """Bytes of every message that NCCL itself logged that it sends."""
    lines = (folder / f"nccl-{pid}").read_text().splitlines()
    found = [match for line in lines if (match := SEND.search(line))]
    return [int(count) * BYTES[int(kind)] for count, kind in (match.groups() for match in found)]


def overlap_of_a_step(mesh: Mesh, device: str) -> list[str]:
    """Names of the kernels that ran while NCCL's were under way in a step; on a CPU there are none."""
    config = recipe()
    net = work.make_net(config, mesh.link).to(device)
    images, labels = (tensor.to(device) for tensor in work.a_batch(config, 0, BATCH))

    def step() -> None:
        net.loss(images, labels, DropoutDraws(work.SEED, 0)).backward()

    for _ in range(2):
        step()
    kind = torch.profiler.ProfilerActivity.CPU if device == "cpu" else torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[kind]) as profile:
        step()
        if device != "cpu":
            torch.cuda.synchronize()
    events = [] if device == "cpu" else [e for e in profile.events() if e.device_type != DeviceType.CPU]
    return overlapping([(event.name, event.time_range.start, event.time_range.end) for event in events])


def overlapping(events: Sequence[tuple[str, float, float]]) -> list[str]:
    """Kernels that ran while one of NCCL's did; ``events``: name, begin and end."""
    copies = ("Memcpy", "Memset")
    crossings = [event for event in events if "nccl" in event[0].lower() and event[2] > event[1]]
    others = [event for event in events if "nccl" not in event[0].lower() and not event[0].startswith(copies)]
    return [name for name, begin, end in others if any(begin < last and first < end for _, first, last in crossings)]


def a_trainer(mesh: Mesh, device: str, run: Path) -> TimedTrainer:
    """The trainer on noise."""
    run.mkdir(parents=True, exist_ok=True)
    return TimedTrainer(recipe(), None, run, mesh=mesh, device=device)


def resume(mesh: Mesh, device: str, folder: Path) -> dict[str, Any]:
    """Weights after six steps in one go, and after three, a checkpoint, and three more in another trainer."""
    weights, steps = [], []
    for name, parts in (("whole", (6,)), ("cut", (3, 3))):
        for part in parts:
            trainer = a_trainer(mesh, device, folder / name)
            trainer.run_steps("synthetic", part)
            trainer.save()
            steps.append(trainer.step)
            trainer.end()
        weights.append(on_cpu(work.weights_of(trainer.net)))
    return {"steps": steps, "whole": weights[0], "cut": weights[1]}


def diverge(mesh: Mesh, device: str, folder: Path) -> dict[str, Any]:
    """What is said of a loss that is not finite, and the weights then and before."""
    trainer = a_trainer(mesh, device, folder / "diverged")
    trainer.run_steps("synthetic", 2)
    trainer.save()  # what the device still has to do for them is done
    before = on_cpu(work.weights_of(trainer.net))
    trainer.sources["synthetic"].next().images.fill_(math.nan)
    said = ""
    try:
        trainer.run_steps("synthetic", 4)
    except DivergedError as error:
        said = str(error)
    return {"said": said, "before": before, "after": on_cpu(work.weights_of(trainer.net))}


def lose(mesh: Mesh, device: str, folder: Path, number: signal.Signals) -> None:
    """Steps without an end; rank 1 is killed or stopped in the midst of them."""
    trainer = a_trainer(mesh, device, folder / "lost")
    trainer.run_steps("synthetic", WARM)
    mesh.link.control([0, 0, 0])  # both are warm: from now on silence means something
    mesh.begin_steps()
    while True:
        trainer.run_steps("synthetic", 1)
        if mesh.coord.rank:
            os.kill(os.getpid(), number)


def main(mode: str, device: str, folder: Path) -> int:
    """One rank; the status as the command line would give it."""
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(device)
    backend, failed, lost = "gloo" if device == "cpu" else "nccl", True, None
    try:
        mesh = connect(100.0, backend, device=device, peer_timeout_s=PEER_TIMEOUT_S)
        try:
            if mode == "facts":
                found = facts(mesh, device, folder)
                torch.save(found, folder / f"result-{mesh.coord.rank}")
            else:
                lose(mesh, device, folder, signal.SIGKILL if mode == "killed" else signal.SIGSTOP)
            failed = False
        finally:
            lost = mesh.failures.known  # as the trainer has it: all else is a consequence
            mesh.close(failed=failed)
    except Exception as error:
        known = lost or (error if isinstance(error, TrainerError) else None)
        if known is None:
            raise
        print_error(known)
        return known.status
    return 0


if __name__ == "__main__":
    sys.exit(stopping.leave(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
