"""Which rows train a run and which score it: folds, rows of each seed, and shares for heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from sklearn.model_selection import KFold

from hyperopt_peft import Method, ProblemError
from hyperopt_peft.comparison.rows import Drawn, Rows
from hyperopt_peft.problems import LoRA
from hyperopt_peft.trainer.splits import folds_of
from tests.support.comparisons import compared
from tests.support.trainers import data

TRUSTED = Dataset.from_dict({"x": range(11)})
TRAIN = Dataset.from_dict({"x": [100, 101]})
SEEN: list[set[str]] = []
FOLDS: dict[str, Any] = {"test_dataset": None, "folds": 2}
NINE = data(rows=9, seed=7)


def made(train: Any, upper: Any, test: Any, seeds: Any = (4, 7), **options: Any) -> Rows:
    tables = {"train_dataset": train, "upper_dataset": upper, "test_dataset": test}
    return Rows.made(tables, [*seeds], **options)[0]


def table(*numbers: int) -> Dataset:
    return Dataset.from_dict({"x": numbers})


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
    trusted = TRUSTED.add_column("y", [0] * 11).select([*range(11), *range(copies)])
    rows = made(TRAIN, trusted, None, range(6), folds=3)
    every = sorted(trusted["x"])
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


def test_each_seed_of_heads_draws_its_training_rows() -> None:
    """The same for every method, copies together, of the training and of the trusted rows."""
    rows = made(table(*range(40), *range(40)), TRUSTED, table(99), solved=True, held_out=0.25)
    (one, trusted, _), (other, *_), (again, *_) = (rows.of(seed) for seed in (4, 7, 4))
    assert one["x"][:] == again["x"][:] and {*one["x"]} != {*other["x"]}
    assert len({*one["x"]}) == 30 and len(one) == 60 and len(trusted) == 8
    assert made(lambda seed: table(seed), TRUSTED, table(99), solved=True).of(4)[1] is TRUSTED


def test_a_function_of_the_seed_gives_the_rows_of_the_seed() -> None:
    """And a test row of a seed may train another one."""
    pool = [*range(12)]
    train = lambda seed: table(*pool[seed:], *pool[: seed - 4])  # noqa: E731
    test = lambda seed: table(*pool[seed - 4 : seed], pool[seed])  # noqa: E731
    rows = made(train, lambda seed: table(50 + seed, 60), test)
    for seed in (4, 7):
        found = [each["x"][:] for each in rows.of(seed)]
        assert found == [train(seed)["x"][:], [50 + seed, 60], pool[seed - 4 : seed]]
        _, rest, held_out = rows.of(seed, 0)
        assert {*rest["x"], *held_out["x"]} == {50 + seed, 60}
    assert isinstance(rows.test, Drawn) and rows.scoring == 4
    # What all seeds score has trained none of them.
    assert sorted(made(train, None, table(8, 50, 51)).of(4)[2]["x"]) == [50, 51]


@pytest.mark.parametrize(
    ("tables", "options", "message"),
    [
        ((lambda seed: None, None, TRUSTED), {}, r"train_dataset\(4\)"),
        ((lambda seed: [1, 2], None, TRUSTED), {}, r"train_dataset\(4\).*list"),
        ((lambda seed: table(), None, TRUSTED), {}, r"train_dataset\(4\).*no"),
        ((lambda seed: Dataset.from_dict({f"x{seed}": [1]}), None, TRUSTED), {}, "train_dataset"),
        ((TRAIN, lambda seed: table(*range(seed - 3)), TRUSTED), {}, "upper_dataset: one trusted"),
        ((TRAIN, lambda seed: TRUSTED, None), {"folds": 2}, "upper_dataset: folds divide"),
        ((lambda seed: table(seed), None, lambda seed: table(seed)), {}, "all of its rows"),
        ((lambda seed: table(seed), None, table(4, 7)), {}, "all of its rows"),
    ],
)
def test_bad_rows_are_refused(tables: Any, options: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        made(*tables, **options)


def test_each_seed_trains_on_and_is_scored_by_its_rows(tmp_path: Path) -> None:
    """A stored run is found by the rows of its seed, whatever the function is called."""
    every = data(rows=60)
    half = lambda seed: every.select(range(seed, 60, 2))  # noqa: E731
    methods = {"mine": Recording(), "LoRA": LoRA()}
    SEEN.clear()
    first = compared(methods, train_dataset=half, folder=tmp_path)
    expected = [set(map(str, half(seed)["input_ids"])) for seed in (0, 1)]
    assert all(seen in expected for seen in SEEN) and all(rows in SEEN for rows in expected)
    assert "2 draws × test rows" in first.heading()
    SEEN.clear()
    again = compared(methods, train_dataset=lambda seed: half(seed), folder=tmp_path)
    assert len(SEEN) <= 1 and again.scores().equals(first.scores())
    swapped = compared(methods, train_dataset=lambda seed: half(1 - seed), folder=tmp_path)
    assert not swapped.scores().equals(first.scores())
    assert "train_dataset" in swapped.store.remark()
    own = lambda seed: data(rows=20, seed=5 + seed)  # noqa: E731
    scored = compared(methods, train_dataset=half, test_dataset=own)
    assert "20 test rows" in scored.heading() and "2 draws of rows;" in scored.heading()
    assert not scored.over_rows and "not known without" not in str(scored)


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
