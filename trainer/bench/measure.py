"""What one tower's process measures; :mod:`trainer.bench.run` starts it and puts the towers' parts together.

Everything that will be compared is measured in turns: each round gives every case one interval, so that a machine that
drifts drifts for all. Intervals are counted in batches, and both towers agree on the counts.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from pipeline.loader.stages import cached_share, describe_images, open_stage
from trainer.bench.record import Ceiling, Figure
from trainer.bench.timing import Clock, Interval, Spans, TimedTrainer
from trainer.config import Config
from trainer.parallel.crossing import Link
from trainer.parallel.mesh import Mesh
from trainer.training.step_graph import WARM_UP

LEAST, MOST = 5, 200  # repeats of a ceiling
COPY_BYTES = 1 << 27
DISK_BYTES = 1 << 28  # read at most, of a data set
WRITE_BYTES = 1 << 26
PIECE_BYTES = 1 << 22
WIRE_BYTES = 1 << 23
PINGS = 100
CHECKPOINTS = 3
MOST_REFILL_S = 1.0
UNTIL_REPLAYED = WARM_UP + 3  # steps: the first of a run may ask for the rates, the last is the first replay
BY_THREADS = "synthetic, threads: "  # what synthetic training with fewer threads is called, before their number
BY_PRECISION = "synthetic, precision: "  # and in another precision, before its name
BY_PHASE = "synthetic, kernel by kernel"  # and without the CUDA graphs in which phases cannot be told apart


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What to measure."""

    data: Path | None = None  # a prepared data set, or None for synthetic images
    seconds: float = 5.0  # length of each measurement, all its rounds together
    batch_sizes: tuple[int, ...] = ()  # to be swept besides the recipe's
    stages: bool = True  # measure ceilings and single stages too, not only the synthetic step
    phases: bool = True  # of steps that are CUDA graphs, measure the phases beside, kernel by kernel
    rounds: int = 5  # intervals of each measurement


@dataclasses.dataclass
class Part:
    """What one process found; times in seconds."""

    tower: str  # a, b or both
    threads: int = 1  # of this process's computation on a CPU
    ceilings: list[Ceiling] = dataclasses.field(default_factory=list)  # of this process, while the other measures too
    intervals: dict[str, list[Interval]] = dataclasses.field(default_factory=dict)  # by case, one per round
    checkpoints: list[float] = dataclasses.field(default_factory=list)
    checkpoint_bytes: int = 0  # of this process's part of one
    sweep: dict[int, list[float]] = dataclasses.field(default_factory=dict)  # by batch size: seconds per step
    shares_decoding: bool = False  # with the other tower
    cached: float | None = None  # share of the data set that was in memory when the stages were measured

    def seconds_per_step(self, case: str) -> list[float]:
        """Of each interval of a case."""
        return [interval.wall_s / interval.count for interval in self.intervals[case]]


