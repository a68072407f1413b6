"""Differences between two variants, paired by seed: mean, 95 % interval, and what could have been seen at all.

Runs of one seed share the order of images, the crops and the initial weights of what both nets have, so their
difference has less noise than the difference of two means.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
BOOTSTRAP_SEED = 20121203  # any fixed number: the same runs give the same interval


@dataclasses.dataclass(frozen=True)
class Interval:
    """A 95 % interval, low <= high."""

    low: float
    high: float

    @property
    def spans_zero(self) -> bool:
        """Whether no difference at all is inside it, or at its edge."""
        return self.low <= 0 <= self.high


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A variant less its baseline, seed by seed.

    Attributes:
        seeds: those that both have, ascending.
        differences: one a seed, in the unit of the figure.
        mean: of the differences; NaN without a seed.
        interval: of the mean by Student's t; None with fewer than two seeds, or where all differences are equal, which
            says nothing about how they spread.
        bootstrap: of the mean by resampling seeds (percentiles), beside it; with few seeds it is too narrow.
        agree: seeds whose difference has the sign of the mean.
        smallest_visible: the smallest mean difference that these seeds, spread as they are, would tell from zero:
            half of the interval's length.
        unpaired: seeds that only one of the two has, because a run failed or is missing.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    interval: Interval | None
    bootstrap: Interval | None
    agree: int
    smallest_visible: float | None
    unpaired: tuple[int, ...]

    @property
    def is_claim(self) -> bool:
        """Whether there is a difference to speak of: the interval does not span zero."""
        return self.interval is not None and not self.interval.spans_zero


def compare(baseline: Mapping[int, float], variant: Mapping[int, float]) -> Comparison:
    """Compares two variants.

    Args:
        baseline: seed -> figure; not-finite ones count as missing.
        variant: the same.
    """
    first, second = (
        {seed: value for seed, value in found.items() if math.isfinite(value)} for found in (baseline, variant)
    )
    seeds = tuple(sorted(first.keys() & second.keys()))
    differences = np.array([second[seed] - first[seed] for seed in seeds], dtype=np.float64)
    mean = float(differences.mean()) if len(seeds) else math.nan
    interval = mean_interval(differences)
    return Comparison(
        seeds=seeds,
        differences=tuple(differences.tolist()),
        mean=mean,
        interval=interval,
        bootstrap=bootstrap_interval(differences),
        agree=sum(difference * mean > 0 for difference in differences.tolist()),
        smallest_visible=None if interval is None else (interval.high - interval.low) / 2,
        unpaired=tuple(sorted((baseline.keys() | variant.keys()) - set(seeds))),
    )


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval | None:
    """The 95 % interval of a mean by Student's t; None where the values cannot tell how they spread."""
    found = np.asarray(values, dtype=np.float64)
    if len(found) < 2 or not _spreads(found):
        return None
    mean, half = float(found.mean()), t_quantile(len(found) - 1) * float(found.std(ddof=1)) / math.sqrt(len(found))
    return Interval(mean - half, mean + half)


def bootstrap_interval(values: Sequence[float] | np.ndarray) -> Interval | None:
    """The 95 % interval of a mean by the percentiles of resampled means, seeded; None as of :func:`mean_interval`."""
    found = np.asarray(values, dtype=np.float64)
    if len(found) < 2 or not _spreads(found):
        return None
    chosen = np.random.default_rng(BOOTSTRAP_SEED).integers(0, len(found), (RESAMPLES, len(found)))
    edge = 50 * (1 - CONFIDENCE)  # percent
    low, high = np.percentile(found[chosen].mean(axis=1), (edge, 100 - edge))
    return Interval(float(low), float(high))


def t_quantile(freedom: int) -> float:
    """Student's t that 95 % of draws stay below in absolute value; ``freedom`` degrees of it, >= 1."""
    from scipy.special import stdtrit  # slow to import, and needed once runs are done

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def _spreads(values: np.ndarray) -> bool:
    """Whether values differ by more than their own rounding."""
    return float(np.ptp(values)) > 1e-12 * float(np.abs(values).max())
