"""Scores on a head: the derivative of its minimum, and what they predict of other minima."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Value

from hyperopt_peft import ProblemError, attribute, why
from hyperopt_peft.attribution.check import check_scores
from hyperopt_peft.attribution.scores import (
    HEAD_ESTIMATOR,
    Evaluation,
    Trained,
    parse_estimator,
    scores,
)
from tests.support.attributed import error_of_slopes, require_equal
from tests.support.heads import features, fitted, trainer
from tests.support.trainers import data, ragged


@pytest.mark.parametrize("kind", ["classes", "soft", "regression", "tokens"])
def test_scores_are_slopes_of_the_minimum(tmp_path: Path, kind: str) -> None:
    """Of tokens a row has a score, whatever the number of its tags."""
    rows = ragged(kind, 14) if kind == "tokens" else data(kind, 14)
    result = attribute(trainer(tmp_path, kind, train_dataset=rows), model="head", progress=False)
    assert error_of_slopes(result, 1e-2) < 1e-3
    assert result.settings["residual"] < 1e-6
    if kind == "soft":  # the binary cross entropy that the model itself has, below that of 1/2
        assert 0.2 < result.value < 0.8


@pytest.mark.parametrize("problem_type", [None, "regression"])
@pytest.mark.parametrize("model", ["head", "adapter"])
def test_ratings_are_numbers_whatever_their_type(
    tmp_path: Path, problem_type: str | None, model: Any
) -> None:
    """Integers that the model is to predict, as floating-point numbers are."""
    found = []
    for kind in ("int64", "float32"):

        def rows(count: int, seed: int, kind: str = kind) -> Any:
            numbers = [row % 5 for row in range(count)]
            without = data("regression", count, seed).remove_columns("labels")
            return without.add_column("labels", numbers, feature=Value(kind))

        train, above = rows(14, 0), rows(7, 1)
        watched = trainer(tmp_path, "regression", train_dataset=train, eval_dataset=above)
        watched.model.get_base_model().config.problem_type = problem_type
        watched.args.max_steps = 3
        with pytest.raises(ProblemError, match="these labels are numbers"):
            why(watched)
        found.append(attribute(watched, model=model, progress=False))
        with pytest.raises(ProblemError, match="suspects: needs a Trainer of a classifier"):
            found[-1].suspects()
    torch.testing.assert_close(found[0].scores, found[1].scores)
    assert found[0].value == pytest.approx(found[1].value)


def test_scores_predict_other_minima() -> None:
    """LDS from .98, and a slope of about 1, without 5 % of 300 rows."""
    training, above = fitted(features(300)), features(100, seed=1).batch()
    phi = Evaluation(training.weights, training.on_rows.mean([above]))
    rows = training.features.batch()
    setup = Trained(training, phi, training.level, lambda: rows)
    estimator = parse_estimator(HEAD_ESTIMATOR)
    by_row, _ = scores(setup, estimator)
    check = check_scores(setup, estimator, by_row, phi.value(), 20, 0.05, None, 0)
    assert check.lds > 0.98 and check.trustworthy and check.of_head


def test_the_trainer_and_its_model_stay(tmp_path: Path) -> None:
    """And everything that a user does with scores works, a second call included."""
    unchanged, watched = trainer(tmp_path), trainer(tmp_path)
    rows = data(rows=7, seed=1)
    options: dict[str, Any] = {"model": "head", "progress": False}
    result = attribute(watched, evaluation=rows, **options)
    assert result.losses.shape == (14,)
    assert result.suspects(folds=2).probabilities.sum(1).allclose(torch.ones(14).double())
    result.to_csv(tmp_path / "attribution.csv")
    again = attribute(watched, evaluation=rows, **options)
    assert torch.allclose(again.scores, result.scores)
    require_equal(watched.model, unchanged.model, 0.0)
    assert watched.state.global_step == 0


def test_a_column_index_of_the_user_stays_apart(tmp_path: Path) -> None:
    """It is not read, or refused where the user's collator may read it."""
    rows, found = data(rows=14), []
    for train in (rows, rows.add_column("index", range(100, 114))):
        watched = trainer(tmp_path, train_dataset=train)
        found.append(attribute(watched, model="head", progress=False).scores)
    assert torch.equal(*found)
    watched.args.remove_unused_columns = False
    with pytest.raises(ProblemError, match="index: this name is reserved for row numbers"):
        attribute(watched, model="head")
