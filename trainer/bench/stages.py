"""What one tower's process measures; :mod:`trainer.bench.run` starts it and puts the towers' parts together.

Everything that will be compared is measured in turns: each round gives every contestant one slot, so that a machine
that drifts drifts for all. Slots are counted in batches, and both towers agree on the counts.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.bench.ceilings import disk_ceilings, measure_ceilings, wire_ceilings, write_ceiling
from trainer.bench.record import FEWER, Ceiling, Span
from trainer.bench.timing import Slot, TimedTrainer, middle_step, timeline
from trainer.config import Config
from trainer.parallel.link import Link
from trainer.parallel.mesh import Mesh

ROUNDS = 5
CHECKPOINTS = 3
MOST_REFILL_S = 1.0


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        data: a prepared data set, or None for synthetic pictures.
        seconds: length of each measurement, all its rounds together.
        batch_sizes: to be swept besides the recipe's.
        stages: measure ceilings and single stages too, not only the synthetic step.
        rounds: slots of each measurement.
    """

    data: Path | None = None
    seconds: float = 5.0
    batch_sizes: tuple[int, ...] = ()
    stages: bool = True
    rounds: int = ROUNDS


@dataclasses.dataclass
class Part:
    """What one process found; times in seconds.

    Attributes:
        tower: ``a``, ``b`` or ``both``.
        threads: of this process's computation on a CPU.
        ceilings: of this process, while the other measures too.
        slots: of ``read``, ``decode``, ``loader``: (batches, wall, processor time, that of this thread) of each;
            ``synthetic``, ``synthetic, N threads``, ``end to end``: the same with steps.
        steps: of ``synthetic`` and ``end to end``: seconds of each stage in each step.
        timeline: a step of the largest whole there is.
        checkpoints: of each checkpoint.
        checkpoint_bytes: of this process's part of one.
        sweep: by batch size: seconds a step of each slot, end to end where there are data.
        cached: share of the data set that was in memory when the stages were measured.
    """

    tower: str
    threads: int = 1
    ceilings: list[Ceiling] = dataclasses.field(default_factory=list)
    slots: dict[str, list[tuple[int, float, float, float]]] = dataclasses.field(default_factory=dict)
    steps: dict[str, list[dict[str, float]]] = dataclasses.field(default_factory=dict)
    timeline: list[Span] = dataclasses.field(default_factory=list)
    checkpoints: list[float] = dataclasses.field(default_factory=list)
    checkpoint_bytes: int = 0
    sweep: dict[int, list[float]] = dataclasses.field(default_factory=dict)
    cached: float | None = None


def measure(
    config: Config,
    options: BenchOptions,
    *,
    mesh: Mesh | None,
    device: str,
    scratch: Path,
    attach: Callable[[TimedTrainer], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Part:
    """Measures everything that this process takes part in; both towers call it together.

    Args:
        config: the recipe.
        options: what to measure.
        mesh: the pair of processes, or None where this one holds both towers.
        device: ``cpu`` or ``cuda:N``.
        scratch: folder for what training writes, the same for both towers.
        attach: called with every trainer before it runs; tests slow it down there.
        say: gets a line when something new begins.
    """
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # events are recorded on the current device
    link = mesh.link if mesh else None
    part = Part(link.tower if link else "both")
    run = scratch / f"batch-{config.train.batch_size}"
    run.mkdir(parents=True, exist_ok=True)
    if options.stages:
        say("ceilings of this machine")
        part.ceilings = _ceilings(options, link, device, run)
    usual = torch.get_num_threads()
    trainer = TimedTrainer(config, options.data, run, mesh=mesh, device=device)  # with train.threads, where given
    try:
        part.threads = torch.get_num_threads()
        if attach:
            attach(trainer)
        _rounds(_contestants(config, options, trainer, device), options, trainer, part, say)
        if options.stages:
            say("checkpoints")
            part.checkpoints = [trainer.save() for _ in range(CHECKPOINTS)]
            part.checkpoint_bytes = _checkpoint_bytes(run, part.tower)
    finally:
        trainer.end()
        torch.set_num_threads(usual)
    only = dataclasses.replace(options, stages=False, batch_sizes=())
    for size in options.batch_sizes:
        say(f"batch size {size}")
        resized = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))
        found = measure(resized, only, mesh=mesh, device=device, scratch=scratch / "sweep", attach=attach)
        name = "end to end" if options.data is not None else "synthetic"
        part.sweep[size] = [wall / count for count, wall, *_ in found.slots[name]]
    return part


def _ceilings(options: BenchOptions, link: Link | None, device: str, scratch: Path) -> list[Ceiling]:
    """All ceilings; those of the disk only where something is read."""
    found = measure_ceilings(device, min(1.0, options.seconds / 5))
    if link is None or link.tower == "a":  # the disk is shared: one measures, the other waits
        found += _disk(options, scratch)
    if link:
        link.control([0, 0, 0])
        found += wire_ceilings(link, device, options.seconds / 5)
    return found


def _disk(options: BenchOptions, scratch: Path) -> list[Ceiling]:
    """Reading where something is read, and writing."""
    if options.data is None:
        return [write_ceiling(scratch)]
    from pipeline.loader.stages import describe_pictures

    return disk_ceilings(describe_pictures(options.data).tars, scratch)


def _checkpoint_bytes(run: Path, tower: str) -> int:
    names = "tower-*.safetensors" if tower == "both" else f"tower-{tower}.safetensors"
    newest = max((run / "checkpoints").iterdir())
    return sum(path.stat().st_size for path in newest.glob(names))


