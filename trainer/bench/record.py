"""What a benchmark says: figures with their spread, and the file that holds them. No torch: pure data."""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pipeline.manifest import write_atomic
from trainer.errors import BenchError

FORMAT = 1
LOADER_STAGES = ("read", "decode", "augment")
FEWER = "synthetic, threads: "  # what synthetic training with fewer threads is called, before their number
NET_STAGES = ("transfer", "forward", "exchange", "backward", "check", "optimizer", "rest")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured quantity.

    Attributes:
        median: of the measurements.
        low, high: the quartiles, between which half of the measurements lie.
        n: measurements.
    """

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """From single measurements, at least one."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    @property
    def noise(self) -> float:
        """Half the width of the median's notch (McGill 1978), about a 95 % interval of the median."""
        return 1.57 * (self.high - self.low) / math.sqrt(self.n)

    def scaled(self, factor: float) -> Self:
        """In another unit."""
        return dataclasses.replace(self, median=self.median * factor, low=self.low * factor, high=self.high * factor)


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What this machine can do at most, measured in the same run.

    Attributes:
        name: ``memory copy``, ``matrix fp32``, ...
        figure: in ``unit``.
        unit: ``GB/s``, ``GFLOP/s``, ``MB/s``, ``us``.
        note: how it was measured.
    """

    name: str
    figure: Figure
    unit: str
    note: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the way from disk to gradient, for one batch.

    Attributes:
        name: ``read``, ``decode``, ``forward``, ``conv3 forward``, ...
        group: ``loader``, ``net``, ``crossing`` (part of the net's ``exchange``) or ``run`` (now and then).
        ms: wall time a batch, alone (loader: less the stages before it).
        cpu_ms: processor time a batch, all threads; None where it cannot be told apart.
        images_per_s: batch / wall time.
        ceiling: name of what bounds it, or empty.
        ceiling_ms: time a batch at that ceiling; None without one.
        note: what to know about it.
    """

    name: str
    group: str
    ms: Figure
    images_per_s: float
    cpu_ms: float | None = None
    ceiling: str = ""
    ceiling_ms: float | None = None
    note: str = ""

    @property
    def share_of_ceiling(self) -> float | None:
        """1: as fast as the machine can; None without a ceiling."""
        return self.ceiling_ms / self.ms.median if self.ceiling_ms and self.ms.median > 0 else None


