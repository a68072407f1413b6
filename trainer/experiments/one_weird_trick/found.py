"""What one-weird-trick has found, before it is put into words."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from trainer.config import ModelConfig
from trainer.experiments.folder import Record, Row
from trainer.experiments.one_weird_trick.layouts import Layouts
from trainer.experiments.one_weird_trick.traffic import (
    Sent,
    count_towers,
    count_workers,
    towers_formula,
    workers_formula,
)
from trainer.experiments.rows import FAILED
from twotower.typed import build
from twotower.untrusted import parse_json

CLAIMED = 1e-5  # a relative difference, in float64, within which processes are called equal
WORLDS = {"two-workers": 2, "two-by-two": 4}  # processes, by the name of their rows
TITLES = {"two-workers": "2 processes", "two-by-two": "2 x 2 processes"}
COMPARED = ("loss", "gradients", "weights")


@dataclasses.dataclass(frozen=True)
class Speed:
    """Times of the layouts, from one start of two processes.

    Attributes:
        cpus: cores for both together.
        rounds: figures of each case.
        batch_size: images a step.
        device: ``cpu`` or ``cuda:N``.
        rates: images/s by case, a figure a round.
        machine: processor, cores, commit, versions.
    """

    cpus: int
    rounds: int
    batch_size: int
    device: str
    rates: dict[str, list[float]]
    machine: dict[str, str]

    def ratios(self, case: str, other: str) -> list[float] | None:
        """The rate of a case over that of another, round by round; None where one was not timed."""
        if case not in self.rates or other not in self.rates:
            return None
        return [a / b for a, b in zip(self.rates[case], self.rates[other], strict=True)]


def median_and_range(values: Sequence[float], form: str) -> str:
    """``1.21 (1.18 to 1.30)``."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def read_speed(path: Path) -> Speed | None:
    """Times that were written before; None where there are none, or they cannot be read."""
    try:
        found: Speed = build(Speed, parse_json(path.read_bytes()))
    except (OSError, ValueError):
        return None
    return found


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What both layouts of a net send.

    Attributes:
        net: whose, for people.
        world: processes.
        towers: the two towers' count.
        workers: the workers' count.
    """

    net: str
    world: int
    towers: tuple[Sent, ...]
    workers: tuple[Sent, ...]


def count_traffic(layouts: Layouts, net: str) -> list[Traffic]:
    """Counts both layouts on 2 and on 2 x 2 processes, in the formula's order.

    Raises:
        AssertionError: ledger and formula differ: a fault of ours.
    """
    found = []
    for world in WORLDS.values():
        pairs = (
            (count_towers(layouts.towers, world), towers_formula(layouts.towers.model, world)),
            (count_workers(layouts.one_tower, world), workers_formula(layouts.one_tower.model, world)),
        )
        for counted, formula in pairs:
            assert {each.name: each for each in counted} == {each.name: each for each in formula}, (counted, formula)
        towers, workers = (tuple(formula) for _, formula in pairs)
        found.append(Traffic(net, world, towers, workers))
    return found


@dataclasses.dataclass(frozen=True)
class Found:
    """All that the page and the tables say.

    Attributes:
        layouts: both nets.
        rows: a comparison each.
        traffic: of this recipe's nets, then of the paper's where they are others.
        speed: None where the timing failed.
        record: recipe and data set.
        seeds: of the comparisons.
    """

    layouts: Layouts
    rows: tuple[Row, ...]
    traffic: tuple[Traffic, ...]
    speed: Speed | None
    record: Record
    seeds: tuple[int, ...]

    @property
    def failed(self) -> list[Row]:
        """Comparisons whose processes did not come to their end."""
        return [row for row in self.rows if row["status"] == FAILED]

    @property
    def done(self) -> list[Row]:
        """The others."""
        return [row for row in self.rows if row["status"] != FAILED]

    @property
    def unequal(self) -> list[Row]:
        """Comparisons that are not what one process does, or sent other bytes than the formula says."""
        return [row for row in self.done if not is_equal(row, self.layouts.one_tower.model)]

    def greatest(self, name: str, dtype: str) -> dict[str, float]:
        """The greatest difference of all seeds in loss, gradients and weights, of some number of processes."""
        of_name = [row for row in self.done if row["variant"] == name]
        return {what: max(row[f"{what}_{dtype}"] for row in of_name) for what in COMPARED} if of_name else {}


def is_equal(row: Row, model: ModelConfig) -> bool:
    """Whether a comparison is within what is claimed, and sent what the formula says."""
    formula = workers_formula(model, WORLDS[row["variant"]])
    bytes_alike = all(row.get(bytes_key(each.name)) == each.in_ledger(row["batch_size"]) for each in formula)
    return bytes_alike and all(row[f"{what}_float64"] < CLAIMED for what in COMPARED)


def bytes_key(name: str) -> str:
    """The row's name of the bytes that a process sent at one place."""
    return f"bytes_{name.replace(' ', '_')}"


def difference_words(row: Row) -> str:
    """The differences of a row in float64."""
    return ", ".join(f"{what} {row[f'{what}_float64']:.1e}" for what in COMPARED) + " of the greatest number"
