"""Several budgets, stopping points, and what choosing costs."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperopt_peft import Method, ProblemError
from hyperopt_peft.comparison import AcrossBudgets, Choice
from hyperopt_peft.comparison.choice import Plan
from hyperopt_peft.comparison.folds import Rows
from hyperopt_peft.comparison.search import best_of, expected
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import Run, Task
from hyperopt_peft.problems import BiDoRA, LoRA
from tests.support.comparisons import METHODS, accuracy, compared, parts_of, passes_of
from tests.support.trainers import data

CONSTANT = {"lr_scheduler_type": "constant"}


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


def test_a_long_run_at_a_constant_rate_begins_as_a_short_one() -> None:
    whole = task({"m": LoRA()}, CONSTANT)
    run = Run("m", "method", 0, 3e-2, passes=24, split=0, marks=(8.0, 12.0, 24.0))
    curve = scores(whole.run(run)["curve"])
    for passes in (8.0, 12.0):
        short = whole.run(Run(**{**vars(run), "passes": passes, "marks": (passes,)}))
        assert scores(short["curve"]) == {passes: curve[passes]}
        stopped = whole.run(Run(**{**vars(run), "stop": passes}))
        assert stopped["metrics"] == short["metrics"] and passes_of(stopped) == passes_of(short)


def test_budgets_share_the_development_runs_that_contain_them(tmp_path: Path) -> None:
    """At a constant rate; learning rates that decay have runs of their own for each budget."""
    options: dict[str, Any] = {"passes": [8, 16], "rates": [3e-2, 6e-2], "points": 2}
    for arguments, searches in ((CONSTANT, 1), (None, 2)):
        found = compared({"LoRA": LoRA()}, arguments=arguments, **options)
        assert isinstance(found, AcrossBudgets) and [*found.comparisons] == [8, 16]
        of_choice = [x for x in found.results() if x["split"] is not None]
        assert len(of_choice) == searches * 2 * 2 * 2  # rates, seeds and splits
    assert [len(row) for row in found.table()] == [5, 5]
    assert len(found.plot(tmp_path / "budgets.png").axes) == 2
    joined = AcrossBudgets.of_tasks({"a": found, "b": found})
    assert "8, 16 passes a run" in str(joined) and "over 2 tasks" in str(joined)
    for each, lead in ((found, []), (joined, ["a"])):
        tables = each.tables()
        assert tables["Scores"][0][2] == "8 passes, stopped"
        (row, *_) = tables["The best of n rates"][1:]
        assert row[: 2 + len(lead)] == ["8", *lead, "LoRA"]


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


def test_upper_rates_are_tried_at_the_best_rate_of_each_seed() -> None:
    """Not at the middle one; so is the upper rate that is reported."""
    choice = Choice([1e-3, 1e-2, 1e-1], [1e-4, 1e-3, 1e-2], splits=1)
    plan = Plan({"m": BiDoRA()}, choice, [0, 1], "accuracy", False, 100, ablations={"m": []})
    best, store = {0: (1e-1, 1e-4), 1: (1e-3, 1e-2)}, Store(None, {})
    for number, stage in enumerate(plan.stages(store)):
        for run in stage:
            rate, upper_rate = best[run.seed]
            assert run.rate == rate or number == 0
            score = 0.5 * (run.rate == rate) + 0.3 * (run.upper_rate == upper_rate)
            curve = [(100.0, {"eval_accuracy": score})]
            store.add({**vars(run), "curve": curve, "spent": {"lower steps": 100.0}})
    assert {run.seed: (run.rate, run.upper_rate) for run in stage} == best


def test_a_second_training_stops_after_as_many_of_its_own_passes() -> None:
    """A reported run has more upper rows, so that its second training begins later."""
    plan, store = made_up({(seed, 1e-3, k): [0.9, 0.6] for seed in (0, 1) for k in (0, 1)})
    searched = {"lower steps": 20.0, "upper steps": 10.0, "second training": 70.0}
    for result in store.results.values():
        result["spent"] = searched
    assert plan.chosen(store, "m", "method", 0, True).stop == 50 - 30
    run = Run("m", "method", 0, 3e-2, 1e-2, passes=48)
    spent = task({"m": BiDoRA()}).run(run)["spent"]
    whole, search = spent["second training"], spent["lower steps"] + spent["upper steps"]
    stopped = task({"m": BiDoRA()}).run(Run(**{**vars(run), "stop": whole / 2}))["spent"]
    assert stopped["lower steps"] + stopped["upper steps"] == search > 0
    assert 0 < whole / 2 - 1 <= stopped["second training"] <= whole / 2


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-9, 9)), min_size=1, max_size=6, unique=True))
def test_the_best_of_n_is_a_mean_over_all_subsets(pairs: list[tuple[float, float]]) -> None:
    pairs = [*dict(pairs).items()]  # equal held-out scores have no order
    by, scored = ([*each] for each in zip(*pairs, strict=True))
    for n, value in enumerate(expected(by, scored), 1):
        best = [max(each)[1] for each in combinations(pairs, n)]
        assert value == pytest.approx(fmean(best))


def test_the_part_that_chooses_does_not_score() -> None:
    curves = {(seed, 1e-3, k): [0.0, [0.9, 0.5][k]] for seed in (0, 1) for k in (0, 1)}
    curves |= {(seed, 1e-2, k): [0.0, [0.6, 0.6][k]] for seed in (0, 1) for k in (0, 1)}
    plan, store = made_up(curves)
    one, two = best_of(plan, store, ["m"])
    assert one == (100, pytest.approx([0.65, 0.65]))  # all four scores
    # Part 0 chooses 0.001, which has 0.5 on part 1; part 1 chooses 0.01, 0.6 on part 0.
    assert two == (200, pytest.approx([0.55, 0.55]))


def test_methods_share_a_store_of_budgets(tmp_path: Path) -> None:
    """A second call with a budget more does the runs of this budget alone."""
    options: dict[str, Any] = {"folder": tmp_path, "ablations": {}}
    first = compared(METHODS, passes=[8, 16], **options)
    again = compared(METHODS, passes=[8, 16, 24], **options)
    more = [x for x in again.results() if x not in first.results()]
    assert {x["passes"] for x in more} == {24} and len(more) == 4


def test_a_contained_budget_costs_its_own_passes() -> None:
    """The run of 16 passes that scores 8 too counts with half of its passes at 8."""
    options: dict[str, Any] = {"passes": np.array([8, 16]), "rates": [3e-2, 6e-2]}
    found = compared({"LoRA": LoRA()}, arguments=CONSTANT, **options)
    assert isinstance(found, AcrossBudgets)
    short, long = (each.searched()[1:] for each in found.comparisons.values())
    assert [2 * float(x[2]) for x in short] == pytest.approx([float(x[2]) for x in long], abs=1)
    groups = AcrossBudgets.of_tasks({"a": found, "b": found}).last.searched({"both": ["LoRA"]})
    assert [row[:3] for row in groups[1:3]] == [["a", "both", "1"], ["a", "both", "2"]]
    other = compared({"LoRA": LoRA()}, passes=[16])
    assert isinstance(other, AcrossBudgets)
    with pytest.raises(ProblemError, match="tasks: differ in their budgets"):
        AcrossBudgets.of_tasks({"a": other, "b": found})


def test_a_run_without_a_finite_score_does_not_stop() -> None:
    with pytest.raises(ProblemError, match="the score is nan"):
        compared({"LoRA": LoRA()}, rates=[1e30], points=2)


@given(st.floats(1e-3, 1e6), st.integers(1, 50))
def test_the_last_point_is_the_end(passes: float, points: int) -> None:
    plan = Plan({"m": LoRA()}, Choice([1e-3], points=points), [0], "loss", True, passes)
    run = Run("m", "method", 0, 1e-3, passes=passes)
    assert next(iter(plan._parts(run))).marks[-1] == passes
