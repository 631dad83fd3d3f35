"""Scores against central differences of retraining, in float64, and what `ScoreCheck` says."""

import csv
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperopt_peft import NonFiniteError, Problem, ProblemError, attribute
from hyperopt_peft.attribution import Attribution, ScoreCheck
from hyperopt_peft.attribution.check import rank_interval
from hyperopt_peft.hypergradients.unrolled.reverse import Unrolled
from tests.support.attributed import ROWS, STEPS, error, error_of_slopes, levels, scored, setup_of

OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.Adam, {"lr": 1e-2}),
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.5, "centered": True}),
    (torch.optim.Adagrad, {"lr": 1e-1}),
    (torch.optim.Adadelta, {"lr": 1.0}),
    (torch.optim.Adamax, {"lr": 1e-2}),
    (torch.optim.RAdam, {"lr": 1e-2}),
]


@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_whole_run_is_differentiated(
    optimizer: Any, options: dict[str, Any], clip: float | None
) -> None:
    """Dropout masks, momentum, a schedule and clipping included."""
    result = scored(levels(optimizer, clip=clip, scheduled=True, **options))
    assert error_of_slopes(result) < 1e-6


def test_checkpoints_change_the_memory_and_no_score() -> None:
    """Passes are four trainings: one, the repetition between checkpoints, and two a step."""
    every, some = (scored(levels(), memory_limit=limit) for limit in (1.0, 1e-5))
    assert setup_of(every).run.checkpoints.every == 1 < setup_of(some).run.checkpoints.every
    assert error(some.scores, every.scores) < 1e-12
    for settings in (every.settings, some.settings):
        assert settings["gradients"] + settings["products"] + STEPS <= 4 * STEPS + 1


def test_a_loss_in_parts_is_their_sum() -> None:
    lower, weights, first = levels()
    result = scored((lower, weights, [lambda: lower.variables[0].square().sum(), first]))
    assert error_of_slopes(result) < 1e-6


def test_truncation_and_first_order_products() -> None:
    exact = scored(levels()).scores
    last = scored(levels(), estimator=Unrolled(steps=STEPS)).scores
    short = scored(levels(), estimator="unrolled:steps=5").scores
    difference = scored(levels(), estimator="unrolled:product=difference").scores
    assert error(last, exact) < 1e-12
    assert error(short, exact) > 0.1
    assert error(difference, exact) < 1e-4


@pytest.mark.parametrize("estimator", ["minres:steps=50", "cg:steps=50", "gradient"])
def test_a_method_of_the_end_is_the_influence_function(estimator: str) -> None:
    """−∂²f/∂v∂w H⁻¹ ∂Φ/∂w with H of the mean loss, and for ``gradient`` the identity."""
    torch.manual_seed(0)
    x, y = torch.randn(ROWS, 3, dtype=torch.float64), torch.randn(ROWS, dtype=torch.float64)
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    v = torch.ones(ROWS, dtype=torch.float64, requires_grad=True)

    class Ridge(Problem):
        def loss(self, rows: Tensor) -> Tensor:
            return (v[rows] * (x[rows] @ w - y[rows]).square()).mean()

    lower = Ridge([w], data=list(torch.arange(ROWS).split(4)), optimizer=torch.optim.SGD([w], 0.1))
    options = {"training_steps": 20, "estimator": estimator}
    result = scored((lower, v, lambda: (w.sum() - 1).square()), **options)
    end, hessian = w.detach(), 2 / ROWS * x.T @ x
    rows, b = 2 / ROWS * (x @ end - y)[:, None] * x, 2 * (end.sum() - 1) * torch.ones_like(end)
    solution = b if estimator == "gradient" else torch.linalg.solve(hessian, b)
    assert error(result.scores, -rows @ solution) < 1e-6


def test_unseen_rows_have_no_score() -> None:
    result = scored(levels(rows=10))
    assert result.scores[10:].isnan().all() and result.scores[:10].isfinite().all()
    assert result.settings["unseen"] == 2 and (result.ranks()[10:] == 0).all()


LEAF = torch.ones(ROWS, requires_grad=True)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"estimator": "darts"}, "estimator"),
    ({"estimator": "gradient:prodct=exact"}, "prodct"),
    ({"training_steps": None}, "training_steps"),
    ({"training_steps": 0}, "training_steps"),
    ({"memory_limit": 1e-9}, "memory_limit"),
    ({"model": "head"}, "model"),
    ({"row_weights": torch.ones(ROWS)}, "row_weights"),
    ({"row_weights": LEAF}, "the loss does not read the row weights"),
    ({"evaluation": None}, "evaluation"),
    ({"evaluation": []}, "evaluation"),
    ({"training": levels(torch.optim.Rprop)[0]}, "Rprop"),
]


@pytest.mark.parametrize(("change", "fragment"), BAD)
def test_bad_arguments_are_named(change: dict[str, Any], fragment: str) -> None:
    lower, weights, phi = levels()
    arguments = {"training": lower, "row_weights": weights, "evaluation": phi}
    with pytest.raises(ProblemError, match=fragment):
        attribute(**arguments | {"training_steps": STEPS, "progress": False} | change)


def test_a_run_that_diverges_is_named() -> None:
    with pytest.raises(NonFiniteError, match="loss is"):
        scored(levels(torch.optim.SGD, lr=1e300))


def test_weights_and_rows_to_keep_follow_the_scores() -> None:
    """Weights of mean 1, also of scores that all hurt."""
    scores = torch.tensor([1.0, 1.01, 1.02, torch.nan], dtype=torch.float64)
    result = Attribution(scores, scores, 0.0, {})
    assert torch.allclose(result.weights(), torch.tensor([2.0, 1.0, 0.0, 1.0]).double())
    assert result.without(0.25) == [0, 1, 3]
    same = torch.ones(3, dtype=torch.float64)
    assert torch.equal(Attribution(same, same, 0.0, {}).weights(), same)


def test_a_column_of_the_data_is_not_overwritten(tmp_path: Path) -> None:
    scores = torch.tensor([0.5, -1.0, float("nan")], dtype=torch.float64)
    columns = {"text": ["a", "b", "c"], "score": [3, 4, 5]}
    losses = torch.ones(3, dtype=torch.float64)
    result = Attribution(scores, losses, 0.0, {}, columns)
    result.numbers = [2, 7, 9]
    result.to_csv(tmp_path / "attribution.csv", {"suspect": [0, 1, 0]})
    with (tmp_path / "attribution.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["row"] for line in table] == ["2", "7", "9"]
    assert [line["data_score"] for line in table] == ["3", "4", "5"]
    assert [line["score"] for line in table] == ["0.5", "-1.0", "nan"]
    assert [line["rank"] for line in table] == ["1", "2", "0"]
    assert [line["suspect"] for line in table] == ["0", "1", "0"]
    assert "7  b | 4" in result.table()


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
    result.scores = -result.scores
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


@pytest.mark.parametrize(
    ("retrainings", "share", "named"),
    [(4, 0.1, "retrainings"), (6, 0.0, "share"), (6, 1.0, "share")],
)
def test_bad_arguments_of_a_check_are_named(retrainings: int, share: float, named: str) -> None:
    with pytest.raises(ProblemError, match=named):
        scored().check(retrainings, share=share)
