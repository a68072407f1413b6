"""``python -m trainer bench``: starts the processes that measure, and puts what they found together.

Reading order: this file; ``measure`` (what is measured), ``timing`` (the clock in the trainer), ``record`` (the
result), ``prediction`` and ``bottleneck`` (what follows from it), ``text`` and ``page`` (how it is said).
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.loader.stages import describe_images
from trainer.bench.measure import BY_PHASE, BY_PRECISION, BY_THREADS, BenchSettings, Part, measure
from trainer.bench.prediction import FLOAT_BYTES
from trainer.bench.record import BenchRecord, Figure, Span, Stage, Throughput, Workload
from trainer.bench.timing import Interval, Spans, seconds_by_stage, steps_of
from trainer.config import Config, ModelConfig, from_toml, to_toml
from trainer.errors import BenchError
from trainer.parallel.launch import choose_device, die_with_parent, join_mesh, run_towers, shares_gpu
from trainer.parallel.world import read_world
from trainer.planning.describe import count_crossings, count_layers
from trainer.training.metrics import describe_environment
from twotower import verbosity
from twotower.typed import build
from twotower.untrusted import parse_json

OPTIMIZER_PASSES = 5  # weights, gradients and velocities read, weights and velocities written
Say = Callable[[str], None]
_STARTED = time.monotonic()


def run_bench(
    config: Config,
    settings: BenchSettings,
    *,
    recipe: str,
    processes: int,
    device: str | None = None,
    backend: str = "auto",
    scaling: tuple[int, ...] = (),
    say: Say = lambda _: None,
) -> BenchRecord:
    """Measures a recipe.

    Args:
        config: the recipe; ``recipe``: its name, for the record.
        settings: what to measure.
        processes: 1: both towers here; 2: a process each.
        device: ``cpu``, ``cuda``, ``cuda:N`` or None for a GPU where there is one.
        backend: of several processes, see :mod:`trainer.parallel.backend`.
        scaling: numbers of processes whose synthetic training is measured too.
        say: gets progress lines.

    Raises:
        BenchError: a measuring process failed.
    """
    parts = measure_parts(config, settings, processes=processes, device=device, backend=backend, say=say)
    points = {}
    for count in scaling:
        say(f"{count} process{'es' if count > 1 else ''}, synthetic")
        only = dataclasses.replace(settings, data=None, stages=False, phases=False, batch_sizes=())
        batch = config.train.batch_size * max(1, count // 2)  # every pair takes the recipe's batch
        grown = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch))
        found = measure_parts(grown, only, processes=count, device=device, backend=backend, say=lambda _: None)
        points[count] = _rate(_slowest_s(found, "synthetic"), batch)
    workload = describe_workload(config, settings, recipe=recipe, processes=processes, device=device, parts=parts)
    return make_record(config, workload, parts, scaling=points)


def measure_parts(
    config: Config, settings: BenchSettings, *, processes: int, device: str | None, backend: str = "auto", say: Say
) -> list[Part]:
    """The parts of all processes, tower a's first."""
    with tempfile.TemporaryDirectory(prefix="twotower-bench-") as name:
        folder = Path(name)
        if processes == 1:
            return [measure(config, settings, mesh=None, device=choose_device(device), scratch=folder, say=say)]
        job = Job(to_toml(config), settings, device, backend)
        (folder / "job").write_text(json.dumps(dataclasses.asdict(job), default=str))
        command = [sys.executable, "-m", "trainer", "bench-tower", "--job", f"{folder}/job"]
        on_one = backend == "nccl" and shares_gpu(device, processes)
        status = run_towers(command, processes, nccl_on_one_gpu=on_one)
        if status > 128:  # by a signal; the tower or the launcher has said so
            raise SystemExit(status)
        if status:
            raise BenchError(f"a measuring process ended with status {status}: see above")
        return [build(Part, parse_json((folder / f"part-{rank}").read_bytes(), nan=True)) for rank in range(processes)]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a measuring process is told: the recipe as TOML text, what to measure, and where, as ``--device`` has it."""

    config: str
    settings: BenchSettings
    device: str | None
    backend: str = "auto"


def run_tower(job: Path) -> None:
    """One of several measuring processes, as :func:`measure_parts` starts them."""
    die_with_parent()
    told: Job = build(Job, parse_json(job.read_bytes()))
    config, settings = from_toml(told.config), told.settings
    world = read_world(None)
    assert world is not None
    device = choose_device(told.device, world.local_rank)
    with join_mesh(world, device, config.train, told.backend) as mesh:
        quiet = mesh.coord.rank or not settings.stages
        say = (lambda _: None) if quiet else print_line
        part = measure(config, settings, mesh=mesh, device=device, scratch=job.parent, say=say)
        (job.parent / f"part-{mesh.coord.rank}").write_text(json.dumps(dataclasses.asdict(part)))
        mesh.wait_for_all()


def print_line(text: str) -> None:
    """Progress, on stderr: stdout is for the result."""
    verbosity.remark(f"bench: {text}")


def describe_workload(
    config: Config, settings: BenchSettings, *, recipe: str, processes: int, device: str | None, parts: list[Part]
) -> Workload:
    """What was measured."""
    cores, model, train = len(os.sched_getaffinity(0)), config.model, config.train
    crossing = sum(c.bytes_a_to_b + c.bytes_b_to_a for c in count_crossings(model) if c.layer in model.crossings)
    workload = Workload(
        recipe=recipe,
        data=str(settings.data or ""),
        images=f"synthetic {model.image_px}x{model.image_px}x{model.in_channels}",
        encoding="",
        processes=processes,
        device=choose_device(device),
        batch_size=train.batch_size,
        precision=train.precision,
        cores=cores,
        threads=config.data.threads or cores,
        decode="sharded" if parts[0].shares_decoding else "replicated",
        rounds=settings.rounds,
        seconds=settings.seconds,
        crossing_bytes=2 * crossing * train.batch_size,
        parameters=sum(row.parameters_a + row.parameters_b for row in count_layers(model)),
        raw_bytes=0.0,
        sample_bytes=0.0,
        cached=parts[0].cached,
        net_threads=parts[0].threads,
    )
    if settings.data is None:
        return workload
    stored = describe_images(settings.data)
    crops = stored.encoding == "raw" and config.data.mmap
    return dataclasses.replace(
        workload,
        images=f"{stored.num_samples} {stored.encoding} {stored.width_px}x{stored.height_px}x{stored.channels}",
        encoding=stored.encoding,
        raw_bytes=float(stored.height_px * stored.width_px * stored.channels),
        sample_bytes=stored.sample_bytes,
        read_bytes=float(stored.channels * model.image_px**2) if crops else stored.sample_bytes,
    )


def make_record(
    config: Config, workload: Workload, parts: list[Part], *, scaling: dict[int, Figure] | None = None
) -> BenchRecord:
    """One record out of the parts of all processes, tower a's (or the only one's) first."""
    first, batch = parts[0], workload.batch_size
    environment = describe_environment(["python", "-m", "trainer", *sys.argv[1:]])
    environment["host"] = os.environ.get("TWOTOWER_NODE") or os.uname().nodename
    environment["seconds_taken"] = round(time.monotonic() - _STARTED, 1)
    throughput = {name: _throughput(parts, name, batch) for name in first.intervals}

    def cases(prefix: str) -> dict[str, Throughput]:
        return {n.removeprefix(prefix): rate for n, rate in throughput.items() if n.startswith(prefix)}

    stages = [*_loader_stages(first, workload), *_net_stages(parts, workload), *_checkpoint_stages(first, batch)]
    bounds = _bounds(first, workload, count_work(config.model, batch, workload.processes))
    return BenchRecord(
        environment=environment,
        workload=workload,
        ceilings=tuple(first.ceilings),
        stages=tuple(_bounded(stage, *bounds[stage.name]) if stage.name in bounds else stage for stage in stages),
        loader=throughput.get("loader"),
        synthetic=throughput["synthetic"],
        end_to_end=throughput.get("end to end"),
        by_threads={int(count): rate for count, rate in cases(BY_THREADS).items()},
        by_precision=cases(BY_PRECISION),
        timeline=_timeline(parts),
        sweep={size: _rate(times, size) for size, times in first.sweep.items()},
        scaling=scaling or {},
    )


@dataclasses.dataclass(frozen=True)
class Work:
    """What one batch asks of tower a, counted from the recipe."""

    forward_flop: float  # of matrix products and convolutions
    backward_flop: float
    pixel_bytes: float  # of one float32 batch as the net gets it
    parameters: int  # that tower a's process holds


def count_work(model: ModelConfig, batch: int, processes: int) -> Work:
    """The work of tower a's process: half of the net and all of fc8, or both towers where it holds both.

    The backward of a layer takes two products where the forward takes one, but conv1 needs no gradient of the image.
    """
    rows, alone = count_layers(model), processes == 1 or model.towers == 1
    mine = {row.layer: row.multiply_accumulates * (1.0 if alone or row.layer == "fc8" else 0.5) for row in rows}
    forward = 2.0 * sum(mine.values()) * batch
    return Work(
        forward_flop=forward,
        backward_flop=2 * forward - 2.0 * mine["conv1"] * batch,
        pixel_bytes=float(FLOAT_BYTES * model.in_channels * model.image_px**2 * batch),
        parameters=sum(row.parameters_a + (row.parameters_b if processes == 1 else 0) for row in rows),
    )


def _rate(step_s: list[float], batch: int) -> Figure:
    """Images per second out of seconds per step."""
    return Figure.of([batch / value for value in step_s])


def _slowest_s(parts: list[Part], name: str) -> list[float]:
    """Seconds per batch of the slower process, by interval."""
    rows = zip(*(part.intervals[name] for part in parts), strict=True)
    return [max(interval.wall_s / interval.count for interval in row) for row in rows]


def _throughput(parts: list[Part], name: str, batch: int) -> Throughput:
    """The slower process's wall time, all processes' processor time."""
    ms = Figure.of([1e3 * seconds for seconds in _slowest_s(parts, name)])
    own_ms = max(_per_batch_ms(part.intervals[name], "own_s") for part in parts)
    cpu_ms = sum(_per_batch_ms(part.intervals[name], "cpu_s") for part in parts)
    return Throughput(ms, cpu_ms, 1e3 * batch / ms.median, own_ms)


def _per_batch_ms(intervals: list[Interval], field: str) -> float:
    """Milliseconds per batch over all intervals."""
    return 1e3 * sum(getattr(row, field) for row in intervals) / sum(row.count for row in intervals)


def _timeline(parts: list[Part]) -> tuple[Span, ...]:
    """The step whose length is tower a's median, the same step of both towers; ms since its begin."""
    name = "end to end" if "end to end" in parts[0].intervals else "synthetic"
    steps = [steps_of(part.intervals[name]) for part in parts]
    lengths = [step[-1][2] - step[-1][1] for step in steps[0]]
    middle = sorted(range(len(lengths)), key=lambda number: lengths[number])[(len(lengths) - 1) // 2]
    zero = min(begin for _, begin, _ in steps[0][middle])
    return tuple(
        Span(part.tower, name, 1e3 * (begin - zero), 1e3 * (end - zero))
        for part, rows in zip(parts, steps, strict=True)
        for name, begin, end in rows[middle]
    )


def _make_stage(
    name: str, group: str, ms: list[float], batch: int, *, cpu_ms: float | None = None, note: str = ""
) -> Stage:
    figure = Figure.of(ms)
    images_per_s = 1e3 * batch / figure.median if figure.median > 0 else float("inf")
    return Stage(name, group, figure, images_per_s, cpu_ms, note=note)


def _bounds(part: Part, workload: Workload, work: Work) -> dict[str, tuple[str, float]]:
    """What each stage is held against: name of the ceiling, and milliseconds per batch at it."""
    rates = {ceiling.name: ceiling.figure.median for ceiling in part.ceilings}
    on_tf32 = workload.precision == "fp32" and "matrix tf32" in rates  # cuDNN's convolutions use it for fp32
    matrix = "matrix tf32" if on_tf32 else f"matrix {workload.precision}"
    matrix = matrix if matrix in rates else "matrix fp32"  # a CPU has no tf32
    disk = "cached read" if (workload.cached or 0) > 0.9 else "disk read"
    optimizer_bytes = OPTIMIZER_PASSES * FLOAT_BYTES * work.parameters
    amounts = {  # over the ceiling's rate it gives milliseconds
        "read": (disk, workload.batch_size * workload.read_bytes / 1e3),
        "transfer": ("memory copy", 2 * work.pixel_bytes / 1e6),
        "forward": (matrix, work.forward_flop / 1e6),
        "backward": (matrix, work.backward_flop / 1e6),
        "exchange": ("exchange bandwidth", workload.crossing_bytes / 2 / 1e6),
        "optimizer": ("memory copy", optimizer_bytes / 1e6),
        "checkpoint": ("disk write", part.checkpoint_bytes / 1e3),
    }
    if workload.device == "cpu":  # uint8 pixels in, float32 out, once
        amounts["augment"] = ("memory copy", 1.25 * work.pixel_bytes / 1e6)
    found = {stage: (name, amount / rates[name]) for stage, (name, amount) in amounts.items() if name in rates}
    if "exchange" in found:
        crossings = sum(" " in name for name in seconds_by_stage(_phases(part)[0]))
        name, moved_ms = found["exchange"]
        found["exchange"] = (name, moved_ms + crossings * rates["exchange latency"] / 1e3)
    return found


def _bounded(stage: Stage, ceiling: str, ceiling_ms: float) -> Stage:
    """The stage with its ceiling."""
    if stage.name == "transfer" and stage.ms.median < ceiling_ms / 2:
        return dataclasses.replace(stage, note="nothing to copy: the layout was right")
    return dataclasses.replace(stage, ceiling=ceiling, ceiling_ms=ceiling_ms)


def _loader_stages(part: Part, workload: Workload) -> list[Stage]:
    """Read, decode, augment: each less what comes before it, round by round."""
    if "read" not in part.intervals:
        return []
    stages, walls, cpu = [], [0.0] * len(part.intervals["read"]), 0.0
    for name, case in (("read", "read"), ("decode", "decode"), ("augment", "loader")):
        before, before_cpu = walls, cpu
        walls = [1e3 * row.wall_s / row.count for row in part.intervals[case]]
        cpu = _per_batch_ms(part.intervals[case], "cpu_s")
        less = [max(0.0, after - b) for b, after in zip(before, walls, strict=True)]
        stages.append(_make_stage(name, "loader", less, workload.batch_size, cpu_ms=max(0.0, cpu - before_cpu)))
    read, decode, augment = stages
    if single := part.intervals.get("decode, 1 thread"):
        threads = min(workload.threads, workload.cores)
        alone = Figure.of([1e3 * row.wall_s / row.count for row in single])
        perfect_ms = alone.median / threads - read.ms.median
        if perfect_ms > alone.noise / threads + read.ms.noise:  # else it drowns in what reading takes
            note = f"1 thread: {alone.median:.3g} ms with reading; ceiling: {threads} times its rate"
            decode = dataclasses.replace(decode, ceiling="decoding thread", ceiling_ms=perfect_ms, note=note)
    return [read, decode, augment]


def _phases(part: Part) -> list[Spans]:
    """The steps of synthetic training in which phases can be told apart."""
    return steps_of(part.intervals.get(BY_PHASE, part.intervals["synthetic"]))


def _net_stages(parts: list[Part], workload: Workload) -> list[Stage]:
    """Transfer, forward, crossings, backward, check, optimizer and the rest, of synthetic training on tower a.

    A crossing takes as long as it takes the tower that came later; what the other spends on it besides is waiting.
    Where training repeats a step as one CUDA graph, the phases are those of steps that are launched kernel by kernel.
    """
    mine, *others = ([seconds_by_stage(step) for step in _phases(part)] for part in parts)
    crossings = [name for name in mine[0] if " " in name]
    columns = {name: [min(row[name] for row in rows) for rows in zip(mine, *others, strict=True)] for name in crossings}
    moved = [sum(columns[name][i] for name in crossings) for i in range(len(mine))]
    for name in ("transfer", "forward", "exchange", "waiting", "backward", "check", "optimizer", "rest"):
        columns[name] = [row.get(name, 0.0) for row in mine]
    columns["exchange"] = moved
    columns["waiting"] = [row["exchange"] - part for row, part in zip(mine, moved, strict=True)]
    columns["rest"] = [row["rest"] + row["wait"] for row in mine]
    names = [name for name in columns if crossings or name not in ("exchange", "waiting")]
    note = "kernel by kernel; training repeats all as one CUDA graph" if BY_PHASE in parts[0].intervals else ""
    return [
        _make_stage(
            name,
            "crossing" if name in crossings else "net",
            [1e3 * s for s in columns[name]],
            workload.batch_size,
            note=note,
        )
        for name in sorted(names, key=lambda name: name in crossings)
    ]


def _checkpoint_stages(part: Part, batch: int) -> list[Stage]:
    """The checkpoint, where it was measured."""
    whose = "both towers" if part.tower == "both" else f"tower {part.tower}"
    note = f"{part.checkpoint_bytes / 1e6:.3g} MB of {whose}; not in every step"
    times = [1e3 * seconds for seconds in part.checkpoints]
    return [_make_stage("checkpoint", "run", times, batch, note=note)] if times else []
