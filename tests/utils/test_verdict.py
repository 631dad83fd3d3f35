"""Means of few numbers: the t-test, Holm's correction and the minimum detectable difference."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import dblquad
from scipy.stats import chi2, norm, t, ttest_1samp

from hyperopt_peft.utils.verdict import Verdict, holm

NUMBERS = st.lists(st.integers(-1000, 1000), min_size=2, max_size=20)


@given(NUMBERS)
def test_the_test_is_scipys_and_agrees_with_the_interval(numbers: list[int]) -> None:
    verdict = Verdict(x / 1000 for x in numbers)
    if len({*numbers}) > 1:
        expected = ttest_1samp(verdict.values, 0)
        assert verdict.p_value == pytest.approx(expected.pvalue, rel=1e-9)
        assert verdict.interval == pytest.approx(expected.confidence_interval())
    low, high = verdict.interval
    if min(abs(low), abs(high)) > 1e-9:
        assert verdict.is_significant == (low > 0 or high < 0)


def test_equal_differences_differ_from_0_and_roundings_of_0_do_not() -> None:
    scores = [0.7, 0.71, 0.74, 0.69, 0.72]
    equal = Verdict([(score + 0.05) - score for score in scores], points=True)
    assert equal.is_significant and equal.p_value < 1e-12
    assert equal.sentence("mine", "LoRA", "accuracy", "seeds").endswith("by 5.0 ± 0.0 points")
    assert Verdict([0.05] * 5).p_value == 0
    for values in ([0.0] * 5, [1e-9] * 5, [1e-17, 2e-17, 1e-17], [0.3]):
        assert not Verdict(values).is_significant


def test_holm_by_hand() -> None:
    # 4 · .01, 3 · .01 raised to it, 2 · .02 and .03 raised to it; the others are not.
    assert holm([0.02, 0.01, 0.03, 0.01]) == pytest.approx([0.04] * 4)
    assert holm([0.005, 0.011, 0.02, 0.04]) == pytest.approx([0.02, 0.033, 0.04, 0.04])
    assert holm([0.6, 0.01, 0.9]) == pytest.approx([1.0, 0.03, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.2))
def test_holm_is_between_bonferroni_and_none(values: list[float], level: float) -> None:
    corrected = holm(values)
    for one, value in zip(corrected, values, strict=True):
        assert value <= one <= min(1.0, len(values) * value)
    # Those of the step-down procedure: k, until a p-value is above level/(m − k).
    rejected = 0
    for value in sorted(values):
        if value * (len(values) - rejected) > level:
            break
        rejected += 1
    assert sum(one <= level for one in corrected) == rejected


@pytest.mark.parametrize("count", [3, 5, 20])
@pytest.mark.parametrize("family", [1, 3])
def test_a_detectable_difference_is_found_with_probability_080(count: int, family: int) -> None:
    """Of pairs of experiments: by the one it is printed, and the other one tests for it.

    With s₁² and s₂² the sample variances, whose f-fold is χ²_f, and a normal mean, it is found with
    probability E Φ(k s₁ − l s₂).
    """
    verdict = Verdict([0.01 * (-1) ** k + 0.02 for k in range(count)])
    verdict.family, f = family, count - 1
    shift, limit = verdict.detectable / verdict.error, t.ppf(1 - 0.025 / family, f)

    def density(root: float) -> float:
        return float(chi2.pdf(f * root**2, f) * 2 * f * root)

    def found(one: float, two: float) -> float:
        return float(norm.cdf(shift * one - limit * two)) * density(one) * density(two)

    power, _ = dblquad(found, 0, 6, 0, 6, epsabs=1e-5)
    assert power == pytest.approx(0.8, abs=2e-3)


def anova(table: Any) -> tuple[float, float]:
    """The standard error of a crossed mean and its degrees of freedom, by sums of squares."""
    n, m = table.shape
    of_seeds, of_rows, mean = table.mean(axis=1), table.mean(axis=0), table.mean()
    seeds = m * sum((x - mean) ** 2 for x in of_seeds) / (n - 1)
    rows = n * sum((x - mean) ** 2 for x in of_rows) / (m - 1)
    rest = sum(
        (table[s, r] - of_seeds[s] - of_rows[r] + mean) ** 2 for s in range(n) for r in range(m)
    ) / ((n - 1) * (m - 1))
    if rows <= rest:
        return math.sqrt(seeds / (n * m)), n - 1.0
    whole = seeds + rows - rest
    parts = seeds**2 / (n - 1), rows**2 / (m - 1), rest**2 / ((n - 1) * (m - 1))
    return math.sqrt(whole / (n * m)), max(whole**2 / sum(parts), min(n, m) - 1.0)


@given(st.integers(2, 7), st.integers(2, 9), st.integers(0, 10**6), st.floats(0, 2))
def test_seeds_and_rows_are_crossed_effects(n: int, m: int, seed: int, size: float) -> None:
    random = np.random.RandomState(seed)
    table = 0.3 + random.randn(n, m) + random.randn(n, 1) + size * random.randn(1, m)
    verdict, (error, freedom) = Verdict.crossed(table), anova(table)
    assert verdict.over_rows and verdict.estimate == pytest.approx(table.mean())
    assert verdict.error == pytest.approx(error) and verdict.freedom == pytest.approx(freedom)
    assert verdict.half == pytest.approx(t.ppf(0.975, freedom) * error)
    assert verdict.error >= Verdict(table.mean(axis=1)).error * (1 - 1e-12)


def test_an_interval_over_seeds_and_rows_is_of_the_population() -> None:
    """Of 1,000 tables of five seeds and 50 parts, whose row effects are as large as the others."""
    random, missed = np.random.RandomState(0), {"crossed": 0, "seeds": 0}
    for _ in range(1000):
        rows = random.randn(1, 50)
        table = rows + random.randn(5, 50)
        missed["crossed"] += Verdict.crossed(table).is_significant
        missed["seeds"] += Verdict(table.mean(axis=1)).is_significant
    assert 20 <= missed["crossed"] <= 80 < 200 <= missed["seeds"]