def measure(
    config: Config,
    settings: BenchSettings,
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
        settings: what to measure.
        mesh: the pair of processes, or None where this one holds both towers.
        device: ``cpu`` or ``cuda:N``.
        scratch: folder for what training writes, the same for both towers.
        attach: called with every trainer before it runs; tests slow it down there.
        say: gets a line when something new begins.
    """
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # events are recorded on the current device
    part = Part(mesh.link.tower if mesh else "both")
    run = scratch / f"batch-{config.train.batch_size}"
    run.mkdir(parents=True, exist_ok=True)
    if settings.stages:
        say("ceilings of this machine")
        part.ceilings = _measure_ceilings(settings, mesh.link if mesh else None, device, run)
    usual = torch.get_num_threads()
    trainer = TimedTrainer(config, settings.data, run, mesh=mesh, device=device)  # with train.threads, where given
    try:
        part.threads = torch.get_num_threads()
        part.shares_decoding = trainer.loader.shares_decoding
        if attach:
            attach(trainer)
        cases = list(_make_cases(config, settings, trainer, faster_in_bf16=_is_faster_in_bf16(part.ceilings)))
        _take_turns(cases, settings, trainer, part, say)
        if settings.stages:
            say("checkpoints")
            part.checkpoints = [trainer.save() for _ in range(CHECKPOINTS)]
            part.checkpoint_bytes = _newest_checkpoint_bytes(run, part.tower)
    finally:
        trainer.end()
        torch.set_num_threads(usual)
    only_steps = dataclasses.replace(settings, stages=False, phases=False, batch_sizes=())
    for size in settings.batch_sizes:
        say(f"batch size {size}")
        resized = _with_batch_size(config, size)
        found = measure(resized, only_steps, mesh=mesh, device=device, scratch=scratch / "sweep", attach=attach)
        part.sweep[size] = found.seconds_per_step("end to end" if settings.data else "synthetic")
    return part


def _newest_checkpoint_bytes(run: Path, tower: str) -> int:
    newest = max((run / "checkpoints").iterdir())
    names = "tower-*.safetensors" if tower == "both" else f"tower-{tower}.safetensors"
    return sum(path.stat().st_size for path in newest.glob(names))


def _with_batch_size(config: Config, size: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))


@dataclasses.dataclass
class Case:
    """Something that makes batches or steps when asked."""

    name: str
    run: Callable[[int], Spans]  # takes a number of batches; returns the spans of steps
    settle: int  # batches that only empty or fill queues, before each interval
    count: int = 0  # batches per interval
    refill_s: float = 0.0  # how long its loader fills its queue after an interval: the next case waits for that


def _is_faster_in_bf16(ceilings: list[Ceiling]) -> bool:
    """Whether matrix products are; where they are not, a step in bf16 may take a hundred times as long."""
    rates = {row.name: row.figure.median for row in ceilings}
    return rates.get("matrix bf16", 0.0) > max(rates.get("matrix tf32", 0.0), rates.get("matrix fp32", 0.0))


def _make_cases(
    config: Config, settings: BenchSettings, trainer: TimedTrainer, *, faster_in_bf16: bool
) -> Iterator[Case]:
    """All that takes turns."""
    data, device, train, ahead = settings.data, trainer.device, config.train, config.data.prefetch + 2
    on_cpu, threads = device == "cpu", torch.get_num_threads()
    settle = UNTIL_REPLAYED if _agree_on(trainer, int(trainer.runner.has_graphs)) else 1
    if data is not None:
        if settings.stages:
            loaders = {"read": config.data, "decode": config.data}
            several = (config.data.threads or len(os.sched_getaffinity(0))) > 1
            if on_cpu and several and describe_images(data).encoding != "raw":  # how well do more threads help?
                loaders["decode, 1 thread"] = dataclasses.replace(config.data, threads=1)
            for name, loader in loaders.items():
                stage = open_stage(
                    name.split(",")[0], data, loader, batch_size=train.batch_size, device=device, seed=train.seed
                )
                yield Case(name, _taking(stage.__next__), ahead)
        yield Case("loader", _taking(trainer.sources["data"].next), ahead)
    yield Case("synthetic", lambda count: trainer.run_steps("synthetic", count), settle)
    if settings.phases and settle > 1:
        yield Case(BY_PHASE, lambda count: trainer.run_phases("synthetic", count), 1)
    if train.precision == "fp32" and _agree_on(trainer, int(faster_in_bf16)):
        yield Case(f"{BY_PRECISION}bf16", lambda count: _run_in_precision(trainer, count, "bf16"), settle)
    if data is not None:
        if settings.stages and on_cpu and threads > 1:
            yield Case(f"{BY_THREADS}{threads // 2}", lambda count: _run_with_threads(trainer, count, threads // 2), 1)
        yield Case("end to end", lambda count: trainer.run_steps("data", count), ahead)


def _taking(take: Callable[[], Any]) -> Callable[[int], Spans]:
    def run(count: int) -> Spans:
        for _ in range(count):
            take()
        return []

    return run


def _run_with_threads(trainer: TimedTrainer, count: int, threads: int) -> Spans:
    """Synthetic steps with another number of threads; nothing but the computation has them."""
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return trainer.run_steps("synthetic", count)
    finally:
        torch.set_num_threads(usual)


def _run_in_precision(trainer: TimedTrainer, count: int, precision: Literal["fp32", "bf16"]) -> Spans:
    """Synthetic steps in another precision."""
    usual, trainer.gradients.precision = trainer.gradients.precision, precision
    try:
        return trainer.run_steps("synthetic", count)
    finally:
        trainer.gradients.precision = usual


def _take_turns(
    cases: list[Case], settings: BenchSettings, trainer: TimedTrainer, part: Part, say: Callable[[str], None]
) -> None:
    """Warms everything up, finds how many batches fill an interval, then takes turns."""
    interval_s = settings.seconds / settings.rounds
    for case in cases:
        say(f"warming up: {case.name}")
        case.run(case.settle)
        batch_s = _measure_interval(case, 2, trainer).wall_s / 2
        case.count = _agree_on(trainer, max(1, round(interval_s / batch_s)))
        case.refill_s = min(MOST_REFILL_S, batch_s * (case.settle - 1))
        case.settle = _agree_on(trainer, case.settle if case.settle * batch_s < interval_s else 1)
        part.intervals[case.name] = []
    if settings.data is not None:
        part.cached = cached_share(describe_images(settings.data).tars)
    for number in range(settings.rounds):
        say(f"round {number + 1} of {settings.rounds}")
        for case in cases:
            _agree_on(trainer, 0)  # both towers begin together
            case.run(case.settle)
            part.intervals[case.name].append(_measure_interval(case, case.count, trainer))
            time.sleep(case.refill_s)


def _measure_interval(case: Case, count: int, trainer: TimedTrainer) -> Interval:
    """One interval of one case; the host waits for a GPU only before and after it."""
    on_gpu = trainer.device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize(trainer.device)
    begin_cpu, begin_own, begin = time.process_time(), time.thread_time(), time.perf_counter()
    spans = case.run(count)
    if on_gpu:
        torch.cuda.synchronize(trainer.device)
    wall, cpu, own = time.perf_counter() - begin, time.process_time() - begin_cpu, time.thread_time() - begin_own
    return Interval(count, wall, cpu, own, spans)


def _agree_on(trainer: TimedTrainer, number: int) -> int:
    """The largest of all towers' numbers."""
    if trainer.mesh is None:
        return number
    number = max(number, trainer.mesh.link.control([number, 0, 0])[0])
    if trainer.mesh.replicas:
        number = max(row[0] for row in trainer.mesh.replicas.gather([number]))
    return number


def _measure_ceilings(settings: BenchSettings, link: Link | None, device: str, scratch: Path) -> list[Ceiling]:
    """What this machine can do at most: memory, matrices, disk (only where something is read), wire."""
    seconds = min(1.0, settings.seconds / 5)
    found = [_measure_copy("memory copy", device, device, seconds)]
    if device.startswith("cuda"):
        found.append(_measure_copy("host to device", "cpu", device, seconds))
    found += _measure_matrices(device, seconds)
    if link is None or link.tower == "a":  # the disk is shared: one measures, the other waits
        if settings.data is not None:
            found += _measure_reading(describe_images(settings.data).tars)
        found.append(_measure_writing(scratch))
    if link:
        link.control([0, 0, 0])
        found += _measure_wire(link, device)
    return found


def _time_repeats(work: Callable[[], object], seconds: float, device: str = "cpu", least: int = LEAST) -> list[float]:
    """Seconds of each repeat of ``work``, for so many seconds, ``least`` times at least; a warm-up is not counted."""
    clock = Clock(device)

    def repeat(count: int) -> list[float]:
        clock.start()
        for _ in range(count):
            with clock.span("repeat"):
                work()
        return [end - begin for _, begin, end in clock.stop()]

    repeat(1)
    once_s = sum(repeat(1))
    return repeat(min(MOST, max(least, int(seconds / max(once_s, 1e-6)))))


def _measure_copy(name: str, source_device: str, device: str, seconds: float) -> Ceiling:
    """Copying memory that no cache holds: on a device, where bytes read and bytes written both count, or to it."""
    source, target = torch.ones(COPY_BYTES // 4, device=source_device), torch.empty(COPY_BYTES // 4, device=device)
    within = source_device == device
    source = source if within else source.pin_memory()
    times = _time_repeats(lambda: target.copy_(source, non_blocking=not within), seconds, device)
    figure = Figure.of([COPY_BYTES * (2 if within else 1) / t / 1e9 for t in times])
    how = f"read and written, {device}" if within else "from pinned memory"
    return Ceiling(name, figure, "GB/s", f"{COPY_BYTES >> 20} MiB, {how}")


def _measure_matrices(device: str, seconds: float) -> list[Ceiling]:
    """Square matrix products: fp32 and bf16, and on a GPU tf32, which its convolutions use for fp32."""
    on_gpu, found = device.startswith("cuda"), []
    side = 8192 if on_gpu else 1024
    before, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    for name in ("fp32", "bf16", "tf32") if on_gpu else ("fp32", "bf16"):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        a, b, out = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(3))
        times = _time_repeats(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), seconds, device)  # type: ignore[misc]
        figure = Figure.of([2 * side**3 / t / 1e9 for t in times])
        note = f"{side} x {side}, {threads} thread{'s' if threads > 1 else ''}"
        found.append(Ceiling(f"matrix {name}", figure, "GFLOP/s", note))
    torch.set_float32_matmul_precision(before)
    return found


