"""`compare_methods` on input that gives no answer, or one beside which something is to be said."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from hyperopt_peft import Method, ProblemError, compare_methods
from hyperopt_peft.comparison import Runs
from hyperopt_peft.comparison.choice import Choice, Plan
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.problems import SEAL, LoRA
from tests.support.comparisons import accuracy, compared, parts_of
from tests.support.trainers import base_model, data

ONE = {"LoRA": LoRA()}
TEST = data(rows=20, seed=5)
FOLDS: dict[str, Any] = {"test_dataset": None, "folds": 2}
BEST = {"load_best_model_at_end": True}
#: The same rows with other numbers, which no model reads.
IDS, MOVED = (data(rows=30).add_column("idx", [*range(k, k + 30)]) for k in (0, 100))


@dataclass
class Fragile(Method):
    """Its loss is NaN once a parameter is above ``limit``."""

    limit: float = 10.0

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        largest = max(p.detach().abs().max() for p in model.parameters() if p.requires_grad)
        return task_loss(batch) * (math.nan if largest > self.limit else 1.0)


class Breaking(Method):
    """Its loss is NaN from the sixth step on."""

    steps = 0

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        self.steps += 1
        return task_loss(batch) * (math.nan if self.steps > 5 else 1.0)


def locked(outputs: Any, lock: Any) -> dict[str, float]:
    return accuracy(outputs)


def undefined(outputs: Any) -> dict[str, float]:
    return {"accuracy": math.nan}


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ({"m": Fragile(0.0)}, {"rates": (3e-2, 6e-2)}, "m: no rate has a finite score; give lower"),
        ({"m": Breaking()}, {}, "m, seed 0, rate 0.06: the score is nan"),
        (ONE, {"compute_metrics": undefined}, "LoRA, seed 0, rate 0.06: the score is nan"),
        (ONE, {"seeds": [0]}, "one seed has no interval"),
        (ONE, {"rates": [0.0]}, "rates: must be positive"),
        (ONE, {"points": 0}, "points: must be 1 or more"),
        ({}, {}, "methods: there is none"),
        (ONE, {"ablations": {"LoRA": ["frozen"]}}, "ablations: 'LoRA' has no frozen"),
        ({"m": SEAL()}, {"ablations": {"m": ["one level"]}}, "'m' has no one level; there are .*m"),
        (ONE, {"test_dataset": data(rows=30)}, "all of its rows are training rows"),
        (ONE, {"folds": 2}, "give either test_dataset or folds"),
        (ONE, {"test_dataset": None}, "give either test_dataset or folds"),
        (ONE, {**FOLDS}, "upper_dataset: there is none"),
        (ONE, {**FOLDS, "folds": 10, "upper_dataset": data(rows=9)}, "give 2 to 9"),
        (ONE, {**FOLDS, "upper_dataset": data(rows=9)}, "row 0 .* in train_dataset"),
        (ONE, {"upper_dataset": data(rows=20, seed=5)}, "all of its rows are training rows"),
        (ONE, {"train_dataset": IDS, "test_dataset": MOVED.select([2, 7])}, "all .* training rows"),
        (ONE, {**FOLDS, "upper_dataset": MOVED, "train_dataset": IDS}, "row 0 .* train_dataset"),
        (ONE, {"passes": None}, "passes: must be .*got None"),
        (ONE, {"passes": math.nan}, "passes: must be .*got nan"),
        (ONE, {"passes": [8, 16]}, r"passes: must be .*got \[8, 16\]"),
        (ONE, {"jobs": 0}, "jobs: must be"),
        (ONE, {"arguments": {"dataloader_drop_last": True}}, "^dataloader_drop_last.* it out$"),
        (ONE, {"arguments": {"eval_strategy": "epoch"}}, "^eval_strategy.*leave it out$"),
        (ONE, {"arguments": {"retrain_arguments": BEST}}, "^retrain_arguments: load_.* it out$"),
        (ONE, {"test_dataset": TEST.select([])}, "test_dataset has no examples"),
        (ONE, {"test_dataset": TEST.to_list()}, "test_dataset: must be a datasets.Dataset"),
        (
            ONE,
            {"jobs": 2, "compute_metrics": partial(locked, lock=threading.Lock())},
            "jobs: .*cannot be pickled",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_line_in_place_of_a_table(methods: Any, options: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message) as error:
        compared(methods, **options)
    assert "\n" not in str(error.value)


def test_a_comparison_is_of_one_model(tmp_path: Path) -> None:
    model, (_, *others) = base_model(), parts_of("classes")
    rows = {"train_dataset": data(rows=30), "test_dataset": TEST, "passes": 12}
    for folder in (None, tmp_path):
        with pytest.raises(ProblemError, match="base_model: returns one model again"):
            compare_methods(ONE, lambda: model, *others, runs=Runs(folder), **rows)


def test_a_rate_at_which_a_loss_is_not_finite_is_the_worst() -> None:
    comparison = compared({"LoRA": LoRA(), "mine": Fragile()}, rates=(3e-2, 6e-2, 90.0))
    text = str(comparison)
    assert "mine: at the rate 90 a score is not finite" in text and "LoRA: at the rate" not in text
    assert {run["rate"] for run in comparison.reported("mine")} <= {3e-2, 6e-2}
    rates = comparison.rates().set_index(["method", "rate"])
    assert math.isnan(rates["mean"]["mine", 90]) and rates["seeds"]["mine", 90] == 0


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_a_score_that_is_not_finite_wins_in_no_order(lower_is_better: bool) -> None:
    choice = Choice((1.0, 2.0, 3.0, 4.0), splits=1)
    plan = Plan(ONE, choice, [0], "loss", lower_is_better)
    for scores in permutations((math.nan, -math.inf if lower_is_better else math.inf, 0.3, 0.4)):
        store, found = Store(None, {}), dict[float, float]()
        for run, score in zip(next(plan.stages(store)), scores, strict=True):
            store.add({**vars(run), "curve": [(0.0, {"eval_loss": score})]})
            found[run.rate] = score
        chosen = plan.chosen(store, "LoRA", "method", 0)
        assert found[chosen.rate] == (0.3 if lower_is_better else 0.4)
