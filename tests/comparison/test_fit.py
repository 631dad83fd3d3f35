"""The choice of a rate by a quadratic fit over the logarithm of the rate."""

from __future__ import annotations

from math import inf, log, nan

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hyperopt_peft.comparison.choice import RATES, Choice
from hyperopt_peft.comparison.fit import peak

SCORES = st.lists(st.floats(-10, 10), min_size=5, max_size=5)


@given(
    top=st.floats(log(RATES[0]) - 1, log(RATES[-1]) + 1),
    curvature=st.floats(0.01, 100),
    highest=st.floats(-10, 10),
    cliff=st.sampled_from([0, 1, 2]),
)
def test_the_rate_nearest_to_the_top_of_a_quadratic_is_found_beside_a_cliff(
    top: float, curvature: float, highest: float, cliff: int
) -> None:
    distances = sorted((abs(log(rate) - top), rate) for rate in RATES[: 5 - cliff])
    (near, nearest), (next_one, _), *_ = distances
    assume(next_one - near > 1e-3)
    scores = [highest - curvature * (log(rate) - top) ** 2 for rate in RATES]
    bad = min(scores) - 1
    assert peak(RATES, [*scores[: 5 - cliff], *[bad] * cliff]) == nearest


@pytest.mark.parametrize(
    ("scores", "left_out"),
    [
        ([0, 2, 0, 0, 1], {3}),  # the median up to the best score is 1; three lower rates stay
        ([0, 5, 0, 4, 0], {4}),
        ([1, 2, 2, 0, 1], {3, 4}),
        ([1, 0, 0, 1, 1], set()),
    ],
)
def test_a_rate_over_the_best_one_is_left_out_below_the_median(
    scores: list[float], left_out: set[int]
) -> None:
    rates = [10.0**k for k in range(-5, 0)]
    kept = [k for k in range(5) if k not in left_out]
    fit = np.polyfit(kept, [scores[k] for k in kept], 2)
    assert peak(rates, scores) == rates[max(kept, key=lambda k: round(np.polyval(fit, k), 9))]


@given(scores=SCORES, unit=st.floats(1e-6, 1e6), order=st.permutations(range(5)))
def test_neither_the_unit_of_rates_nor_their_order_matters(
    scores: list[float], unit: float, order: list[int]
) -> None:
    scores = [round(score, 2) for score in scores]
    rates = [unit * RATES[i] for i in order]
    assert peak(rates, [scores[i] for i in order]) == pytest.approx(unit * peak(RATES, scores))


@given(scores=SCORES, wrong=st.dictionaries(st.integers(0, 4), st.sampled_from([nan, inf, -inf])))
def test_a_score_that_is_not_finite_never_wins(
    scores: list[float], wrong: dict[int, float]
) -> None:
    assume(len(wrong) < 5)
    seen = [wrong.get(i, score) for i, score in enumerate(scores)]
    finite = {rate: score for i, (rate, score) in enumerate(zip(RATES, scores)) if i not in wrong}
    assert peak(RATES, seen) == peak([*finite], [*finite.values()])
    if len(finite) < 3:
        assert finite[peak(RATES, seen)] == max(finite.values())


def test_the_unit_of_scores_and_equal_rates_change_nothing() -> None:
    rates, scores = [1e-3, 1e-2, 1e-1], [1.0, 5.0, 2.0]
    assert {peak(rates, [unit * x for x in scores]) for unit in (1e-12, 1, 1e12)} == {1e-2}
    assert Choice(np.array([1e-3, 1e-3, 1e-2])).rates == (1e-3, 1e-2)
