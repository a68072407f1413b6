"""``python -m trainer bench``: starts the processes that measure, puts what they found together, and says it.

Reading order: this file; ``bench_stages`` (what is measured), ``bench_timing`` (the clock in the trainer),
``bench_ceilings`` (what the machine can do), ``bench_merge`` (one record), ``bench_model`` and ``bench_verdict`` (what
follows from it), ``bench_page`` (the report).
"""

import dataclasses
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from trainer.bench.merge import merge
from trainer.bench.record import BenchRecord, Figure, Point, Setting
from trainer.bench.stages import BenchOptions, Part, measure
from trainer.config import Config
from trainer.errors import BenchError
from trainer.parallel.launch import choose_device, die_with_parent, join_mesh, run_towers
from trainer.planning.describe import count_crossings, count_layers
from trainer.training.metrics import describe_environment

if TYPE_CHECKING:
    from pipeline.loader.stages import StoredPictures

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a measuring process gets.

    Attributes:
        config: the recipe.
        options: what to measure.
        device: as asked for on the command line.
        output: where the part goes, the rank behind it.
    """

    config: Config
    options: BenchOptions
    device: str | None
    output: Path


def run_bench(
    config: Config,
    options: BenchOptions,
    *,
    recipe: str,
    processes: int,
    device: str | None = None,
    scaling: tuple[int, ...] = (),
    say: Say = lambda _: None,
) -> BenchRecord:
    """Measures a recipe.

    Args:
        config: the recipe.
        options: what to measure.
        recipe: its name, for the record.
        processes: 1: both towers here; 2: a process each.
        device: ``cpu``, ``cuda``, ``cuda:N`` or None for a GPU where there is one.
        scaling: numbers of processes whose synthetic training is measured too.
        say: gets progress lines.

    Raises:
        BenchError: a measuring process failed.
    """
    parts = measure_parts(config, options, processes=processes, device=device, say=say)
    points = []
    for count in scaling:
        say(f"{count} process{'es' if count > 1 else ''}, synthetic")
        only = dataclasses.replace(options, data=None, stages=False, batch_sizes=())
        batch = config.train.batch_size * max(1, count // 2)  # every pair takes the recipe's batch
        grown = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch))
        found = measure_parts(grown, only, processes=count, device=device, say=lambda _: None)
        points.append(_scaling_point(found, count, batch))
    setting = describe_setting(config, options, recipe=recipe, processes=processes, device=device, parts=parts)
    return make_record(config, setting, parts, scaling=tuple(points))


def make_record(config: Config, setting: Setting, parts: list[Part], *, scaling: tuple[Point, ...] = ()) -> BenchRecord:
    """The record of what was measured, with what is known of this machine."""
    environment = describe_environment(["python", "-m", "trainer", *sys.argv[1:]])
    environment["host"] = os.environ.get("TWOTOWER_NODE") or os.uname().nodename
    environment["seconds_taken"] = round(time.monotonic() - _STARTED, 1)
    return merge(parts, setting, config.model, environment, scaling=scaling)


_STARTED = time.monotonic()


def _scaling_point(parts: list[Part], processes: int, batch: int) -> Point:
    """The rate of synthetic training with some number of processes."""
    rows = zip(*(part.slots["synthetic"] for part in parts), strict=True)
    rates = Figure.of([batch / max(row[1] / row[0] for row in slots) for slots in rows])
    return Point(processes, rates.median, rates.low, rates.high)


def measure_parts(config: Config, options: BenchOptions, *, processes: int, device: str | None, say: Say) -> list[Part]:
    """The parts of all processes, tower a's first."""
    with tempfile.TemporaryDirectory(prefix="twotower-bench-") as folder:
        if processes == 1:
            return [measure(config, options, mesh=None, device=choose_device(device), scratch=Path(folder), say=say)]
        job = Path(folder) / "job"
        job.write_bytes(pickle.dumps(Job(config, options, device, Path(folder) / "part")))
        status = run_towers([sys.executable, "-m", "trainer", "bench-tower", "--job", str(job)], processes)
        if status > 128:  # by a signal; the tower or the launcher has said so
            raise SystemExit(status)
        if status:
            raise BenchError(f"a measuring process ended with status {status}: see above")
        return [pickle.loads((Path(folder) / f"part-{rank}").read_bytes()) for rank in range(processes)]


def run_tower(job: Path) -> None:
    """One of several measuring processes, as :func:`measure_parts` starts them."""
    die_with_parent()
    task: Job = pickle.loads(job.read_bytes())
    device = choose_device(task.device, int(os.environ.get("LOCAL_RANK", "0")))
    mesh = join_mesh(device, task.config.train.peer_timeout_s)
    quiet = mesh.coord.rank or not task.options.stages
    say = (lambda _: None) if quiet else print_line
    part = measure(task.config, task.options, mesh=mesh, device=device, scratch=job.parent, say=say)
    Path(f"{task.output}-{mesh.coord.rank}").write_bytes(pickle.dumps(part))
    dist.barrier(group=mesh.control)
    dist.destroy_process_group()


def print_line(text: str) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def describe_setting(
    config: Config, options: BenchOptions, *, recipe: str, processes: int, device: str | None, parts: list[Part]
) -> Setting:
    """What was measured."""
    stored: Any = None
    if options.data is not None:
        from pipeline.loader.stages import describe_pictures

        stored = describe_pictures(options.data)
    cores, model, train = len(os.sched_getaffinity(0)), config.model, config.train
    wire = sum(c.bytes_a_to_b + c.bytes_b_to_a for c in count_crossings(model) if c.layer in model.crossings)
    return Setting(
        recipe=recipe,
        data=str(options.data or ""),
        pictures=f"{stored.num_samples} {stored.encoding} {stored.width_px}x{stored.height_px}x{stored.channels}"
        if stored
        else f"synthetic {model.image_px}x{model.image_px}x{model.channels}",
        encoding=stored.encoding if stored else "",
        processes=processes,
        device=choose_device(device),
        batch_size=train.batch_size,
        precision=train.precision,
        cores=cores,
        threads=config.data.threads or cores,
        feed=config.data.feed,
        rounds=options.rounds,
        seconds=options.seconds,
        crossing_bytes=2 * wire * train.batch_size,
        parameters=sum(row.parameters_a + row.parameters_b for row in count_layers(model)),
        raw_bytes=float(stored.height_px * stored.width_px * stored.channels) if stored else 0.0,
        sample_bytes=stored.sample_bytes if stored else 0.0,
        cached=parts[0].cached,
        net_threads=parts[0].threads,
        read_bytes=_read_bytes(stored, config) if stored else 0.0,
    )


def _read_bytes(stored: "StoredPictures", config: Config) -> float:
    """Bytes of one picture that the loader reads."""
    if stored.encoding == "raw" and config.data.mmap:
        return float(stored.channels * config.model.image_px**2)
    return stored.sample_bytes