@dataclasses.dataclass(frozen=True)
class Whole:
    """The loader alone, synthetic training alone, or end to end.

    Attributes:
        ms: wall time a batch.
        cpu_ms: processor time a batch of all processes.
        images_per_s: batch / median wall time.
        own_ms: processor time a batch of the training thread alone (loader: draws, mean image, keys: work that no
            other thread does meanwhile); the slower process.
    """

    ms: Figure
    cpu_ms: float
    images_per_s: float
    own_ms: float = 0.0


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of one step, for the timeline.

    Attributes:
        tower: ``a``, ``b``, or ``both`` (one process holds both).
        name: stage.
        begin_ms, end_ms: since the step's begin on tower a.
    """

    tower: str
    name: str
    begin_ms: float
    end_ms: float


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was measured, and what arithmetic about it needs.

    Attributes:
        recipe: name of the recipe's file.
        data: folder of the data set, or empty.
        pictures: what is stored, in words; ``synthetic``.
        encoding: ``jpeg``, ``raw``... or empty.
        processes: 1 (both towers in one) or 2.
        device: ``cpu`` or ``cuda:N``, of tower a.
        batch_size: pictures a step.
        precision: fp32 or bf16.
        cores: processor cores that all processes share.
        threads: decoding threads a loader.
        net_threads: of a process's computation on a CPU.
        read_bytes: bytes of one picture that are read: all that is stored, of raw pictures in mapped files the crop.
        feed: each or split.
        rounds: measurements of each whole; ``seconds``: their length together, s.
        seconds: see above.
        crossing_bytes: bytes that cross in a step, forward and backward, both ways together.
        parameters: of both towers.
        raw_bytes: bytes of one picture as raw pixels.
        sample_bytes: bytes of one picture as stored.
        cached: share of the data set that was in memory; None where unknown.
    """

    recipe: str
    data: str
    pictures: str
    encoding: str
    processes: int
    device: str
    batch_size: int
    precision: str
    cores: int
    threads: int
    feed: str
    rounds: int
    seconds: float
    crossing_bytes: int
    parameters: int
    raw_bytes: float
    sample_bytes: float
    cached: float | None
    net_threads: int = 1
    read_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Point:
    """A rate beside what it depends on: a point of a sweep or of the scaling curve.

    Attributes:
        x: batch size, or processes.
        images_per_s: measured.
        low, high: quartiles.
    """

    x: int
    images_per_s: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class BenchRecord:
    """A whole result; the file of ``--json``.

    Attributes:
        environment: commit, versions, machine, command.
        setting: what was measured.
        ceilings: of this machine.
        stages: in the order in which a batch passes them.
        loader: the loader alone; None where the data were synthetic.
        synthetic: training alone, on a batch that is always ready.
        whole: end to end; None where the data were synthetic.
        fewer: synthetic training with fewer threads a process, by their number; where loader and net share a CPU.
        timeline: one step.
        sweep: rates by batch size, if asked for.
        scaling: rates by number of processes, if asked for.
    """

    environment: dict[str, Any]
    setting: Setting
    ceilings: tuple[Ceiling, ...]
    stages: tuple[Stage, ...]
    loader: Whole | None
    synthetic: Whole
    whole: Whole | None
    fewer: dict[int, Whole] = dataclasses.field(default_factory=dict)
    timeline: tuple[Span, ...] = ()
    sweep: tuple[Point, ...] = ()
    scaling: tuple[Point, ...] = ()

    def stage(self, name: str) -> Stage | None:
        """A stage by name."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def ceiling(self, name: str) -> Ceiling | None:
        """A ceiling by name."""
        return next((ceiling for ceiling in self.ceilings if ceiling.name == name), None)


def to_json(record: BenchRecord, **more: Any) -> str:
    """The record as text; ``more`` holds what was concluded from it."""
    return json.dumps({"format": FORMAT, **dataclasses.asdict(record), **more}, indent=1) + "\n"


def write_record(path: Path, text: str) -> None:
    """Writes a result.

    Raises:
        BenchError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror or error}") from None


def read_record(path: Path) -> BenchRecord:
    """Reads what ``--json`` wrote.

    Raises:
        BenchError: missing, damaged, or another format.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BenchError(f"{path} cannot be read as JSON: {error}; is it damaged, or another file?") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise BenchError(f"{path} is no result of python -m trainer bench --json (format {FORMAT})")
    try:
        return from_dict(table)
    except (KeyError, TypeError) as error:
        raise BenchError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def from_dict(table: dict[str, Any]) -> BenchRecord:
    """The inverse of :func:`to_json`, from a parsed object."""

    def whole(row: dict[str, Any] | None) -> Whole | None:
        return None if row is None else Whole(**(row | {"ms": figure(row["ms"])}))

    def figure(row: dict[str, Any]) -> Figure:
        if not all(isinstance(value, int | float) for value in row.values()):
            raise TypeError(f"{row} is no figure")
        return Figure(**row)

    synthetic = whole(table["synthetic"])
    if synthetic is None:
        raise TypeError("synthetic is null")
    return BenchRecord(
        environment=table["environment"],
        setting=Setting(**table["setting"]),
        ceilings=tuple(Ceiling(**(row | {"figure": figure(row["figure"])})) for row in table["ceilings"]),
        stages=tuple(Stage(**(row | {"ms": figure(row["ms"])})) for row in table["stages"]),
        loader=whole(table["loader"]),
        synthetic=synthetic,
        whole=whole(table["whole"]),
        fewer={int(threads): one for threads, row in table.get("fewer", {}).items() if (one := whole(row))},
        timeline=tuple(Span(**row) for row in table["timeline"]),
        sweep=tuple(Point(**row) for row in table["sweep"]),
        scaling=tuple(Point(**row) for row in table["scaling"]),
    )
