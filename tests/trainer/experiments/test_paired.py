"""Paired differences: against values worked out by hand and tables of Student's t, and what must hold for any."""

import math

import numpy as np
import pytest

from trainer.experiments.paired import Interval, bootstrap_interval, compare, mean_interval, t_quantile


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (29, 2.045)])
def test_students_t_is_that_of_the_printed_tables(freedom: int, value: float) -> None:
    assert t_quantile(freedom) == pytest.approx(value, abs=5e-4)


def test_five_pairs_by_hand() -> None:
    """Differences 1, 2, 3, 4, 5: mean 3, deviation (10 / 4)^0.5, half an interval 2.7764 * 1.5811 / 5^0.5 = 1.9632."""
    baseline = dict.fromkeys(range(5), 10.0)
    found = compare(baseline, {seed: 11.0 + seed for seed in range(5)})
    assert (found.seeds, found.differences, found.mean) == ((0, 1, 2, 3, 4), (1, 2, 3, 4, 5), 3)
    assert found.interval is not None and found.smallest_visible == pytest.approx(1.9632, abs=1e-4)
    assert (found.interval.low, found.interval.high) == pytest.approx((1.0368, 4.9632), abs=1e-4)
    assert found.agree == 5 and found.is_claim and found.unpaired == ()


def test_two_pairs_by_hand() -> None:
    """Differences 0.1 and 0.3: mean 0.2, half an interval 12.706 * 0.14142 / 2^0.5 = 1.2706: nothing can be claimed."""
    found = compare({0: 1.0, 1: 1.0}, {0: 1.1, 1: 1.3})
    assert found.interval is not None and not found.is_claim
    assert (found.interval.low, found.interval.high) == pytest.approx((-1.0706, 1.4706), abs=1e-4)
    assert found.agree == 2


def test_the_bootstrap_of_two_values_has_three_means() -> None:
    """Of 0 and 1 a quarter of the resamples is 0, a quarter 1, half 0.5: the percentiles 2.5 and 97.5 are 0 and 1."""
    assert bootstrap_interval([0.0, 1.0]) == Interval(0.0, 1.0)


def test_the_bootstrap_of_many_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400)
    found, student = bootstrap_interval(values), mean_interval(values)
    assert found is not None and student is not None
    assert (found.low, found.high) == pytest.approx((student.low, student.high), abs=0.02)
    assert bootstrap_interval(values) == found, "seeded"


@pytest.mark.parametrize("seed", range(20))
def test_what_holds_for_any_pairs(seed: int) -> None:
    """Order of seeds, a shift of both, a swap, and the unit change what they must and nothing else."""
    random = np.random.default_rng(seed)
    count = int(random.integers(2, 9))
    first, second = ({place: float(random.normal(0.1, 1)) for place in range(count)} for _ in range(2))
    found = compare(first, second)
    assert found.interval is not None and found.bootstrap is not None and found.smallest_visible is not None
    assert found.interval.low < found.mean < found.interval.high
    assert found.bootstrap.low <= found.mean <= found.bootstrap.high
    assert found.is_claim == (abs(found.mean) > found.smallest_visible)
    assert compare(dict(reversed(first.items())), second) == found
    swapped = compare(second, first)
    assert swapped.mean == -found.mean and swapped.agree == found.agree and swapped.is_claim == found.is_claim
    assert swapped.interval is not None
    assert (swapped.interval.low, swapped.interval.high) == pytest.approx((-found.interval.high, -found.interval.low))
    shifted = compare(*({place: value + 7 for place, value in each.items()} for each in (first, second)))
    assert shifted.mean == pytest.approx(found.mean) and shifted.agree == found.agree


def test_95_of_100_intervals_hold_the_truth() -> None:
    random = np.random.default_rng(11)
    hits = 0
    for _ in range(2000):
        interval = mean_interval(random.normal(1.0, 3.0, 5))
        assert interval is not None
        hits += interval.low <= 1.0 <= interval.high
    assert abs(hits / 2000 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 2000)


def test_a_run_that_is_missing_is_in_no_pair_and_told() -> None:
    found = compare({0: 1.0, 1: 2.0, 2: math.nan}, {0: 2.0, 2: 3.0, 3: 4.0})
    assert found.seeds == (0,) and found.differences == (1.0,) and found.unpaired == (1, 2, 3)
    assert found.interval is None and found.bootstrap is None and found.smallest_visible is None and not found.is_claim


def test_no_pair_at_all() -> None:
    found = compare({}, {1: 1.0})
    assert math.isnan(found.mean) and found.seeds == () and found.agree == 0 and not found.is_claim


@pytest.mark.parametrize("difference", [0.0, 0.1])
def test_differences_that_are_all_alike_say_nothing_of_their_spread(difference: float) -> None:
    """Ten images of which one more is wrong, in both seeds: an interval of no length would claim too much."""
    found = compare({0: 0.1, 1: 0.2}, {0: 0.1 + difference, 1: 0.2 + difference})
    assert found.interval is None and not found.is_claim


def test_an_interval_that_touches_zero_spans_it() -> None:
    assert Interval(0.0, 2.0).spans_zero and Interval(-1.0, 0.0).spans_zero and not Interval(1e-9, 1.0).spans_zero
