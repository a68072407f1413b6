"""What a benchmark found: figures with their spread, and the file that holds them. No torch: pure data."""

import contextlib
import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from pipeline.manifest import write_atomic
from trainer.errors import BenchError
from twotower.typed import build
from twotower.untrusted import read_json
from twotower.verbosity import say_written

DRIFT = 0.03  # a machine changes more between two runs than the rounds of one run show
MOST_BYTES = 64 << 20  # of the file; a result has some hundred thousand
FORMAT = 3  # 1 had other names for the same figures, 2 no measured precision


@dataclasses.dataclass(frozen=True)
class Figure:
    """The median of ``n`` measurements, and the quartiles ``low`` and ``high``: half of them lie between these."""

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


def differ(a: Figure, b: Figure) -> bool:
    """Whether two medians differ by more than their noise and more than machines drift.

    Noise: the notches around them (McGill, Tukey and Larsen 1978: median +- 1.57 IQR / sqrt(n)) do not overlap.
    """
    gap = abs(a.median - b.median)
    return gap > a.noise + b.noise and gap > DRIFT * min(abs(a.median), abs(b.median))


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What this machine can do at most (``memory copy``, ``matrix fp32``...), in ``unit``; ``note``: how measured."""

    name: str
    figure: Figure
    unit: str
    note: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the way from disk to gradient, for one batch."""

    name: str  # read, decode, forward, conv3 forward, ...
    group: str  # loader, net, crossing (part of the net's exchange) or run (now and then)
    ms: Figure  # wall time per batch, alone (loader: less the stages before it)
    images_per_s: float  # batch / wall time
    cpu_ms: float | None = None  # processor time per batch, all threads; None where it cannot be told apart
    ceiling: str = ""  # name of what bounds it
    ceiling_ms: float | None = None  # time per batch at that ceiling
    note: str = ""

    @property
    def share_of_ceiling(self) -> float | None:
        """1: as fast as the machine can; None without a ceiling."""
        return self.ceiling_ms / self.ms.median if self.ceiling_ms and self.ms.median > 0 else None


@dataclasses.dataclass(frozen=True)
class Throughput:
    """The loader alone, synthetic training alone, or both together end to end."""

    ms: Figure  # wall time per batch; of two processes the slower one's
    cpu_ms: float  # processor time per batch, all threads of all processes
    images_per_s: float  # batch / median wall time
    own_ms: float = 0.0  # processor time per batch of the training thread alone; of the loader: what nothing hides


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of one step, for the timeline, ms since the step's begin; ``tower``: ``a``, ``b`` or ``both``."""

    tower: str
    name: str
    begin_ms: float
    end_ms: float


@dataclasses.dataclass(frozen=True)
class Workload:
    """What was measured, and what arithmetic about it needs."""

    recipe: str  # name of the recipe's file
    data: str  # folder of the data set, or empty
    images: str  # what is stored, in words
    encoding: str  # jpeg, raw... or empty
    processes: int  # 1 (both towers in one) or 2
    device: str  # cpu or cuda:N, of tower a
    batch_size: int  # images per step
    precision: str  # fp32 or bf16
    cores: int  # that all processes share
    threads: int  # decoding threads of a loader
    decode: str  # replicated or sharded
    rounds: int  # intervals of each measurement
    seconds: float  # of all rounds of a measurement together
    crossing_bytes: int  # per step, forward and backward, both ways together
    parameters: int  # of both towers
    raw_bytes: float  # of one image as raw pixels
    sample_bytes: float  # of one image as stored
    cached: float | None  # share of the data set that was in memory; None where unknown
    net_threads: int = 1  # of a process's computation on a CPU
    read_bytes: float = 0.0  # of one image: all that is stored, of raw images in mapped files the crop


@dataclasses.dataclass(frozen=True)
class BenchRecord:
    """A whole result; the file of ``--json``."""

    environment: dict[str, Any]  # commit, versions, machine, command
    workload: Workload
    ceilings: tuple[Ceiling, ...]  # of this machine
    stages: tuple[Stage, ...]  # in the order in which a batch passes them
    loader: Throughput | None  # alone; None where the data were synthetic
    synthetic: Throughput  # training alone, on a batch that is always ready
    end_to_end: Throughput | None  # both together; None where the data were synthetic
    by_threads: dict[int, Throughput] = dataclasses.field(default_factory=dict)  # synthetic, fewer threads per process
    by_precision: dict[str, Throughput] = dataclasses.field(default_factory=dict)  # synthetic, in another precision
    timeline: tuple[Span, ...] = ()  # one step
    sweep: dict[int, Figure] = dataclasses.field(default_factory=dict)  # images/s by batch size, if asked for
    scaling: dict[int, Figure] = dataclasses.field(default_factory=dict)  # images/s by processes, if asked for

    @property
    def training(self) -> Throughput:
        """End to end where that was measured, else synthetic training."""
        return self.end_to_end or self.synthetic

    def throughputs(self) -> dict[str, Throughput]:
        """The rates that were measured, by name."""
        rates = {"loader alone": self.loader, "synthetic training": self.synthetic, "end to end": self.end_to_end}
        return {name: rate for name, rate in rates.items() if rate}

    def stage(self, name: str) -> Stage | None:
        """A stage by name."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def group(self, name: str) -> dict[str, Stage]:
        """The stages of one group, by name."""
        return {stage.name: stage for stage in self.stages if stage.group == name}

    def ceiling(self, name: str) -> Ceiling | None:
        """A ceiling by name."""
        return next((ceiling for ceiling in self.ceilings if ceiling.name == name), None)


@contextlib.contextmanager
def coherent() -> Iterator[None]:
    """Around what is concluded from a record: one of anybody's making may have figures that contradict each other.

    Raises:
        BenchError: they do.
    """
    try:
        yield
    except (ArithmeticError, LookupError, ValueError) as error:
        raise BenchError(
            f"the figures of this result do not belong together ({type(error).__name__}: {error})"
        ) from None


def to_json(record: BenchRecord, **more: Any) -> str:
    """The record as text; ``more`` holds what was concluded from it."""
    return json.dumps({"format": FORMAT, **dataclasses.asdict(record), **more}, indent=1) + "\n"


def write_record(path: Path, text: str) -> None:
    """Writes a result; raises BenchError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
        say_written(path)
    except OSError as error:
        raise BenchError(f"{path} cannot be written: {error.strerror or error}") from None


def read_record(path: Path) -> BenchRecord:
    """Reads what ``--json`` wrote; raises BenchError where it is missing, damaged, or of another format."""
    try:
        table = read_json(path, MOST_BYTES, nan=True)
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BenchError(f"{path} cannot be read as JSON: {error}; is it damaged, or another file?") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise BenchError(f"{path} is no result of python -m trainer bench --json (format {FORMAT})")
    try:
        return from_dict(table)
    except ValueError as error:
        raise BenchError(f"{path} is damaged: {error}") from None


def from_dict(table: dict[str, Any]) -> BenchRecord:
    """The inverse of :func:`to_json`, from a parsed object; raises ValueError."""
    names = {field.name for field in dataclasses.fields(BenchRecord)}
    return build(BenchRecord, {name: value for name, value in table.items() if name in names})
