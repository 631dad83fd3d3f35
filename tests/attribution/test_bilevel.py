"""Scores of rows at both levels of a bilevel run, against retraining in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hyperopt_peft import (
    BiDoRA,
    BilevelTrainer,
    BilevelTrainingArguments,
    ProblemError,
    attribute,
)
from hyperopt_peft.problems import DoRA
from hyperopt_peft.problems.common import TaskLevel
from tests.support.attributed import differences, setup_of
from tests.support.attributed_bilevel import ROWS, STEPS, engine, evaluation_of, ones
from tests.support.methods import ARGUMENTS
from tests.support.trainers import arguments, data, peft_model, values


def close(scores: Tensor, truth: Tensor, tolerance: float = 1e-6) -> bool:
    return float((scores - truth).norm() / truth.norm()) < tolerance


@pytest.mark.parametrize("memory_limit", [1.0, 8e-6])
def test_scores_are_slopes_of_the_engines_runs(memory_limit: float) -> None:
    """Momentum, schedules, clipping and dropout at both levels; by `Engine.run` itself."""
    weights = ones()
    levels = engine(weights)
    options = {"training_steps": STEPS, "memory_limit": memory_limit, "progress": False}
    result = attribute(levels, weights, evaluation_of(levels), **options)  # type: ignore[arg-type]
    assert (setup_of(result).run.checkpoints.every > 1) == (memory_limit < 1)
    slopes = []
    for row in range(ROWS):
        ends = []
        for side in (1e-5, -1e-5):
            moved = ones()
            with torch.no_grad():
                moved[row] += side
            again = engine(moved)
            again.run(STEPS)
            ends.append(float(evaluation_of(again)()))
        slopes.append((ends[0] - ends[1]) / 2e-5)
    assert close(result.scores, torch.tensor(slopes, dtype=torch.float64))


def test_the_run_is_the_engines_own() -> None:
    weights = ones()
    levels = engine(weights)
    attribute(levels, weights, evaluation_of(levels), training_steps=STEPS, progress=False)
    plain = engine(ones())
    plain.run(STEPS)
    for mine, theirs in ((levels.lower, plain.lower), (levels.upper, plain.upper)):
        assert all(map(torch.equal, mine.variables, theirs.variables))


def test_estimators_without_a_known_derivative_are_refused() -> None:
    weights = ones()
    cases = [("darts", "unrolled", "darts is not known"), ("direct", "minres", "choose unrolled")]
    for hypergradient, estimator, named in cases:
        levels = engine(weights, hypergradient)
        with pytest.raises(ProblemError, match=named):
            attribute(levels, weights, evaluation_of(levels), training_steps=2, estimator=estimator)
    levels = engine(weights)
    levels.run(1)
    with pytest.raises(ProblemError, match="first step"):
        attribute(levels, weights, evaluation_of(levels), training_steps=2)


def bidora(folder: Path, *, apart: bool = False, **options: Any) -> BilevelTrainer:
    """BiDoRA in float64: dropout, accumulation, clipping, warm-up and decay, on 12 rows."""
    model = peft_model(r=2).double()
    settings = {
        "hypergradient": "direct",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_upper_batch_size": 2,
        "upper_fraction": 0.25,
        "max_grad_norm": 0.5,
        "upper_max_grad_norm": 0.1,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "retrain_arguments": {"max_steps": 3},
    }
    method = BiDoRA(gamma=options.pop("gamma", 0.0))
    args = BilevelTrainingArguments(str(folder), **{**ARGUMENTS, **settings, **options})
    sets = {"train_dataset": data(rows=12)}
    if apart:
        sets = {"train_dataset": data(rows=9), "upper_dataset": data(rows=3, seed=5)}
    return BilevelTrainer(model, args, method=method, eval_dataset=data(rows=6, seed=1), **sets)


@pytest.mark.parametrize(
    ("retrain", "apart"), [("none", False), ("warm", True), ("scratch", False)]
)
def test_scores_of_bidora_are_slopes_of_retraining(
    tmp_path: Path, retrain: str, apart: bool
) -> None:
    """Rows of both levels, in the user's order, and both phases."""
    trainer = bidora(tmp_path, apart=apart, retrain=retrain, gamma=0.1)
    result = attribute(trainer, progress=False)
    truth = differences(result)
    assert close(result.scores, truth)
    assert result.scores.shape == (12,) and bool((truth != 0).all())


@pytest.mark.parametrize("retrain", ["none", "warm", "scratch"])
def test_the_run_is_bidoras_own(tmp_path: Path, retrain: str) -> None:
    plain = bidora(tmp_path / "plain", retrain=retrain)
    plain.train()
    watched = bidora(tmp_path / "watched", retrain=retrain)
    result = attribute(watched, progress=False)
    for name, value in values(watched.model).items():
        assert torch.allclose(value, values(plain.model)[name], rtol=1e-9, atol=1e-12), name
    run = setup_of(result).run
    with run.repeated(run.row_weights):
        assert setup_of(result).evaluation.values()["all"] == pytest.approx(
            result.values["all"], rel=1e-9
        )


def test_leaving_rows_out_is_training_without_them(tmp_path: Path) -> None:
    """The scores' sum is the first-order change, whose error falls with the weights' square."""
    result = attribute(bidora(tmp_path, retrain="warm"), progress=False)
    setup, direction = setup_of(result), torch.linspace(-1, 1, 12, dtype=torch.float64)
    errors = []
    for length in (1e-2, 1e-3):
        with setup.run.repeated(setup.run.row_weights + length * direction):
            moved = setup.evaluation.values()["all"] - result.values["all"]
        errors.append(abs(moved - length * float(result.scores @ direction)))
    assert errors[1] < 0.05 * errors[0]


def test_a_control_has_one_level(tmp_path: Path) -> None:
    """Its norm is out of the gradient, as PEFT's is, so that one of LoRA is what has scores."""
    sets = {"train_dataset": data(), "eval_dataset": data(seed=1)}
    control = BilevelTrainer(peft_model(), arguments(tmp_path), method=DoRA(), **sets)
    with pytest.raises(ProblemError, match="use_fast_dora"):
        attribute(control, progress=False)


def test_other_trainers_of_two_levels_are_refused(tmp_path: Path) -> None:
    model = peft_model()
    halves = [list(model.named_parameters())[k::2] for k in range(2)]
    lower, upper = ([(n, p) for n, p in half if p.requires_grad] for half in halves)
    trainer = BilevelTrainer(
        model,
        lower=lambda t: TaskLevel(model, lower, task_loss=t.task_loss),
        upper=lambda t: TaskLevel(model, upper, task_loss=t.task_loss),
        args=BilevelTrainingArguments(
            str(tmp_path), hypergradient="direct", use_cpu=True, report_to="none"
        ),
        train_dataset=data(rows=24),
        eval_dataset=data(rows=6, seed=1),
    )
    with pytest.raises(ProblemError, match="an Engine"):
        attribute(trainer, progress=False)
