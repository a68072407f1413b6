"""What the rows of an experiment come to: figures by variant, comparisons, and the extra questions of two of them."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.experiments import measures
from trainer.experiments.catalog import LEVELS, RATES, epochs_key
from trainer.experiments.folder import Row, RunTask
from trainer.experiments.paired import Comparison, Interval, compare, mean_interval
from trainer.experiments.rows import FAILED, OK, values_of
from trainer.experiments.variants import Experiment, Metric, Variant


@dataclasses.dataclass(frozen=True)
class Compared:
    """A variant beside its baseline in one figure."""

    variant: Variant
    against: Variant
    metric: Metric
    found: Comparison


@dataclasses.dataclass(frozen=True)
class Level:
    """Figure 1 at one training error: the quickest rate of each activation.

    Attributes:
        level: the error, 0..1.
        relu, tanh: variant and mean epochs, of those rates that all seeds came to the level with; None for none.
    """

    level: float
    relu: tuple[Variant, float] | None
    tanh: tuple[Variant, float] | None

    @property
    def ratio(self) -> float | None:
        """How many times more epochs tanh takes."""
        return self.tanh[1] / self.relu[1] if self.tanh and self.relu else None


@dataclasses.dataclass(frozen=True)
class Average:
    """Several nets' probabilities averaged, beside the mean error of one.

    Attributes:
        views: ``center`` or ``ten``.
        seeds: whose nets.
        single: mean errors of one net, by ``top1`` and ``top5``.
        together: errors of the average.
        num_samples: images.
    """

    views: str
    seeds: tuple[int, ...]
    single: dict[str, float | None]
    together: dict[str, float | None]
    num_samples: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """All that the page and the tables say.

    Attributes:
        experiment: what was asked.
        tasks: every run that belongs to it.
        rows: those that have ended.
        compared: every variant that is compared, in every metric that some pair of runs has.
        levels: of figure 1.
        averages: of views.
    """

    experiment: Experiment
    tasks: tuple[RunTask, ...]
    rows: tuple[Row, ...]
    compared: tuple[Compared, ...]
    levels: tuple[Level, ...] = ()
    averages: tuple[Average, ...] = ()

    @property
    def failed(self) -> tuple[Row, ...]:
        """Runs that did not come to their end."""
        return tuple(row for row in self.rows if row["status"] == FAILED)

    @property
    def num_done(self) -> int:
        """Runs with figures."""
        return len(self.rows) - len(self.failed)

    def values(self, variant: Variant, metric: Metric) -> list[float]:
        """The figures of a variant's runs, by seed."""
        found = values_of(self.rows, variant.name, metric.key)
        return [found[seed] for seed in sorted(found) if math.isfinite(found[seed])]

    def interval(self, variant: Variant, metric: Metric) -> Interval | None:
        """The 95 % interval of the mean of :meth:`values`."""
        return mean_interval(self.values(variant, metric))

    def of_metric(self, metric: Metric) -> list[Compared]:
        """The comparisons in one figure."""
        return [each for each in self.compared if each.metric == metric]


def summarize(experiment: Experiment, tasks: Sequence[RunTask], rows: Sequence[Row]) -> Summary:
    """Compares what is there; nothing that failed is in any figure."""
    compared = []
    for metric in (metric for metric in experiment.metrics if metric.compared):
        for variant in experiment.variants:
            if not variant.against:
                continue
            against = experiment.variant(variant.against)
            sides = (values_of(rows, side.name, metric.key) for side in (against, variant))
            found = compare(*sides)
            if found.seeds:
                compared.append(Compared(variant, against, metric, found))
    summary = Summary(experiment, tuple(tasks), tuple(rows), tuple(compared))
    if experiment.measure == "epochs":
        levels = tuple(
            Level(level, _quickest(summary, "relu", level), _quickest(summary, "tanh", level)) for level in LEVELS
        )
        return dataclasses.replace(summary, levels=levels)
    if experiment.measure == "views":
        return dataclasses.replace(summary, averages=tuple(_averages(summary)))
    return summary


def _quickest(summary: Summary, kind: str, level: float) -> tuple[Variant, float] | None:
    """The rate with which an activation comes to a training error in the fewest epochs, all seeds of it."""
    means = []
    for word, _ in RATES:
        found = [variant for variant in summary.experiment.variants if variant.name == f"{kind}-{word}"]
        for variant in found:
            values = values_of(summary.rows, variant.name, epochs_key(level))
            if values and all(map(math.isfinite, values.values())):
                means.append((sum(values.values()) / len(values), variant))
    return (min(means, key=lambda pair: pair[0])[1], min(means, key=lambda pair: pair[0])[0]) if means else None


def _averages(summary: Summary) -> list[Average]:
    """The average of all seeds' nets, with one view and with ten."""
    done = {(row["variant"], row["seed"]) for row in summary.rows if row["status"] == OK}
    found = []
    for views in ("center", "ten"):
        total, labels, seeds = None, None, []
        for task in summary.tasks:
            arrays = measures.load(task.measured) if (task.variant, task.seed) in done else {}
            if views not in arrays:
                continue
            shares = arrays[views].astype(np.float64)
            total, labels = shares if total is None else total + shares, arrays["labels"]
            seeds.append(task.seed)
        if total is None or labels is None or len(seeds) < 2:
            continue
        variant = summary.experiment.variants[0]
        keys = {count: Metric(f"{count}_{views}", "") for count in ("top1", "top5")}
        single = {count: _mean(summary.values(variant, metric)) for count, metric in keys.items()}
        together = measures.errors_of(total / len(seeds), labels)
        found.append(Average(views, tuple(seeds), single, together, len(labels)))
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def to_json(summary: Summary) -> str:
    """The comparisons for machines."""
    compared = [
        {
            "metric": each.metric.key,
            "variant": each.variant.name,
            "against": each.against.name,
            "claim": each.found.is_claim,
            "paper": None if each.variant.paper is None else dataclasses.asdict(each.variant.paper),
            **_comparison(each.found),
        }
        for each in summary.compared
    ]
    content = {
        "experiment": summary.experiment.name,
        "runs": len(summary.tasks),
        "done": summary.num_done,
        "failed": [[row["variant"], row["seed"]] for row in summary.failed],
        "left_out": summary.experiment.left_out,
        "compared": compared,
        "levels": [_level(level) for level in summary.levels],
        "averages": [dataclasses.asdict(average) for average in summary.averages],
    }
    return json.dumps(content, indent=1) + "\n"


def _comparison(found: Comparison) -> dict[str, Any]:
    content = dataclasses.asdict(found)
    content["mean"] = found.mean if math.isfinite(found.mean) else None
    return content


def _level(level: Level) -> dict[str, Any]:
    sides = {"relu": level.relu, "tanh": level.tanh}
    shown = {name: None if side is None else [side[0].name, side[1]] for name, side in sides.items()}
    return {"level": level.level, **shown, "ratio": level.ratio}
