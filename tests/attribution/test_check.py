"""`ScoreCheck`: what it says of exact, of worthless and of noisy scores."""

import itertools
import math

import pytest
import torch

from hyperopt_peft import ProblemError
from hyperopt_peft.attribution import ScoreCheck
from hyperopt_peft.attribution.check import rank_interval
from tests.support.attributed import levels, scored, scored_levels


def test_exact_scores_of_a_smooth_run_predict_retraining() -> None:
    check = scored_levels().check(12, share=0.1)
    assert check.lds > 0.95 and 0.8 < check.slope < 1.25 and check.trustworthy
    assert not check.of_head
    assert check.metasmoothness is not None and check.metasmoothness > 0.95


def test_retrainings_are_those_without_the_rows() -> None:
    """Predicted changes add up scores; a seed gives the same rows again."""
    result = scored_levels()
    one, other = (result.check(6, share=0.1, perturbation=None, seed=3) for _ in range(2))
    assert torch.equal(one.actual, other.actual) and one.metasmoothness is None
    assert set(one.predicted.tolist()) <= {-float(score) for score in result.scores}


def test_smoothness_is_that_of_the_run() -> None:
    """A method of the end has none: its own scores may move little where the run moves much."""
    assert scored(levels(), estimator="gradient").check(5, share=0.1).metasmoothness is None


def test_wrong_scores_are_called_worthless() -> None:
    result = scored_levels()
    result.by_slice["all"] = -result.by_slice["all"]
    check = result.check(12, share=0.1, perturbation=None)
    assert check.lds < -0.9 and not check.trustworthy
    assert "do not act" in check.verdict


def test_the_interval_is_that_of_a_rank_correlation() -> None:
    """Of 95 % of samples with a known correlation it holds the truth."""
    generator, rho, inside = torch.Generator().manual_seed(0), 0.7, 0
    truth = 6 / math.pi * math.asin(rho / 2)  # Spearman's of a normal pair
    for _ in range(400):
        x, e = torch.randn(2, 40, generator=generator)
        low, high = ScoreCheck(x, rho * x + math.sqrt(1 - rho**2) * e, None, 0.05).interval
        inside += low < truth < high
    assert 0.92 <= inside / 400 <= 0.98


@pytest.mark.parametrize("theta", [0.0, 1.0, 3.0, 10.0, 40.0, -3.0])
def test_few_retrainings_have_an_exact_interval(theta: float) -> None:
    """Over all 720 orders of six, each with P(π) ∝ exp(θ·ρ(π)): it holds E[ρ] in 95 % or more."""
    orders = torch.tensor(list(itertools.permutations(range(6)))).double()
    rho = 1 - 6 * (orders - torch.arange(6)).square().sum(1) / (6**3 - 6)
    probabilities = (theta * rho).softmax(0)
    mean = float(probabilities @ rho)
    ends = {float(value): rank_interval(float(value), 6) for value in rho.unique()}
    inside = [low <= mean <= high for low, high in (ends[float(value)] for value in rho)]
    assert float(probabilities[torch.tensor(inside)].sum()) >= 0.95


def test_a_perfect_order_never_has_an_interval_of_no_width() -> None:
    """The more retrainings, the narrower; -ρ has the reversed interval."""
    lows = [rank_interval(1.0, count)[0] for count in range(5, 31)]
    assert lows == sorted(lows) and lows[0] < 0.4 and lows[-1] < 0.9995
    for count in (5, 9, 10, 20):
        low, high = rank_interval(0.3, count)
        assert rank_interval(-0.3, count) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("actual", "lds"), [([0, 1, 2, 3, 4], 1.0), ([1, 0, 2, 3, 4], 0.9)])
def test_five_retrainings_cannot_tell(actual: list[int], lds: float) -> None:
    """Even in perfect order: one of 120 orders of worthless scores is perfect too."""
    check = ScoreCheck(torch.arange(5.0), torch.tensor(actual).double(), 0.99, 0.05)
    assert check.lds == pytest.approx(lds)
    assert check.interval[0] < 0.4 and not check.trustworthy
    assert "5 retrainings cannot tell" in str(check)


@pytest.mark.parametrize("slope", [0.6, 1.45])
def test_right_order_and_wrong_sizes_are_not_trusted(slope: float) -> None:
    x = torch.linspace(-1, 1, 20)
    check = ScoreCheck(x, slope * x, 0.99, 0.05)
    assert check.lds == 1.0 and not check.trustworthy and "order" in check.verdict


@pytest.mark.parametrize("slope", [1.45, -1.0])
def test_advice_for_a_head_can_be_followed(slope: float) -> None:
    """It has no steps: sizes follow from the slope, and an order from fewer rows left out."""
    x = torch.linspace(-1, 1, 20)
    advice = ScoreCheck(x, slope * x, None, 0.05, of_head=True).verdict
    assert "smooth" not in advice and "estimator" not in advice
    assert ("1.45" in advice) == (slope > 0) and ("share" in advice) == (slope < 0)


@pytest.mark.parametrize("smoothness", [0.99, 0.2])
def test_advice_is_of_the_estimator_where_the_run_is_smooth(smoothness: float) -> None:
    x = torch.linspace(-1, 1, 20)
    advice = ScoreCheck(-x, x, smoothness, 0.05).verdict
    assert "do not act" in advice and "smoother" in advice
    assert ("estimator unrolled" in advice) == (smoothness > 0.5)


@pytest.mark.parametrize(
    ("retrainings", "share", "named"),
    [(4, 0.1, "retrainings"), (6, 0.0, "share"), (6, 1.0, "share")],
)
def test_bad_arguments_are_named(retrainings: int, share: float, named: str) -> None:
    with pytest.raises(ProblemError, match=named):
        scored_levels().check(retrainings, share=share)
