"""Stopping points, upper rates at the chosen rate, and two budgets in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperopt_peft import Method, ProblemError
from hyperopt_peft.comparison import Choice, Comparison
from hyperopt_peft.comparison.choice import Plan
from hyperopt_peft.comparison.rows import Rows
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
    return {point: metrics["eval_loss"] for point, metrics in curve}


@pytest.mark.parametrize("method", [LoRA(), BiDoRA()], ids=repr)
def test_scores_on_the_way_do_not_change_a_run(method: Method) -> None:
    """The passes of evaluations are beside the budget; a search has no score before it is done."""
    upper = 1e-2 if isinstance(method, BiDoRA) else None
    run = Run("m", "method", 0, 3e-2, upper, passes=24, split=0, points=(24.0,))
    whole = task({"m": method})
    plain = whole.run(run)
    scored = whole.run(Run(**{**vars(run), "points": (6.0, 12.0, 18.0, 24.0)}))
    assert plain["metrics"] == scored["metrics"] and passes_of(plain) == passes_of(scored)
    (_, end), *_ = reversed(scored["curve"])
    assert end == scored["metrics"] and len(plain["curve"]) == 1
    rows = len(whole.data.of(0, 0)[2])
    assert scored["spent"]["held-out scores"] == len(scored["curve"]) * rows / 4 / 3
    search = scored["spent"]["upper steps"] > 0
    assert all(point > 12 for point in scores(scored["curve"])) == search


def made_up(curves: dict[tuple[int, float, int], list[float]], **choice: Any) -> tuple[Plan, Store]:
    """A plan and the scores at both points of 100 passes by seed, rate and split."""
    rates = sorted({rate for _, rate, _ in curves})
    chosen = Choice(rates, splits=2, points=2, **choice)
    plan = Plan({"m": LoRA()}, chosen, [0, 1], "accuracy", False, 100)
    store, spent = Store(None, {}), {"lower steps": 100.0}
    for (seed, rate, split), values in curves.items():
        run = Run("m", "method", seed, rate, passes=100, split=split, points=(50.0, 100.0))
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
    for run in chosen.values():
        more = {"metrics": {"eval_accuracy": 0.9 if run.stop else 0.5}, "seconds": 1.0}
        store.add({**vars(run), **more, "memory": 1.0, "spent": {"lower steps": run.stop or 100.0}})
    found = Comparison(plan, store)
    assert found.scores()["m"].tolist() == [0.5, 0.5]
    assert found.scores(stopped=True)["m"].tolist() == [0.9, 0.5]
    row = found.table().loc["m", ["mean", "stopped", "stopped_passes"]]
    assert row.tolist() == pytest.approx([0.5, 0.7, 75.0])


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
            more = {"metrics": {"eval_accuracy": score}, "seconds": 1.0, "memory": 1.0}
            store.add({**vars(run), **more, "curve": curve, "spent": {"lower steps": 100.0}})
    assert {run.seed: (run.rate, run.upper_rate) for run in stage} == best
    tried = len(store.results) - len(stage)  # a run that two stages read is paid for once
    assert Comparison(plan, store).table().loc["m", "passes_of_choice"] == 100 * tried / 2


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
    plain = task({"m": LoRA()}).run(Run("m", "method", 0, 3e-2, passes=48, stop=20.0))
    assert 19 < passes_of(plain) <= 20


def test_budgets_share_a_folder(tmp_path: Path) -> None:
    """A call with another budget does the runs of this budget alone; their scores are one table."""
    options: dict[str, Any] = {"folder": tmp_path, "ablations": {}}
    found = {passes: compared(METHODS, passes=passes, **options) for passes in (8, 16)}
    lines = (tmp_path / "runs.jsonl").read_text()
    again = {passes: compared(METHODS, passes=passes, **options) for passes in (8, 16)}
    assert (tmp_path / "runs.jsonl").read_text() == lines
    for each in found, again:
        table = pandas.concat({passes: x.scores() for passes, x in each.items()}, names=["passes"])
        assert table.index.names == ["passes", "seed"] and [*table] == [*METHODS]
        assert table.notna().all(axis=None) and len(table) == 4
    runs = again[16].runs()
    assert (runs.groupby("passes").size() == 4).all() and {*runs.passes} == {8, 16}


def test_a_run_without_a_finite_score_does_not_stop() -> None:
    with pytest.raises(ProblemError, match="the score is nan"):
        compared({"LoRA": LoRA()}, rates=[1e30], points=2)


@given(st.floats(1e-3, 1e6), st.integers(1, 50))
def test_the_last_point_is_the_end(passes: float, points: int) -> None:
    plan = Plan({"m": LoRA()}, Choice([1e-3], points=points), [0], "loss", True, passes)
    assert plan.points[-1] == passes and len(plan.points) == points
