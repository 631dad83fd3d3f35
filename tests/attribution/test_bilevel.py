"""Scores of rows at both levels of a bilevel run, against retraining in float64."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import concatenate_datasets
from torch import Tensor

from hyperopt_peft import (
    BiDoRA,
    BilevelTrainer,
    BilevelTrainingArguments,
    Method,
    ProblemError,
    attribute,
)
from hyperopt_peft.attribution.rows import TrainerData
from hyperopt_peft.core.task_level import TaskLevel
from hyperopt_peft.problems import DoRA, LayerScales
from hyperopt_peft.trainer.tags import INDEX
from hyperopt_peft.utils.models import trainable
from tests.support.attributed import ROWS, error, error_of_slopes, ones, require_equal, setup_of
from tests.support.attributed_bilevel import STEPS, engine, evaluation_of
from tests.support.methods import ARGUMENTS, RowWeights
from tests.support.trainers import data, peft_model


@pytest.mark.parametrize("memory_limit", [1.0, 8e-6])
def test_scores_are_slopes_of_the_engines_runs(memory_limit: float) -> None:
    """Momentum, schedules, clipping and dropout at both levels; by `Engine.run` itself."""
    weights = ones()
    levels = engine(weights)
    options: Any = {"training_steps": STEPS, "memory_limit": memory_limit, "progress": False}
    result = attribute(levels, weights, evaluation_of(levels), **options)
    assert (setup_of(result).run.checkpoints.every > 1) == (memory_limit < 1)
    plain = engine(ones())
    plain.run(STEPS)
    for mine, theirs in ((levels.lower, plain.lower), (levels.upper, plain.upper)):
        assert all(map(torch.equal, mine.variables, theirs.variables))
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
    assert error(result.scores, torch.tensor(slopes, dtype=torch.float64)) < 1e-6


def test_estimators_without_a_known_derivative_are_refused() -> None:
    weights = ones()
    cases = [("darts", "unrolled", "darts is not known"), ("direct", "minres", "choose unrolled")]
    for hypergradient, estimator, named in cases:
        levels = engine(weights, hypergradient)
        with pytest.raises(ProblemError, match=named):
            attribute(levels, weights, evaluation_of(levels), training_steps=2, estimator=estimator)
    levels = engine(weights)
    levels.run(1)
    with pytest.raises(ProblemError, match="every step"):
        attribute(levels, weights, evaluation_of(levels), training_steps=2)


@dataclass
class Head(Method):
    """The head above; below a loss by the rows' numbers, and again on some of the rows."""

    tags = ("index",)

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        return {name: p for name, p in trainable(model) if "classifier" in name}

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        return task_loss(batch) * (1 + batch["index"].double().mean() / 12)

    def all_rows(self, train: Any, upper: Any) -> Any:
        return train.select(range(0, 12, 2))


def trained(
    folder: Path, method: Method, *, apart: bool = False, train_dataset: Any = None, **options: Any
) -> BilevelTrainer:
    """In float64: dropout, accumulation, clipping, warm-up and decay, on 12 rows."""
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
    args = BilevelTrainingArguments(str(folder), **{**ARGUMENTS, **settings, **options})
    sets = {"train_dataset": train_dataset or data(rows=12), "eval_dataset": data(rows=6, seed=1)}
    if apart:
        sets |= {"train_dataset": data(rows=9), "upper_dataset": data(rows=3, seed=5)}
    model = peft_model(r=2, dora=isinstance(method, BiDoRA | DoRA)).double()
    return BilevelTrainer(model, args, method=method, **sets)


def test_copies_of_a_row_have_their_own_numbers(tmp_path: Path) -> None:
    """Where they are told apart by a column that the model does not read."""
    ids = iter(range(24))
    rows = concatenate_datasets(
        [data(rows=12).add_column("idx", [next(ids) for _ in range(12)]) for _ in range(2)]
    )
    trainer = trained(tmp_path, BiDoRA(), train_dataset=rows)
    read = TrainerData(trainer, None, None)
    numbers = [level[INDEX][:] for level in read.of_levels]
    assert sorted([*numbers[0], *numbers[1]]) == [*range(24)]
    assert not {k % 12 for k in numbers[0]} & {k % 12 for k in numbers[1]}
    for level in read.of_levels:
        assert all(row["input_ids"] == rows[row[INDEX]]["input_ids"] for row in level)


CASES = [
    (BiDoRA(gamma=0.1), "none", False),
    (BiDoRA(gamma=0.1), "warm", True),
    (BiDoRA(gamma=0.1), "scratch", False),
    (Head(), "warm", False),
]


@pytest.mark.parametrize(("method", "retrain", "apart"), CASES)
def test_scores_of_a_method_are_slopes_of_retraining(
    tmp_path: Path, method: Method, retrain: str, apart: bool
) -> None:
    """Rows of both levels, in the user's order, and both phases; the run is the trainer's own."""
    plain = trained(tmp_path / "plain", method, apart=apart, retrain=retrain)
    plain.train()
    trainer = trained(tmp_path / "watched", method, apart=apart, retrain=retrain)
    result = attribute(trainer, progress=False)
    require_equal(trainer.model, plain.model, 1e-9)
    assert error_of_slopes(result) < 1e-6
    assert result.scores.shape == (12,) and bool((result.scores != 0).all())


def with_levels(folder: Path) -> BilevelTrainer:
    """A trainer of two levels without a method."""
    model = peft_model()
    halves = [list(model.named_parameters())[k::2] for k in range(2)]
    lower, upper = ([(n, p) for n, p in half if p.requires_grad] for half in halves)
    return BilevelTrainer(
        model,
        lower=lambda t: TaskLevel(model, lower, task_loss=t.task_loss),
        upper=lambda t: TaskLevel(model, upper, task_loss=t.task_loss),
        args=BilevelTrainingArguments(str(folder), **{**ARGUMENTS, "hypergradient": "direct"}),
        train_dataset=data(rows=24),
        eval_dataset=data(rows=6, seed=1),
    )


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (with_levels, "an Engine"),
        (lambda folder: trained(folder, DoRA()), "use_fast_dora"),  # PEFT's norm
        (lambda folder: trained(folder, LayerScales()), "LayerScales.finish"),
        (lambda folder: trained(folder, RowWeights()), "does not read the row weights"),
    ],
)
def test_other_trainers_are_refused(tmp_path: Path, make: Any, named: str) -> None:
    with pytest.raises(ProblemError, match=named):
        attribute(make(tmp_path), progress=False)
