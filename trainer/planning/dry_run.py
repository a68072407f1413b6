"""What a training run would take, before it is started: steps, memory a device, time, and what would cross.

One image and then two go through the very net that would train, and autograd is asked what it keeps for the backward;
that is linear in the images. A few steps of the whole batch are then timed.
"""

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipeline.manifest import read_manifest
from trainer.config import TOWERS, Config
from trainer.model.alexnet import AlexNet
from trainer.model.layers import DropoutDraws
from trainer.parallel.crossing import make_net
from trainer.parallel.link import CONTROL_WORDS, Link
from trainer.precision import autocast
from trainer.training.checkpoint import choose
from trainer.training.optimizer import PaperSGD
from twotower.words import pluralize

MEASURE_S = 3.0  # steps are repeated for about this long, after a first one that warms up
MOST_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Memory:
    """What one process holds in training, bytes.

    Attributes:
        holder: ``both towers``, ``tower a`` or ``tower b``.
        parameters: weights and biases; gradients and velocities are as large each.
        kept: what the forward keeps for the backward, at the recipe's batch: maps, masks, indices of maxima.
        batches: batches that the loader has ready, and the one in work.
    """

    holder: str
    parameters: int
    kept: int
    batches: int

    @property
    def total(self) -> int:
        """All of it; the scratch memory of single operations comes on top."""
        return 3 * self.parameters + self.kept + self.batches


