"""What the processes of one-weird-trick do: ``python -m trainer.experiments.one_weird_trick.worker JOB``.

The same steps, on one process, two or four: updates whose losses, gradients and weights are compared; and steps that
are timed, the layouts in turn.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import stopping
from trainer.config import Config, from_toml
from trainer.errors import TrainerError
from trainer.experiments.one_weird_trick.traffic import sent_by_layer
from trainer.model.alexnet import AlexNet
from trainer.parallel.crossing import make_net
from trainer.parallel.launch import choose_device, die_with_parent, join_mesh
from trainer.parallel.mesh import Mesh
from trainer.parallel.weird_trick import WorkerNet, WorkerStep, make_worker_net, pair_rows, worker_rows
from trainer.parallel.world import read_world
from trainer.training.optimizer import PaperSGD
from trainer.training.step import ForwardBackward
from twotower.terminal import print_error
from twotower.typed import build
from twotower.untrusted import parse_json

DTYPES = {"float64": torch.float64, "float32": torch.float32}
IMAGES_NAME, PART_NAME = "images.pt", "part-{}.pt"


@dataclasses.dataclass(frozen=True)
class Job:
    """What all processes of a start are told.

    Attributes:
        kind: ``equality`` or ``speed``.
        towers, one_tower: recipes as TOML text.
        batch_size: images of a step, of all processes together.
        updates: of ``equality``.
        device: of ``speed``, as ``--device`` has it; equality is a claim about arithmetic, and stays on the CPU.
        cpus: cores for all processes together.
        rounds: of ``speed``: how often each case is timed.
        slot_s: seconds of such a time, at least.
    """

    kind: str
    towers: str
    one_tower: str
    batch_size: int
    updates: int = 0
    device: str | None = "cpu"
    cpus: int = 1
    rounds: int = 0
    slot_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Case:
    """Something that is timed.

    Attributes:
        name: of its times.
        net: ``two towers`` or ``one tower``.
        processes: 1: the trainer's step for the whole net; 2: the towers, or the workers.
        threads: of each process.
    """

    name: str
    net: str
    processes: int
    threads: int


def speed_cases(cpus: int) -> list[Case]:
    """For each net: one process with the cores of one of two, one with all, and two."""
    half, found = max(1, cpus // 2), []
    for net, name in (("two towers", "two-towers"), ("one tower", "one-tower")):
        found.append(Case(f"{name}-share", net, 1, half))
        if cpus > half:
            found.append(Case(f"{name}-all", net, 1, cpus))
        found.append(Case(f"{name}-pair", net, 2, half))
    return found


def train(
    mesh: Mesh | None, config: Config, images: Tensor, labels: Tensor, *, batch_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Updates of the net of one tower, by workers or by one process, a batch each; on the CPU.

    Args:
        mesh: the other processes, or None for one.
        config: the recipe of one tower.
        images: (updates x batch_size, C, S, S).
        labels: (updates x batch_size,) int64.
        batch_size: of all processes together.
        dtype: of all numbers.

    Returns:
        ``losses`` (of this pair's rows), ``gradients`` of the first update and ``weights`` after the last, by name,
        and ``sent``: bytes by layer of the last step.
    """
    net: AlexNet = make_worker_net(config, mesh.link) if mesh else make_net(config, None)
    net.to(dtype)
    step_of = step_of_layout(net, config, mesh)
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    losses, gradients = [], {}
    for step in range(len(images) // batch_size):
        batch = slice(step * batch_size, (step + 1) * batch_size)
        if mesh:
            mesh.link.ledger.clear()
        losses.append(step_of(images[batch].to(dtype), labels[batch], step))
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}  # type: ignore[union-attr]
        optimizer.step()
    weights = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    sent = sent_by_layer(mesh.link.ledger.rows()) if mesh else {}
    return {"losses": losses, "gradients": gradients, "weights": weights, "sent": sent}


def step_of_layout(
    net: AlexNet, config: Config, mesh: Mesh | None, device: str = "cpu"
) -> Callable[[Tensor, Tensor, int], float]:
    """A step of whatever layout the net has, given the whole batch."""
    if isinstance(net, WorkerNet) and mesh:
        inner, coord = WorkerStep(net, mesh, seed=config.train.seed), mesh.coord
        return lambda images, labels, step: inner(
            images[worker_rows(coord, len(images))], labels[pair_rows(coord, len(labels))], step
        )
    step_of = ForwardBackward(net, config.train, mesh=mesh, device=device)
    return lambda images, labels, step: float(step_of(images, labels, step))


