"""Means of few numbers: the t-test, Holm's correction and the minimum detectable difference."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
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


@pytest.mark.parametrize("count", [2, 3, 5, 20])
@pytest.mark.parametrize("family", [1, 3])
def test_a_detectable_difference_is_found_with_probability_080(count: int, family: int) -> None:
    """By an integral over the sample variance w/f, at which the mean is normal."""
    verdict = Verdict([0.01 * (-1) ** k + 0.02 for k in range(count)])
    verdict.family, f = family, count - 1
    shift, limit = verdict.detectable / verdict.error, t.ppf(1 - 0.025 / family, f)

    def found(root: float) -> float:
        sides = norm.sf(limit * root / math.sqrt(f) - shift)
        return float(sides * chi2.pdf(root**2, f) * 2 * root)

    power, _ = quad(found, 0, 12, points=[shift * math.sqrt(f) / limit], limit=200)
    assert power == pytest.approx(0.8, abs=1e-6)