@dataclasses.dataclass(frozen=True)
class CrossingRow:
    """One message of a training step.

    Attributes:
        name: the layer whose input crosses, or ``control``.
        phase: ``forward``, ``backward`` or ``step``.
        direction: ``a->b`` or ``b->a``.
        num_bytes: payload.
    """

    name: str
    phase: str
    direction: str
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run would take.

    Attributes:
        config: the recipe.
        device: ``cpu`` or ``cuda:N``.
        processes: 1 or 2.
        steps_per_epoch: batches of the training split.
        done: steps that a checkpoint has already.
        memory: of each process.
        available_bytes: free memory of the device now; None where that is not known.
        crossings: what would cross in a step; empty in one process.
        step_s: median time of a step, s; None where it was not measured.
        measured: what was timed, in words, or why nothing was.
        replicas: pairs of processes; memory and crossings are one pair's, time is for its share of the batch.
    """

    config: Config
    device: str
    processes: int
    steps_per_epoch: int
    done: int
    memory: tuple[Memory, ...]
    available_bytes: int | None
    crossings: tuple[CrossingRow, ...]
    step_s: float | None
    measured: str
    replicas: int = 1

    @property
    def images(self) -> int:
        """Images that a process takes in a step."""
        return self.config.train.batch_size // self.replicas

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.train.epochs * self.steps_per_epoch

    @property
    def remaining_s(self) -> float | None:
        """Time of the steps to come, s."""
        return None if self.step_s is None else (self.steps - self.done) * self.step_s

    @property
    def shares_memory(self) -> bool:
        """Whether all processes draw on the same memory."""
        return not _own_devices(self.device, self.processes * self.replicas)

    @property
    def needed_bytes(self) -> int:
        """Most that one device has to hold."""
        totals = [row.total for row in self.memory]
        return sum(totals) * self.replicas if self.shares_memory else max(totals)


class EchoLink:
    """Stands in for a :class:`trainer.parallel.link.Link` of one tower alone: its own half for the other tower's.

    Attributes:
        tower: ``a`` or ``b``.
        crossed: bytes of a half that the newest forward sends or receives, by layer in their order.
    """

    def __init__(self, tower: str) -> None:
        self.tower = tower
        self.crossed: dict[str, int] = {}

    def exchange(self, layer: str, phase: str, mine: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Gives a copy back: the other tower's half has memory of its own."""
        if phase == "forward":
            self.crossed[layer] = mine.numel() * (dtype or mine.dtype).itemsize
        return mine.clone()

    isend = exchange

    def irecv(
        self, layer: str, phase: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Gives a copy of ``like``, the own half; where that has another shape, zeros."""
        half = like if like.shape == tuple(shape) else like.new_zeros(tuple(shape))
        return self.exchange(layer, phase, half, dtype)

    def wait(self, half: Tensor) -> Tensor:
        """It is here."""
        return half


def _lone_tower(config: Config, link: EchoLink, device: str = "cpu") -> AlexNet:
    """One tower without the other."""
    return make_net(config, cast(Link, link), device=device)


def plan_run(
    config: Config,
    data: Path,
    *,
    run: Path | None = None,
    processes: int = 1,
    replicas: int = 1,
    device: str = "cpu",
    measure: bool = True,
) -> RunPlan:
    """Finds out what a run would take; starts no process and writes nothing.

    Args:
        config: the recipe, checked against the data set.
        data: data set folder.
        run: run folder to go on from, or None for a new run.
        processes: 1 or 2.
        replicas: pairs of processes.
        device: ``cpu`` or ``cuda:N``.
        measure: time steps of the whole batch; left out where they would not fit into memory.
    """
    samples, size = read_manifest(data).splits["train"].num_samples, config.train.batch_size
    newest = choose(run) if run is not None else None
    memory, crossings = _count(config, processes, config.train.batch_size // replicas)
    plan = RunPlan(
        config=config,
        device=device,
        processes=processes,
        steps_per_epoch=-(-samples // size) if config.data.last_batch == "partial" else samples // size,
        done=newest.record.step if newest else 0,
        memory=memory,
        available_bytes=_available_bytes(device),
        crossings=crossings,
        step_s=None,
        measured="not measured",
        replicas=replicas,
    )
    if plan.available_bytes is not None and plan.needed_bytes > plan.available_bytes:
        return dataclasses.replace(plan, measured="not measured: it does not fit into memory")
    return _measure(plan) if measure else plan


def _count(config: Config, processes: int, batch: int) -> tuple[tuple[Memory, ...], tuple[CrossingRow, ...]]:
    """Memory of each process of a pair that takes ``batch`` images per step, and what crosses between them."""
    if processes == 1:
        holder = "both towers" if config.model.towers == 2 else "the tower"
        return (_memory(config, make_net(config, None), holder, batch),), ()
    memory, crossed = [], {}
    for tower in TOWERS:
        link = EchoLink(tower)
        memory.append(_memory(config, _lone_tower(config, link), f"tower {tower}", batch))
        crossed = link.crossed
    return tuple(memory), tuple(_crossing_rows({layer: size // 2 * batch for layer, size in crossed.items()}))


def _crossing_rows(crossed: dict[str, int]) -> list[CrossingRow]:
    """The messages of a step, in their order; ``crossed`` holds bytes of a half by layer."""
    rows = []
    for phase, layers in (("forward", list(crossed)), ("backward", list(reversed(crossed)))):
        for layer in layers:
            ways = ("a->b", "b->a")
            if layer == "fc8":  # lives on tower a: maps go there, gradients come back
                ways = ("b->a",) if phase == "forward" else ("a->b",)  # type: ignore[assignment]
            rows += [CrossingRow(layer, phase, way, crossed[layer]) for way in ways]
    return rows + [CrossingRow("control", "step", way, 8 * CONTROL_WORDS) for way in ("a->b", "b->a")]


def _memory(config: Config, net: AlexNet, holder: str, batch: int) -> Memory:
    """Memory of the process that trains ``net``."""
    one, two = (_kept_bytes(config, net, count) for count in (1, 2))
    model, train = config.model, config.train
    image = 4 * model.in_channels * model.image_px**2
    return Memory(
        holder=holder,
        parameters=sum(parameter.nbytes for parameter in net.parameters()),
        kept=2 * one - two + batch // train.accumulate * (two - one),
        batches=(config.data.prefetch + 1) * batch * image,
    )


def _kept_bytes(config: Config, net: AlexNet, count: int) -> int:
    """Bytes that autograd keeps between forward and backward of ``count`` images, on the CPU, each storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images, labels = _made_up_batch(config, count, "cpu")
    precision = autocast(config.train.precision, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
        loss = net.loss(images, labels, DropoutDraws(0, 0))  # alive until counted, and with it what it keeps
    size = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in parameters)
    del loss
    return size


def _made_up_batch(config: Config, count: int, device: str) -> tuple[Tensor, Tensor]:
    """Noise on the scale of images without their mean, (N, C, S, S), and labels (N,)."""
    model = config.model
    generator = torch.Generator().manual_seed(0)
    images = torch.empty(count, model.in_channels, model.image_px, model.image_px).uniform_(-1, 1, generator=generator)
    images *= 128 if config.data.normalize == "none" else 1
    labels = torch.arange(count) % model.classes
    return images.to(device).contiguous(memory_format=torch.channels_last), labels.to(device)


def _own_devices(device: str, processes: int) -> bool:
    """Whether each of all processes would have a GPU of its own."""
    return processes >= 2 and device.startswith("cuda") and torch.cuda.device_count() >= processes


def _available_bytes(device: str) -> int | None:
    """Free memory of a device."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _measure(plan: RunPlan) -> RunPlan:
    """Times steps of the whole batch: tower a alone where it would have its own GPU, else both towers here."""
    config, device = plan.config, plan.device
    alone = _own_devices(device, plan.processes * plan.replicas)
    net = _lone_tower(config, EchoLink("a"), device) if alone else make_net(config, None, device=device)
    optimizer = PaperSGD(net.named_parameters(), config.optimizer)
    images, labels = _made_up_batch(config, plan.images, device)
    times: list[float] = []
    busy = "" if device.startswith("cuda") else _busy()
    while len(times) < 2 or (sum(times[1:]) < MEASURE_S and len(times) <= MOST_STEPS):
        times.append(_time_step(config, net, optimizer, (images, labels), device))
    holder = "tower a alone" if alone else "both towers in this process" if config.model.towers == 2 else "the tower"
    steps = "one step" if len(times) == 2 else f"median of {pluralize(len(times) - 1, 'step')}"
    share = f", {pluralize(plan.images, 'image')} of one of {plan.replicas} replicas" if plan.replicas > 1 else ""
    words = f"{steps} of {holder}{share} on made-up images, without loading and crossing{busy}"
    return dataclasses.replace(plan, step_s=statistics.median(times[1:]), measured=words)


def _busy() -> str:
    """A warning where other processes have work for all cores: the steps are then slower than they could be."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    return (
        f"; the machine is busy (load {load:.1f} on {pluralize(cores, 'core')}), so this is too long"
        if load > cores
        else ""
    )


