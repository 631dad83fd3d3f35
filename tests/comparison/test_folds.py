"""Folds of trusted rows: what scores a run has not trained it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import pytest
from datasets import Dataset
from sklearn.model_selection import KFold

from hyperopt_peft import Method
from hyperopt_peft.comparison.folds import Rows
from hyperopt_peft.problems import LoRA
from hyperopt_peft.trainer.splits import folds_of
from tests.support.comparisons import compared
from tests.support.trainers import data

TRUSTED = Dataset.from_dict({"x": range(11)})
TRAIN = Dataset.from_dict({"x": [100, 101]})
SEEN: list[set[str]] = []
FOLDS: dict[str, Any] = {"test_dataset": None, "folds": 2}
NINE = data(rows=9, seed=7)


@dataclass
class Recording(Method):
    """Notes the rows that train each run."""

    def all_rows(self, train: Any, upper: Any) -> Any:
        rows = super().all_rows(train, upper)
        SEEN.append(set(map(str, rows["input_ids"])))
        return rows


@pytest.mark.parametrize("copies", [0, 5])
def test_a_division_scores_each_row_once(copies: int) -> None:
    """A row that comes twice is in one fold; a seed chooses on none of the rows that score it."""
    table = TRUSTED.add_column("y", [0] * 11).select([*range(11), *range(copies)])
    rows = Rows(TRAIN, table, folds=3)
    every = sorted(table["x"])
    scored: list[list[int]] = []
    for seed in range(6):
        train, upper, test = rows.of(seed)
        assert train is TRAIN and sorted([*upper["x"], *test["x"]]) == every
        assert {*upper["x"]}.isdisjoint(test["x"])
        scored.append(test["x"][:])
        _, rest, held_out = rows.of(seed, 1)
        assert sorted([*rest["x"], *held_out["x"]]) == sorted(upper["x"])
    first, second = ([*chain(*part)] for part in (scored[:3], scored[3:]))
    assert sorted(first) == sorted(second) == every and scored[:3] != scored[3:]


def test_folds_are_those_of_cross_validation() -> None:
    """And of the different rows, where some come twice."""
    for count, seed in ((2, 0), (3, 1), (11, 2)):
        known = KFold(count, shuffle=True, random_state=seed).split(range(11))
        assert folds_of(range(11), count, seed) == (single := [rows.tolist() for _, rows in known])
        both = folds_of([*range(11), *range(11)], count, seed)
        assert both == [[*fold, *(row + 11 for row in fold)] for fold in single]


def test_trusted_rows_choose_the_rates_where_there_are_test_rows() -> None:
    rows = Rows(TRAIN, TRUSTED, Dataset.from_dict({"x": [55]}), held_out=0.3)
    train, upper, test = rows.of(100, 0)
    assert train is TRAIN and len(test) == 4 and sorted([*upper["x"], *test["x"]]) == [*range(11)]
    assert rows.of(0)[1] is TRUSTED
    copies = Dataset.from_dict({"x": [*range(11)] * 2})
    _, upper, test = replace(rows, upper=copies).of(100, 1)
    assert {*upper["x"]}.isdisjoint(test["x"]) and len(upper) + len(test) == 22


def test_parts_of_the_test_rows() -> None:
    rows = Rows(TRAIN, None, TRUSTED, draws=[4, 7])
    assert sorted(x for seed in (4, 7) for x in rows.of(seed)[2]["x"]) == [*range(11)]


def test_each_seed_of_heads_draws_its_training_rows() -> None:
    """The same for every method, copies together, of the training and of the trusted rows."""
    table = Dataset.from_dict({"x": [*range(40), *range(40)]})
    rows = Rows(table, TRUSTED, TRUSTED, draws=[4, 7], held_out=0.25)
    (one, trusted, _), (other, *_), (again, *_) = (rows.of(seed, False) for seed in (4, 7, 4))
    assert one["x"][:] == again["x"][:] and {*one["x"]} != {*other["x"]}
    assert len({*one["x"]}) == 30 and len(one) == 60 and len(trusted) == 8


def test_no_run_trains_on_the_rows_that_score_it() -> None:
    """By the rows of each training: a seed leaves its fold out, and a part of the others too."""
    options = {**FOLDS, "upper_dataset": NINE, "rates": (3e-2, 6e-2)}  # with development runs
    SEEN.clear()
    comparison = compared({"mine": Recording(), "LoRA": LoRA()}, seeds=None, **options)
    assert comparison.plan.seeds == [0, 1] and comparison.plan.metric == "accuracy"
    all_rows = set(map(str, NINE["input_ids"]))
    left_out = [frozenset(all_rows - seen) for seen in SEEN]
    folds = [x for x in {*left_out} if not any(other < x for other in left_out)]
    assert sorted(map(len, folds)) == [4, 5] and frozenset.union(*folds) == all_rows
    assert all(any(fold <= rows for fold in folds) for rows in left_out)
