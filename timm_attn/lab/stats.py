"""Statistics over seeds: mean, deviation, and the paired difference with a bootstrap interval."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_SEEDS = 5  # Below, no difference is called one.
_EXACT_UP_TO = 8  # Values; 8 have 6435 distinct resamples, and enumerating them is exact and fast.


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        values: One per seed.
        mean: Their mean.
        deviation: Their standard deviation with n - 1, NaN for one value.
        low: Lower end of the 95 % bootstrap interval of the mean, NaN for one value.
        high: Its upper end.
    """

    values: tuple[float, ...]
    mean: float
    deviation: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, deviation and interval.

    Args:
        values: One number per seed.

    Raises:
        ValueError: There is none.
    """
    if len(values) == 0:
        raise ValueError('No values: at least one seed must have finished.')
    x = np.asarray(values, dtype=np.float64)
    deviation = float(x.std(ddof=1)) if len(x) > 1 else math.nan
    low, high = bootstrap_interval(x) if len(x) > 1 else (math.nan, math.nan)
    return Estimate(tuple(float(v) for v in x), float(x.mean()), deviation, low, high)


def bootstrap_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean.

    Up to eight values all resamples are enumerated, each with its probability, so no random number is drawn; above,
    20000 resamples with a fixed seed are. An end is the smallest mean whose cumulative probability reaches
    (1 - level) / 2, and 1 minus that.

    Args:
        values: The sample.
        level: Probability inside.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    n = len(x)
    if n <= _EXACT_UP_TO:
        chosen = np.array(list(itertools.combinations_with_replacement(range(n), n)))  # (multisets, n)
        counts = (chosen[:, :, None] == np.arange(n)).sum(1)  # (multisets, n)
        factorials = np.array([math.factorial(k) for k in range(n + 1)])
        weights = factorials[n] / factorials[counts].prod(1) / n**n
        means = counts @ x / n
    else:
        means = x[np.random.default_rng(0).integers(n, size=(20000, n))].mean(1)
        weights = np.full(len(means), 1 / len(means))
    order = np.argsort(means, kind='stable')
    reached = np.cumsum(weights[order])
    tail = (1 - level) / 2
    # The tolerance keeps rounding of the cumulative sum from moving an end by one resample.
    ends = np.searchsorted(reached, [tail - 1e-12, 1 - tail - 1e-12])
    low, high = means[order][np.minimum(ends, len(means) - 1)]
    return float(low), float(high)


def verdict(difference: Estimate) -> str:
    """What a paired difference allows to say, by rule: 'better', 'worse', 'no difference shown' or 'too few seeds'.

    Two or three seeds that point one way give an interval without zero every time, and do so by chance too often: with
    n seeds, one time in 2^(n-1). Five are asked for before a difference is called one.

    Args:
        difference: Of accuracies, one per seed.
    """
    if len(difference.values) < 2:
        return 'too few seeds'
    if difference.low <= 0 <= difference.high:
        return 'no difference shown'
    if len(difference.values) < FEWEST_SEEDS:
        return 'too few seeds'
    return 'better' if difference.mean > 0 else 'worse'


def reading(label: str, against: str, difference: Estimate) -> str:
    """The verdict as a sentence, with its numbers.

    Args:
        label: The model.
        against: The first model.
        difference: Of accuracies in percent, one per seed.
    """
    n = len(difference.values)
    told = f'{label} against {against}: {difference.mean:+.2f} points'
    if n < 2:
        return f'{told} on one seed: one seed shows nothing.'
    told += f' (95 % interval {difference.low:+.2f} to {difference.high:+.2f}, {n} seeds)'
    return (
        told
        + {
            'better': ': better, on these data with these settings.',
            'worse': ': worse, on these data with these settings.',
            'no difference shown': ': the interval contains zero: no difference shown.',
            'too few seeds': f': the interval excludes zero, but {n} seeds are too few to call it a difference.',
        }[verdict(difference)]
    )