def _time_step(config: Config, net: AlexNet, optimizer: PaperSGD, batch: tuple[Tensor, Tensor], device: str) -> float:
    """Wall time of one step, s."""
    begin = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    for images, labels in zip(*(part.chunk(config.train.accumulate) for part in batch), strict=True):
        with autocast(config.train.precision, device):
            loss = net.loss(images, labels, DropoutDraws(0, 0))
        loss.backward()
    optimizer.step()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def print_plan(plan: RunPlan) -> None:
    """Prints a plan for people."""
    console = Console(width=None if Console().is_terminal else 110, highlight=False)
    train = plan.config.train
    towers = "one process" if plan.processes == 1 else "two processes, one per tower"
    towers = f"{plan.replicas} replicas of {towers}" if plan.replicas > 1 else towers
    console.out(f"{towers}, {plan.device}, {train.precision}, batch {train.batch_size}")
    more = f", {plan.done:,} of them done" if plan.done else ""
    epochs, steps = pluralize(train.epochs, "epoch"), pluralize(plan.steps_per_epoch, "step")
    console.out(f"{epochs} of {steps}: {pluralize(plan.steps, 'step')}{more}")
    table = Table(title="memory, MiB", title_justify="left")
    table.add_column("process")
    for heading in ("parameters", "gradients", "velocities", "kept for backward", "batches", "total"):
        table.add_column(heading, justify="right")
    for row in plan.memory:
        cells = (row.parameters, row.parameters, row.parameters, row.kept, row.batches, row.total)
        table.add_row(row.holder, *(f"{cell / 2**20:,.1f}" for cell in cells))
    console.print(table)
    if plan.available_bytes is not None:
        fits = "fits" if plan.needed_bytes <= plan.available_bytes else "does NOT fit"
        where = "the device" if plan.device != "cpu" else "the machine"
        available, needed = plan.available_bytes / 2**20, plan.needed_bytes / 2**20
        console.out(
            f"{fits}: {where} has {available:,.0f} MiB free, {needed:,.0f} are needed, and scratch memory on top"
        )
    if plan.crossings:
        _print_crossings(plan.crossings, console)
    elif plan.config.model.towers == 2:
        console.out("One process: nothing crosses.")
    if plan.step_s is None or plan.remaining_s is None:
        console.out(f"time: {plan.measured}")
        return
    rate = train.batch_size / plan.step_s
    console.out(f"time: {plan.step_s:.3g} s a step, {rate:,.0f} images/s; {_duration(plan.remaining_s)} for the steps,")
    console.out(f"      evaluations not counted ({plan.measured})")


def _print_crossings(rows: Sequence[CrossingRow], console: Console) -> None:
    """The crossings of a step."""
    total = sum(row.num_bytes for row in rows)
    table = Table(title="what would cross in a step, bytes", title_justify="left", show_footer=True)
    table.add_column("input of", footer="both ways")
    table.add_column("phase")
    table.add_column("direction")
    table.add_column("bytes", justify="right", footer=f"{total:,}")
    for row in rows:
        table.add_row(row.name, row.phase, row.direction, f"{row.num_bytes:,}")
    console.print(table)


def _duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
