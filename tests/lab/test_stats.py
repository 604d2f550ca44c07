import itertools
import math
import statistics
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from timm_attn.lab.stats import Estimate, bootstrap_interval, estimate, reading, verdict


def slow_interval(values: list[int], level: Fraction = Fraction(95, 100)) -> tuple[float, float]:
    """Every resample one by one, in whole numbers: nothing of the code under test."""
    n = len(values)
    counts = Counter(sum(resample) for resample in itertools.product(values, repeat=n))
    tail = (1 - level) / 2
    ends = []
    for wanted in (tail, 1 - tail):
        reached = 0
        for total in sorted(counts):
            reached += counts[total]
            if Fraction(reached, n**n) >= wanted:
                ends.append(total / n)
                break
    return ends[0], ends[1]


@pytest.mark.parametrize('values', [[1, 4], [3, -1, 7], [0, 2, 2, 9], [-3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8]])
def test_interval_is_that_of_all_resamples_written_out(values: list[int]) -> None:
    assert bootstrap_interval(values) == pytest.approx(slow_interval(values), abs=1e-12)


def test_interval_of_many_values_is_near_the_normal_one_and_the_same_every_time() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, size=40)
    low, high = bootstrap_interval(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(40)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.04)
    assert (low, high) == bootstrap_interval(values)


def test_interval_does_not_depend_on_the_order_of_seeds() -> None:
    assert bootstrap_interval([0.3, -0.2, 1.1]) == bootstrap_interval([1.1, 0.3, -0.2])


def test_estimate_has_mean_and_deviation_with_n_minus_one() -> None:
    values = [98.5, 99.25, 97.75, 98.0]
    e = estimate(values)
    assert e.mean == pytest.approx(statistics.mean(values))
    assert e.deviation == pytest.approx(statistics.stdev(values))
    assert e.low <= e.mean <= e.high


def test_estimate_of_one_value_has_no_interval() -> None:
    e = estimate([3.0])
    assert e.mean == 3.0
    assert math.isnan(e.deviation) and math.isnan(e.low) and math.isnan(e.high)


def test_estimate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match='at least one seed must have finished'):
        estimate([])


@pytest.mark.parametrize(
    ('values', 'expected'),
    [
        ([1.0, 1.1, 0.9, 1.2, 0.8], 'better'),
        ([-1.0, -1.1, -0.9, -1.2, -0.8], 'worse'),
        ([1.0, -1.1, 0.9, -1.2, 0.8], 'no difference shown'),
        ([0.0] * 5, 'no difference shown'),
        ([2.0, 2.1, 2.2, 2.3], 'too few seeds'),
        ([2.0, -2.1], 'no difference shown'),
        ([5.0], 'too few seeds'),
    ],
)
def test_verdict_follows_the_rule(values: list[float], expected: str) -> None:
    assert verdict(estimate(values)) == expected


def test_reading_says_the_numbers_and_that_zero_is_inside() -> None:
    said = reading('SE', 'plain', Estimate((0.5, -0.5, 0.6), 0.2, 0.6, -0.5, 0.6))
    assert said == (
        'SE against plain: +0.20 points (95 % interval -0.50 to +0.60, 3 seeds): '
        'the interval contains zero: no difference shown.'
    )
    assert reading('SE', 'plain', estimate([1.0])).endswith('one seed shows nothing.')
    assert '4 seeds are too few' in reading('SE', 'plain', estimate([2.0, 2.1, 2.2, 2.3]))
