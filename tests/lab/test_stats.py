import math
import statistics
import subprocess
import sys

import numpy as np
import pytest

from timm_attn.lab.stats import Judgement, estimate, judge, reading, verdicts

# Student's t for 95 % two-sided, from printed tables, by degrees of freedom.
T95 = {1: 12.7062, 2: 4.3027, 4: 2.7764, 9: 2.2622, 29: 2.0452}


@pytest.mark.parametrize('n', [2, 3, 5, 10, 30])
def test_interval_is_that_of_the_printed_tables(n: int) -> None:
    values = np.random.default_rng(n).normal(2.0, 1.0, size=n).tolist()
    e = estimate(values)
    half = T95[n - 1] * statistics.stdev(values) / math.sqrt(n)
    assert (e.mean, e.deviation) == pytest.approx((statistics.mean(values), statistics.stdev(values)))
    assert (e.low, e.high) == pytest.approx((e.mean - half, e.mean + half), rel=1e-4)
    assert e.values == tuple(values)


def test_interval_holds_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [estimate(rng.normal(3, 2, 5).tolist()) for _ in range(2000)]
    inside = np.mean([e.low <= 3 <= e.high for e in intervals])
    assert inside == pytest.approx(0.95, abs=3 * math.sqrt(0.05 * 0.95 / 2000))


def test_estimate_of_one_value_has_no_interval() -> None:
    e = estimate([3.0])
    assert e.mean == 3.0
    assert math.isnan(e.deviation) and math.isnan(e.low) and math.isnan(e.high)


def test_estimate_of_equal_values_has_no_width() -> None:
    e = estimate([0.1] * 7)  # Their mean in floating point is not 0.1.
    assert (e.mean, e.deviation, e.low, e.high) == (0.1, 0.0, 0.1, 0.1)


def test_what_is_no_list_of_finite_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match='at least one seed must have finished'):
        estimate([])
    for values in ([1.0, math.nan], [math.inf] * 5, [[1.0], [2.0]]):
        with pytest.raises(ValueError, match='must be a list of finite numbers, one per seed'):
            estimate(values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'SE': values .* must be numbers"):
        verdicts({'SE': ['high', 'low']})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"'SE': values .* finite"):
        verdicts({'plain': [0.0] * 5, 'SE': [1.0, 1.0, 1.0, 1.0, math.nan]})


@pytest.mark.parametrize(
    ('values', 'expected'),
    [
        ([1.0, 1.1, 0.9, 1.2, 0.8], 'better'),
        ([-1.0, -1.1, -0.9, -1.2, -0.8], 'worse'),
        ([1.0, -1.1, 0.9, -1.2, 0.8], 'no difference shown'),
        ([0.0] * 5, 'no difference shown'),
        ([0.5] * 5, 'better'),
        ([2.0, 2.1, 2.2, 2.3], 'too few seeds'),
        ([2.0, -2.1], 'too few seeds'),
        ([5.0], 'too few seeds'),
        ([], 'too few seeds'),
    ],
)
def test_verdict_follows_the_rule(values: list[float], expected: str) -> None:
    assert verdicts({'SE': values}) == {'SE': expected}


def test_nothing_to_compare_gives_nothing() -> None:
    assert verdicts({}) == {}


# Five values with mean 1 whose t is sqrt(5) / deviation.
PATTERN = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]) / math.sqrt(2.5)  # mean 0, deviation 1


def sample(p: float) -> list[float]:
    """Five differences whose two-sided p-value is p, by the closed form of Student's t with four degrees."""
    # With 4 degrees of freedom P(T <= t) = 1/2 + 3/8 * s * (1 - s^2 / 12 * ...); solved by bisection on the integral.
    low, high = 0.0, 1e3
    for _ in range(200):
        t = (low + high) / 2
        u = t / math.sqrt(4 + t * t)
        tail = 0.5 - 0.75 * (u - u**3 / 3)  # The integral of 3/4 (1 - u^2), the density in u.
        low, high = (t, high) if 2 * tail > p else (low, t)
    return (PATTERN + t / math.sqrt(5)).tolist()