@dataclasses.dataclass
class Contestant:
    """Something that makes batches or steps when asked.

    Attributes:
        name: what it is.
        run: takes a number of batches; a slot with spans for steps, None otherwise.
        settle: batches that only empty or fill queues, before each slot.
        count: batches a slot.
        refill_s: after a slot, how long its loader works on filling its queue again: the next one waits for that.
    """

    name: str
    run: Callable[[int], Slot | None]
    settle: int
    count: int = 0
    refill_s: float = 0.0


def _contestants(config: Config, options: BenchOptions, trainer: TimedTrainer, device: str) -> list[Contestant]:
    """All that takes turns."""
    ahead = config.data.prefetch + 2
    found = []
    if options.data is not None:
        if options.stages:
            for name in ("read", "decode"):
                batches = _stage(name, config, options.data, device)
                found.append(Contestant(name, _taking(batches), ahead))
            found += _one_thread(config, options.data, device)
        loader = trainer.sources["data"]
        found.append(Contestant("loader", _taking(_batches_of(loader)), ahead))
    found.append(Contestant("synthetic", lambda count: trainer.run_steps("synthetic", count), 1))
    threads = torch.get_num_threads()
    if options.data is not None and options.stages and device == "cpu" and threads > 1:
        fewer = threads // 2
        found.append(Contestant(f"{FEWER}{fewer}", lambda count: _with_threads(trainer, count, fewer), 1))
    if options.data is not None:
        found.append(Contestant("end to end", lambda count: trainer.run_steps("data", count), ahead))
    return found


def _with_threads(trainer: TimedTrainer, count: int, threads: int) -> Slot:
    """Synthetic steps with another number of threads; nothing but the computation has them."""
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return trainer.run_steps("synthetic", count)
    finally:
        torch.set_num_threads(usual)


def _cached(data: Path) -> float | None:
    """Share of the data set's pages in memory."""
    from pipeline.loader.stages import cached_share, describe_pictures

    return cached_share(describe_pictures(data).tars)


def _one_thread(config: Config, data: Path, device: str) -> list[Contestant]:
    """Decoding with one thread, the measure of how well more of them help; none where nothing is decoded here."""
    from pipeline.loader.stages import describe_pictures

    threads = config.data.threads or len(os.sched_getaffinity(0))
    if device != "cpu" or threads == 1 or describe_pictures(data).encoding == "raw":
        return []
    single = dataclasses.replace(config, data=dataclasses.replace(config.data, threads=1))
    return [Contestant("decode, 1 thread", _taking(_stage("decode", single, data, device)), config.data.prefetch + 2)]


def _stage(name: str, config: Config, data: Path, device: str) -> Iterator[None]:
    from pipeline.loader.stages import open_stage

    train = config.train
    return open_stage(name, data, config.data, batch_size=train.batch_size, device=device, seed=train.seed)


def _batches_of(loader: Any) -> Iterator[None]:
    while True:
        loader.next()
        yield


def _taking(batches: Iterator[None]) -> Callable[[int], None]:
    def take(count: int) -> None:
        for _ in range(count):
            next(batches)

    return take


def _rounds(
    contestants: list[Contestant],
    options: BenchOptions,
    trainer: TimedTrainer,
    part: Part,
    say: Callable[[str], None],
) -> None:
    """Warms everything up, finds how many batches fill a slot, then takes turns."""
    slot_s = options.seconds / options.rounds
    for contestant in contestants:
        say(f"warming up: {contestant.name}")
        contestant.run(contestant.settle)
        _wait(trainer)
        begin = time.perf_counter()
        contestant.run(2)
        _wait(trainer)
        batch_s = (time.perf_counter() - begin) / 2
        contestant.count = _agreed(trainer, max(1, round(slot_s / batch_s)))
        contestant.refill_s = min(MOST_REFILL_S, batch_s * (contestant.settle - 1))
        contestant.settle = _agreed(trainer, contestant.settle if contestant.settle * batch_s < slot_s else 1)
    if options.data is not None:
        part.cached = _cached(options.data)
    kept: dict[str, list[Slot]] = {}
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        for contestant in contestants:
            _agreed(trainer, 0)  # both towers begin together
            contestant.run(contestant.settle)
            _take_slot(contestant, part, kept, trainer)
            time.sleep(contestant.refill_s)
    for name, slots in kept.items():
        part.steps[name] = [step for slot in slots for step in slot.by_step()]
    shown = kept["end to end" if "end to end" in kept else "synthetic"]
    step = _agreed(trainer, 0 if part.tower == "b" else middle_step(shown))  # both show the same step: tower a's choice
    part.timeline = timeline(shown, step, part.tower)


def _take_slot(contestant: Contestant, part: Part, kept: dict[str, list[Slot]], trainer: TimedTrainer) -> None:
    """One slot of one contestant."""
    _wait(trainer)
    begin_cpu, begin_own, begin = time.process_time(), time.thread_time(), time.perf_counter()
    slot = contestant.run(contestant.count)
    _wait(trainer)
    wall, cpu, own = time.perf_counter() - begin, time.process_time() - begin_cpu, time.thread_time() - begin_own
    if slot:
        kept.setdefault(contestant.name, []).append(slot)
    part.slots.setdefault(contestant.name, []).append((contestant.count, wall, cpu, own))


def _wait(trainer: TimedTrainer) -> None:
    """Lets a GPU finish; outside of what is timed by events."""
    if trainer.device.startswith("cuda"):
        torch.cuda.synchronize(trainer.device)


def _agreed(trainer: TimedTrainer, number: int) -> int:
    """The largest of all towers' numbers."""
    if trainer.mesh is None:
        return number
    number = max(number, trainer.mesh.link.control([number, 0, 0])[0])
    if trainer.mesh.replicas:
        number = max(row[0] for row in trainer.mesh.replicas.gather([number]))
    return number