def time_cases(mesh: Mesh, job: Job, images: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Images/s of every case, one figure a round; the cases take turns, and each round begins with another one.

    What one process does is done by the first; the second waits for a message meanwhile.
    """
    device = choose_device(job.device, mesh.coord.rank)
    images, labels = images.to(device), labels.to(device)
    cases = speed_cases(job.cpus)
    runs = {case.name: _repeated(case, job, mesh, images, labels, device) for case in cases}
    steps = {}
    for case in cases:
        _slot(mesh, runs[case.name], 1)  # the first step allocates and compiles
        spent = _slot(mesh, runs[case.name], 1)
        told = mesh.link.control([max(1, math.ceil(job.slot_s / spent)), 0, 0])
        steps[case.name] = max(1, math.ceil(job.slot_s / spent)) if mesh.coord.rank == 0 else told[0]
    rates: dict[str, list[float]] = {case.name: [] for case in cases}
    for number in range(job.rounds):
        place = number % len(cases)
        for case in cases[place:] + cases[:place]:
            spent = _slot(mesh, runs[case.name], steps[case.name])
            rates[case.name].append(steps[case.name] * len(images) / spent)
    return rates


def _slot(mesh: Mesh, run: Callable[[int], None], steps: int) -> float:
    """Seconds that steps take until the last process has done them."""
    mesh.link.control([0, 0, 0])
    begin = time.perf_counter()
    run(steps)
    mesh.link.control([0, 0, 0])
    return time.perf_counter() - begin


def _repeated(case: Case, job: Job, mesh: Mesh, images: Tensor, labels: Tensor, device: str) -> Callable[[int], None]:
    """Does so many steps of a case, updates and all; nothing in a process that has no part in it."""
    if case.processes == 1 and mesh.coord.rank:
        return lambda steps: None
    config = from_toml(job.towers if case.net == "two towers" else job.one_tower)
    if case.processes == 1:
        others, net = None, make_net(config, None, device=device)
    elif case.net == "two towers":
        others, net = mesh, make_net(config, mesh.link, device=device)
    else:
        others, net = mesh, make_worker_net(config, mesh.link, device=device)
    step_of = step_of_layout(net, config, others, device)
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)

    def run(steps: int) -> None:
        torch.set_num_threads(case.threads)
        for step in range(steps):
            step_of(images, labels, step)
            optimizer.step()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    return run


def main(path: Path) -> None:
    """One process of a start: reads the job, and leaves its part beside it."""
    die_with_parent()
    job: Job = build(Job, parse_json(path.read_bytes()))
    config = from_toml(job.one_tower)
    world = read_world(None)
    assert world is not None
    device = "cpu" if job.kind == "equality" else choose_device(job.device, world.local_rank)
    with join_mesh(world, device, config.train) as mesh:
        told = torch.load(path.parent / IMAGES_NAME, weights_only=True)
        images, labels = told["images"], told["labels"]
        if job.kind == "equality":
            torch.set_num_threads(max(1, job.cpus // world.size))
            found: Any = {
                name: train(mesh, config, images, labels, batch_size=job.batch_size, dtype=dtype)
                for name, dtype in DTYPES.items()
            }
        else:
            found = time_cases(mesh, job, images[: job.batch_size], labels[: job.batch_size])
        torch.save(found, path.parent / PART_NAME.format(world.rank))
        mesh.wait_for_all()


def write_job(folder: Path, job: Job, images: Tensor, labels: Tensor) -> list[str]:
    """Leaves a job in a folder; returns the command of each of its processes."""
    path = folder / "job.json"
    path.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
    torch.save({"images": images, "labels": labels}, folder / IMAGES_NAME)
    return [sys.executable, "-m", "trainer.experiments.one_weird_trick.worker", str(path)]


def run() -> int:
    """The process's exit status."""
    try:
        stopping.raise_on_stop()
        main(Path(sys.argv[1]))
    except stopping.Stopped as stop:  # who started this says so
        return stop.status
    except TrainerError as error:
        print_error(error)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(stopping.leave(run()))
