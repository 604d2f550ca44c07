"""Statistics over seeds: means with Student's t intervals, and which paired differences may be called one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..optional import require

FEWEST_SEEDS = 5  # Below, no difference is called one.
LEVEL = 0.05  # Of equal models, at most so many comparisons claim a difference of any of them.
POWER = 0.8
VERDICTS = ('better', 'worse', 'no difference shown', 'too few seeds')


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: Of the values.
        deviation: Their standard deviation with n - 1, NaN for one value.
        low: Lower end of Student's t interval of the mean, NaN for one value.
        high: Its upper end.
        values: One per seed.
    """

    mean: float
    deviation: float
    low: float
    high: float
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """What the paired differences of one model allow to say, beside those of the others.

    Args:
        verdict: One of `VERDICTS`.
        p: Two-sided p-value of the t test, NaN with too few seeds.
        level: What p was held against, by Holm's procedure; NaN with too few seeds.
        low: Lower end of the interval of that level: it excludes zero where a difference is claimed, and only there.
        high: Its upper end.
        detectable: The true difference that as many seeds with this spread show in four of five comparisons.
    """

    verdict: str
    p: float = math.nan
    level: float = math.nan
    low: float = math.nan
    high: float = math.nan
    detectable: float = math.nan


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean, deviation and Student's t interval.

    Args:
        values: One number per seed.
        level: Probability outside the interval.

    Raises:
        ValueError: There is none, or one is no finite number.
    """
    x = _numbers(values)
    if len(x) == 0:
        raise ValueError('No values: at least one seed must have finished.')
    mean, deviation = _moments(x)
    if len(x) == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, tuple(x.tolist()))
    half = float(_stats().t.isf(level / 2, len(x) - 1)) * deviation / math.sqrt(len(x))
    return Estimate(mean, deviation, mean - half, mean + half, tuple(x.tolist()))


def verdicts(differences: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """What paired differences allow to say: 'better', 'worse', 'no difference shown' or 'too few seeds'.

    Args:
        differences: For each model its accuracy minus that of the first model, one number per common seed.

    Raises:
        ValueError: A number is not finite.
    """
    return {label: judged.verdict for label, judged in judge(differences).items()}


def judge(differences: Mapping[str, Sequence[float]]) -> dict[str, Judgement]:
    """The verdicts with what they rest on.

    Each model with five seeds or more is tested by Student's t; Holm's procedure over all of them holds the
    probability that any of equal models is called better or worse at 5 %. It assumes that the differences of a model
    over seeds are independent and about normal.

    Args:
        differences: For each model its accuracy minus that of the first model, one number per common seed.

    Raises:
        ValueError: A number is not finite; the message names the model.
    """
    samples = {}
    for label, values in differences.items():
        try:
            samples[label] = _numbers(values)
        except ValueError as e:
            raise ValueError(f"'{label}': {e}") from e
    tested = {label: x for label, x in samples.items() if len(x) >= FEWEST_SEEDS}
    p = {label: _p(x) for label, x in tested.items()}
    judged = {label: Judgement('too few seeds') for label in samples}
    rejecting = True
    level = LEVEL
    for rank, label in enumerate(sorted(p, key=lambda name: p[name])):
        if rejecting:  # From the first that is not rejected on, the level stays.
            level = LEVEL / (len(p) - rank)
            rejecting = p[label] <= level
        x = tested[label]
        interval = estimate(x.tolist(), level)
        verdict = ('better' if interval.mean > 0 else 'worse') if rejecting else 'no difference shown'
        # The strictest level of the procedure: what would be found whatever the other models do.
        detectable = _detectable(len(x), LEVEL / len(p)) * interval.deviation
        judged[label] = Judgement(verdict, p[label], level, interval.low, interval.high, detectable)
    return judged


def _p(x: np.ndarray) -> float:
    mean, deviation = _moments(x)
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * _stats().t.sf(abs(mean) / (deviation / math.sqrt(len(x))), len(x) - 1))


def _detectable(n: int, level: float) -> float:
    """The mean, in standard deviations, that the two-sided t test of n values finds with probability `POWER`."""
    stats = _stats()
    critical = stats.t.isf(level / 2, n - 1)

    def missing(effect: float) -> float:
        # Of the two tails the wrong one is negligible where the power is 0.8.
        return float(stats.nct.sf(critical, n - 1, effect * math.sqrt(n))) - POWER

    return float(require('scipy.optimize', 'lab', 'scipy').brentq(missing, 0, 1000 / math.sqrt(n)))


def _moments(x: np.ndarray) -> tuple[float, float]:
    if (x == x[0]).all():  # A mean of equal numbers is rounded, and would leave a deviation.
        return float(x[0]), 0.0 if len(x) > 1 else math.nan
    return float(x.mean()), float(x.std(ddof=1))


def _numbers(values: Sequence[float]) -> np.ndarray:
    try:
        x = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise ValueError(f'values (={values!r}) must be numbers, one per seed.') from e
    if x.ndim != 1 or not np.isfinite(x).all():
        raise ValueError(f'values (={values!r}) must be a list of finite numbers, one per seed.')
    return x


def _stats():
    return require('scipy.stats', 'lab', 'scipy')


def signed(x: float) -> str:
    """A difference with its sign and two digits; what rounds to zero is +0.00."""
    return f'{round(x, 2) + 0.0:+.2f}'


def reading(label: str, against: str, difference: Estimate, judged: Judgement) -> str:
    """The verdict as a sentence, with its numbers.

    Args:
        label: The model.
        against: The first model.
        difference: Of accuracies in percent, one per seed.
        judged: What it allows to say.
    """
    n = len(difference.values)
    told = f'{label} against {against}: {signed(difference.mean)} points'
    if judged.verdict == 'too few seeds':
        return f'{told} on {n} seed{"s" * (n > 1)}: too few seeds; fewer than {FEWEST_SEEDS} claim nothing.'
    told += f' (corrected interval {signed(judged.low)} to {signed(judged.high)}, {n} seeds): '
    if judged.verdict == 'no difference shown':
        return (
            f'{told}no difference shown; with this spread, as many seeds would show one of '
            f'{judged.detectable:.2f} points in four of five comparisons.'
        )
    return f'{told}{judged.verdict}, on these data with these settings.'
