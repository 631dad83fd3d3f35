"""Several budgets, stopping points, and what choosing costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperopt_peft import Method, ProblemError
from hyperopt_peft.comparison import AcrossBudgets, Choice
from hyperopt_peft.comparison.choice import Plan
from hyperopt_peft.comparison.folds import Rows
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import Run, Task
from hyperopt_peft.problems import BiDoRA, LoRA
from tests.support.comparisons import METHODS, accuracy, compared, parts_of, passes_of
from tests.support.trainers import data


def task(methods: Any, arguments: Any = None) -> Task:
    rows = Rows(data(rows=30), None, data(rows=20, seed=5))
    options = {"compute_metrics": accuracy}
    return Task(methods, *parts_of("classes", arguments), rows, "loss", options=options)


def scores(curve: Any) -> dict[float, float]:
    return {mark: metrics["eval_loss"] for mark, metrics in curve}


@pytest.mark.parametrize("method", [LoRA(), BiDoRA()], ids=repr)
def test_scores_on_the_way_do_not_change_a_run(method: Method) -> None:
    """The passes of evaluations are beside the budget; a search has no score before it is done."""
    upper = 1e-2 if isinstance(method, BiDoRA) else None
    run = Run("m", "method", 0, 3e-2, upper, passes=24, split=0, marks=(24.0,))
    whole = task({"m": method})
    plain = whole.run(run)
    marked = whole.run(Run(**{**vars(run), "marks": (6.0, 12.0, 18.0, 24.0)}))
    assert plain["metrics"] == marked["metrics"] and passes_of(plain) == passes_of(marked)
    (_, end), *_ = reversed(marked["curve"])
    assert end == marked["metrics"] and len(plain["curve"]) == 1
    rows = len(whole.data.of(0, 0)[2])
    assert marked["spent"]["held-out scores"] == len(marked["curve"]) * rows / 4 / 3
    search = marked["spent"]["upper steps"] > 0
    assert all(mark > 12 for mark in scores(marked["curve"])) == search


def test_budgets_have_tables_and_a_figure(tmp_path: Path) -> None:
    options: dict[str, Any] = {"passes": np.array([8, 16]), "rates": [3e-2, 6e-2], "points": 2}
    found = compared({"LoRA": LoRA()}, **options)
    assert isinstance(found, AcrossBudgets) and [*found.comparisons] == [8, 16]
    assert [len(row) for row in found.table()] == [5, 5]
    assert len(found.plot(tmp_path / "budgets.png").axes) == 2
    joined = AcrossBudgets.of_tasks({"a": found, "b": found})
    assert "8, 16 passes a run" in str(joined) and "over 2 tasks" in str(joined)
    for each, lead in ((found, []), (joined, ["a"])):
        tables = each.tables()
        assert tables["Scores"][0][2] == "8 passes, stopped"
        (row, *_) = tables["Held-out score at every rate"][1:]
        assert row[: 2 + len(lead)] == ["8", *lead, "LoRA"]
    other = compared({"LoRA": LoRA()}, passes=[16])
    assert isinstance(other, AcrossBudgets)
    with pytest.raises(ProblemError, match="tasks: differ in their budgets"):
        AcrossBudgets.of_tasks({"a": other, "b": found})


def made_up(curves: dict[tuple[int, float, int], list[float]], **choice: Any) -> tuple[Plan, Store]:
    """A plan and the scores at both points of 100 passes by seed, rate and split."""
    rates = sorted({rate for _, rate, _ in curves})
    chosen = Choice(rates, splits=2, points=2, **choice)
    plan = Plan({"m": LoRA()}, chosen, [0, 1], "accuracy", False, 100)
    store, spent = Store(None, {}), {"lower steps": 100.0}
    for (seed, rate, split), values in curves.items():
        run = Run("m", "method", seed, rate, passes=100, split=split, marks=(50.0, 100.0))
        curve = [(50.0, {"eval_accuracy": values[0]}), (100.0, {"eval_accuracy": values[1]})]
        store.add({**vars(run), "curve": curve, "spent": spent})
    return plan, store


def test_each_seed_stops_where_its_held_out_score_was_best() -> None:
    """By the mean of its splits; the rate of a run that stops may be another one."""
    curves = {(0, 1e-3, k): [0.5, 0.7] for k in (0, 1)} | {(0, 1e-2, k): [0.9, 0.6] for k in (0, 1)}
    curves |= {(1, 1e-3, 0): [0.9, 0.3], (1, 1e-3, 1): [0.1, 0.9]}
    curves |= {(1, 1e-2, k): [0.2, 0.1] for k in (0, 1)}
    plan, store = made_up(curves)
    chosen = {
        (seed, stopped): plan.chosen(store, "m", "method", seed, stopped)
        for seed in (0, 1)
        for stopped in (False, True)
    }
    assert [chosen[0, x].rate for x in (False, True)] == [1e-3, 1e-2]
    assert [chosen[0, x].stop for x in (False, True)] == [None, 50]
    assert chosen[1, False] == chosen[1, True] and chosen[1, True].rate == 1e-3


def test_methods_share_a_store_of_budgets(tmp_path: Path) -> None:
    """A second call with a budget more does the runs of this budget alone."""
    options: dict[str, Any] = {"folder": tmp_path, "ablations": {}}
    first = compared(METHODS, passes=[8, 16], **options)
    again = compared(METHODS, passes=[8, 16, 24], **options)
    more = [x for x in again.results() if x not in first.results()]
    assert {x["passes"] for x in more} == {24} and len(more) == 4


def test_a_run_without_a_finite_score_does_not_stop() -> None:
    with pytest.raises(ProblemError, match="the score is nan"):
        compared({"LoRA": LoRA()}, rates=[1e30], points=2)


@given(st.floats(1e-3, 1e6), st.integers(1, 50))
def test_the_last_point_is_the_end(passes: float, points: int) -> None:
    plan = Plan({"m": LoRA()}, Choice([1e-3], points=points), [0], "loss", True, passes)
    run = Run("m", "method", 0, 1e-3, passes=passes)
    assert next(iter(plan.parts(run))).marks[-1] == passes