def _measure_wire(link: Link, device: str) -> list[Ceiling]:
    """The wire between the towers, below the project's own code: both call this together, and repeat as often."""
    on = "cpu" if dist.get_backend(link.group) == "gloo" else device

    def time_exchange(num_bytes: int, repeats: int) -> list[float]:
        mine, theirs = (torch.ones(num_bytes // 4, device=on) for _ in range(2))

        def exchange() -> None:
            operations = [
                dist.P2POp(dist.isend, mine, link.peer, link.group),
                dist.P2POp(dist.irecv, theirs, link.peer, link.group),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        return _time_repeats(exchange, 0.0, on, least=repeats)

    latency = Figure.of([t * 1e6 for t in time_exchange(8, PINGS)])
    bandwidth = Figure.of([WIRE_BYTES / t / 1e9 for t in time_exchange(WIRE_BYTES, LEAST)])
    note = f"{WIRE_BYTES >> 20} MiB each way, both ways at once, {dist.get_backend(link.group)}"
    return [
        Ceiling("exchange latency", latency, "us", "8 bytes, both ways at once"),
        Ceiling("exchange bandwidth", bandwidth, "GB/s", note),
    ]


def _measure_reading(tars: tuple[str, ...]) -> list[Ceiling]:
    """Reading the data set's own files, cold where the system lets go of them, then from memory."""
    cold, warm, kept, budget = [], [], 0.0, DISK_BYTES
    for number, tar in enumerate(tars):
        size = Path(tar).stat().st_size
        if number and size > budget:
            break
        budget -= size
        descriptor = os.open(tar, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # asks the system to forget the file's pages
        os.close(descriptor)
        share = cached_share((tar,))
        kept += 1.0 if share is None else share
        cold.append(_read_rate(tar))
        warm.append(_read_rate(tar))
    kept /= len(cold)
    state = "cold" if kept < 0.05 else f"{kept:.0%} of it was still in memory after asking to let go"
    return [
        Ceiling("disk read", Figure.of(cold), "MB/s", f"the data set's tars, {state}"),
        Ceiling("cached read", Figure.of(warm), "MB/s", "the same tars from memory"),
    ]


def _read_rate(path: str) -> float:
    """MB/s of reading a file from its begin to its end."""
    buffer = bytearray(PIECE_BYTES)
    begin, total = time.perf_counter(), 0
    with Path(path).open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total / (time.perf_counter() - begin) / 1e6


def _measure_writing(scratch: Path) -> Ceiling:
    """Writing a file, until it is on the disk."""
    block, path, rates = b"\x5a" * PIECE_BYTES, scratch / "write-test", []
    for _ in range(LEAST):
        begin = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(WRITE_BYTES // PIECE_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        rates.append(WRITE_BYTES / (time.perf_counter() - begin) / 1e6)
        path.unlink()
    return Ceiling("disk write", Figure.of(rates), "MB/s", f"{WRITE_BYTES >> 20} MiB and fsync")
