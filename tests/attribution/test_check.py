"""`ScoreCheck`: what it says of exact, of worthless and of noisy scores."""

import itertools

import pytest
import torch

from hyperopt_peft import ProblemError
from hyperopt_peft.attribution import ScoreCheck
from hyperopt_peft.attribution.check import rank_interval
from hyperopt_peft.attribution.uses import Removal
from tests.support.attributed import levels, scored


def test_exact_scores_of_a_smooth_run_predict_retraining() -> None:
    check = scored().check(12, share=0.1)
    assert check.lds > 0.95 and 0.8 < check.slope < 1.25 and check.trustworthy
    assert not check.of_head
    assert check.metasmoothness is not None and check.metasmoothness > 0.95


def test_retrainings_are_those_without_the_rows() -> None:
    """Predicted changes add up scores; a seed gives the same rows again."""
    result = scored()
    one, other = (result.check(6, share=0.1, perturbation=None, seed=3) for _ in range(2))
    assert torch.equal(one.actual, other.actual) and one.metasmoothness is None
    assert set(one.predicted.tolist()) <= {-float(score) for score in result.scores}


def test_smoothness_is_that_of_the_run() -> None:
    """A method of the end has none: its own scores may move little where the run moves much."""
    assert scored(levels(), estimator="gradient").check(5, share=0.1).metasmoothness is None


def test_wrong_scores_are_called_worthless() -> None:
    result = scored()
    result.by_slice["all"] = -result.by_slice["all"]
    check = result.check(12, share=0.1, perturbation=None)
    assert check.lds < -0.9 and not check.trustworthy
    assert "do not act" in check.verdict


@pytest.mark.parametrize("theta", [0.0, 1.0, 3.0, 10.0, 40.0, -3.0])
@pytest.mark.parametrize("count", [5, 6, 7])
def test_the_interval_holds_the_mean_correlation(theta: float, count: int) -> None:
    """In 95 % of the orders π of few items, each with P(π) ∝ exp(θ·ρ(π))."""
    orders = torch.tensor(list(itertools.permutations(range(count)))).double()
    rho = 1 - 6 * (orders - torch.arange(count)).square().sum(1) / (count**3 - count)
    probabilities = (theta * rho).softmax(0)
    mean = float(probabilities @ rho)
    ends = {float(value): rank_interval(float(value), count) for value in rho.unique()}
    inside = [low <= mean <= high for low, high in (ends[float(value)] for value in rho)]
    assert float(probabilities[torch.tensor(inside)].sum()) >= 0.95


@pytest.mark.parametrize(("actual", "lds"), [([0, 1, 2, 3, 4], 1.0), ([1, 0, 2, 3, 4], 0.9)])
def test_five_retrainings_cannot_tell(actual: list[int], lds: float) -> None:
    """Even in perfect order: one of 120 orders of worthless scores is perfect too."""
    check = ScoreCheck(torch.arange(5.0), torch.tensor(actual).double(), 0.99, 0.05)
    assert check.lds == pytest.approx(lds)
    assert check.interval[0] < 0.4 and not check.trustworthy
    assert "5 retrainings cannot tell" in str(check)


def test_the_verdict_is_one_that_can_be_followed() -> None:
    """Sizes follow from the slope; a smooth run needs no smoothing, and a head has no steps."""
    x = torch.linspace(-1, 1, 20)

    def verdict(slope: float, smoothness: float | None, **options: bool) -> str:
        check = ScoreCheck(x, slope * x, smoothness, 0.05, **options)
        assert not check.trustworthy
        return check.verdict

    for slope in (0.6, 1.45):
        assert "order" in verdict(slope, 0.99) and f"{slope}" in verdict(slope, 0.99)
    smooth, rough, head = verdict(-1, 0.99), verdict(-1, 0.2), verdict(-1, None, of_head=True)
    assert all("do not act" in text for text in (smooth, rough, head))
    assert "estimator unrolled" in smooth and "estimator" not in rough and "smoother" in rough
    assert "share" in head and "smooth" not in head and "estimator" not in head


@pytest.mark.parametrize(
    ("moves", "gain"), [([0.02, 0.15], False), ([-0.15, 0.02], False), ([0.02, -0.05], True)]
)
def test_a_gain_is_more_than_any_random_removal_moves(moves: list[float], gain: bool) -> None:
    """Up or down; leaving rows out by score lowers the loss by a tenth."""
    random = [{"loss": 1 + move} for move in moves]
    removal = Removal(3, {"loss": 1.0}, {"loss": 0.9}, {"loss": 1.0}, random)
    assert ("no gain" in removal.verdict) != gain


@pytest.mark.parametrize(
    ("retrainings", "share", "named"),
    [(4, 0.1, "retrainings"), (6, 0.0, "share"), (6, 1.0, "share")],
)
def test_bad_arguments_are_named(retrainings: int, share: float, named: str) -> None:
    with pytest.raises(ProblemError, match=named):
        scored().check(retrainings, share=share)
