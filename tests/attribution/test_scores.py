"""Scores against central differences of retraining, in float64."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperopt_peft import NonFiniteError, Problem, ProblemError, attribute
from hyperopt_peft.attribution import Attribution
from hyperopt_peft.hypergradients.unrolled.reverse import Unrolled
from tests.support.attributed import ROWS, STEPS, error, error_of_slopes, levels, scored, setup_of

OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
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


def test_slices_are_those_of_one_run() -> None:
    """Each as on its own, and the whole is their mean."""
    lower, weights, first = levels()
    several: Any = {"a": first, "b": [lambda: lower.variables[0].square().sum(), first]}
    result = scored((lower, weights, several))
    assert error(result.by_slice["a"], scored(levels()).scores) < 1e-12
    assert torch.allclose(result.scores, (result.by_slice["a"] + result.by_slice["b"]) / 2)
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


def test_a_removal_is_the_training_without_the_rows() -> None:
    lower, ones, phi = levels()
    result = scored((lower, ones, phi))
    removal = result.removal(0.2, phi, draws=2)
    setup, weights = setup_of(result), torch.ones(ROWS, dtype=torch.float64)
    weights[result.scores.argsort(descending=True)[: removal.count]] = 0
    with setup.run.repeated(weights):
        assert removal.without["loss"] == pytest.approx(float(phi()), rel=1e-12)
    assert removal.plain["loss"] == pytest.approx(result.values["all"], rel=1e-12)
    assert len(removal.random) == 2


LEAF = torch.ones(ROWS, requires_grad=True)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"estimator": "darts"}, "estimator"),
    ({"estimator": "gradient:prodct=exact"}, "prodct"),
    ({"training_steps": None}, "training_steps"),
    ({"training_steps": 0}, "training_steps"),
    ({"memory_limit": 1e-9}, "memory_limit"),
    ({"slices": "kind"}, "slices"),
    ({"model": "head"}, "model"),
    ({"row_weights": torch.ones(ROWS)}, "row_weights"),
    ({"row_weights": LEAF}, "the loss does not read the row weights"),
    ({"evaluation": None}, "evaluation"),
    ({"evaluation": {}}, "evaluation"),
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
    result = Attribution(scores, {"all": scores}, scores, {}, {})
    assert torch.allclose(result.weights(), torch.tensor([2.0, 1.0, 0.0, 1.0]).double())
    assert result.without(0.25) == [0, 1, 3]
    same = torch.ones(3, dtype=torch.float64)
    assert torch.equal(Attribution(same, {"all": same}, same, {}, {}).weights(), same)


def test_a_column_of_the_data_is_not_overwritten(tmp_path: Path) -> None:
    scores = torch.tensor([0.5, -1.0, float("nan")], dtype=torch.float64)
    columns = {"text": ["a", "b", "c"], "score": [3, 4, 5]}
    losses = torch.ones(3, dtype=torch.float64)
    result = Attribution(scores, {"all": scores}, losses, {"all": 0.0}, {}, columns)
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