def test_holm_steps_down_and_stops_at_the_first_that_fails() -> None:
    # Levels of four: 0.0125, 0.0167, 0.025, 0.05.
    held = {'c': sample(0.026), 'a': sample(0.012), 'd': sample(0.04), 'b': sample(0.016)}
    judged = judge(held)
    assert {k: j.verdict for k, j in judged.items()} == {
        'a': 'better',
        'b': 'better',
        'c': 'no difference shown',
        'd': 'no difference shown',  # 0.04 alone would do, but c failed before.
    }
    assert list(judged) == list(held)
    assert [judged[k].p for k in 'abcd'] == pytest.approx([0.012, 0.016, 0.026, 0.04])
    assert [judged[k].level for k in 'abcd'] == pytest.approx([0.05 / 4, 0.05 / 3, 0.05 / 2, 0.05 / 2])
    assert verdicts({'d': held['d']}) == {'d': 'better'}
    # Bonferroni would call a alone, no correction all.
    for j in judged.values():
        assert (j.low > 0) == (j.verdict == 'better')


def test_models_with_too_few_seeds_neither_claim_nor_count() -> None:
    held = {'a': sample(0.04), 'few': [9.0, 9.1, 9.2, 9.3]}
    assert verdicts(held) == {'a': 'better', 'few': 'too few seeds'}


def test_models_may_have_different_numbers_of_seeds() -> None:
    assert verdicts({'a': sample(0.01), 'b': [1.0, -1.0] * 4, 'c': [-1.0, -1.1] * 10}) == {
        'a': 'better',
        'b': 'no difference shown',
        'c': 'worse',
    }


@pytest.mark.parametrize(('models', 'seeds'), [(1, 5), (5, 5), (5, 10)])
def test_of_equal_models_at_most_five_percent_of_comparisons_claim_anything(models: int, seeds: int) -> None:
    rng = np.random.default_rng(models * 100 + seeds)
    trials = 800
    claims = 0
    for _ in range(trials):
        first = rng.normal(size=seeds)  # All differences share it, as in a comparison.
        found = verdicts({str(m): (rng.normal(size=seeds) - first).tolist() for m in range(models)})
        claims += any(v in ('better', 'worse') for v in found.values())
    error = 3 * math.sqrt(0.05 * 0.95 / trials)
    assert 0.01 < claims / trials < 0.05 + error  # Not so cautious either that nothing is ever said.


def test_detectable_difference_is_found_in_four_of_five_comparisons() -> None:
    rng = np.random.default_rng(3)
    trials = 1500
    wanted = judge({'a': PATTERN.tolist()})['a'].detectable  # For a deviation of 1.
    found = [verdicts({'a': rng.normal(wanted, 1, 5).tolist()})['a'] == 'better' for _ in range(trials)]
    assert np.mean(found) == pytest.approx(0.8, abs=3 * math.sqrt(0.8 * 0.2 / trials))
    # More models make the same seeds show less.
    more = judge({str(i): PATTERN.tolist() for i in range(5)})
    assert more['0'].detectable > 1.3 * wanted


def test_reading_says_the_numbers() -> None:
    values = [0.5, -0.5, 0.6, 0.1, 0.3]
    judged = judge({'SE': values})['SE']
    said = reading('SE', 'plain', estimate(values), judged)
    assert said.startswith('SE against plain: +0.20 points (corrected interval -0.34 to +0.74, 5 seeds): no difference')
    assert f'show one of {judged.detectable:.2f} points in four of five' in said
    assert '-0.00' not in reading('SE', 'plain', estimate([-1e-4] * 6), judge({'SE': [-1e-4] * 6})['SE'])
    few = reading('SE', 'plain', estimate([2.0, 2.1]), Judgement('too few seeds'))
    assert few == 'SE against plain: +2.05 points on 2 seeds: too few seeds; fewer than 5 claim nothing.'
    assert reading('SE', 'plain', estimate([1.0] * 6), judge({'SE': [1.0] * 6})['SE']).endswith(
        'better, on these data with these settings.'
    )


def test_the_lab_is_imported_when_it_is_asked_for() -> None:
    code = (
        'import sys, timm_attn\n'
        "assert not {'scipy', 'timm_attn.lab'} & set(sys.modules)\n"
        "print(timm_attn.lab.stats.verdicts({'a': [1.0, 2.0]}), hasattr(timm_attn, 'lba'))"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "{'a': 'too few seeds'} False"
