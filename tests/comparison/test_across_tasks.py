"""`AcrossTasks`: tables, sentences and refusals on made-up stores, by closed forms."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t

from hyperopt_peft import BiDoRA, ProblemError
from hyperopt_peft.comparison import AcrossTasks, Comparison
from hyperopt_peft.comparison.choice import Choice, Plan
from hyperopt_peft.comparison.result import Candidate
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.problems import LoRA
from hyperopt_peft.utils.verdict import Verdict

PAIRS: tuple[Candidate, ...] = (
    *(("LoRA", "method"), ("BiDoRA", "method")),
    *(("BiDoRA", "frozen"), ("BiDoRA", "one level")),
)


def made_up(
    means: Mapping[Candidate, float],
    metric: str = "accuracy",
    *,
    methods: Any = None,
    passes: float = 300.0,
    layers: str = "",
) -> Comparison:
    """Two seeds, .1 above and below the mean of each candidate."""
    lower, choice = metric == "loss", Choice([1e-3], [1e-2])
    methods = methods or {"LoRA": LoRA(), "BiDoRA": BiDoRA()}
    plan, store = Plan(methods, choice, [0, 1], metric, lower, passes), Store(None, {})
    for name, kind in plan.candidates():
        mean = means[name, kind]
        for seed, score in enumerate((mean - 0.1, mean + 0.1)):
            run = plan.chosen(store, name, kind, seed)
            more = {"layers": layers, "spent": {"steps": 3.0}}
            store.add({**asdict(run), "metrics": {f"eval_{metric}": score}, **more})
    return Comparison(plan, store)


def three(*scores: tuple[float, ...]) -> AcrossTasks:
    """Tasks a, b and c with a score for each candidate."""
    tasks = zip("abc", scores, strict=True)
    return AcrossTasks({task: made_up(dict(zip(PAIRS, each))) for task, each in tasks})


def test_differences_are_paired_by_task(tmp_path: Path) -> None:
    joined = three((0.5, 0.6, 0.6, 0.7), (0.6, 0.71, 0.71, 0.75), (0.7, 0.82, 0.83, 0.8))
    gaps = joined.differences(("BiDoRA", "method"), ("LoRA", "method"))
    assert gaps == pytest.approx([0.10, 0.11, 0.12])
    error = 0.01 / 3**0.5
    half = t.ppf(0.975, 2) * error
    heads, _, bidora, frozen, one = joined.table()
    assert heads == ["method", "a", "b", "c", "mean", "− LoRA"]
    assert bidora == ["BiDoRA", "60.0", "71.0", "82.0", "71.0", f"+11.0 ± {100 * half:.1f}*"]
    assert [row[0] for row in (frozen, one)] == ["BiDoRA, upper level frozen", "BiDoRA, one level"]
    ahead, parts = joined.sentences()[:2]
    assert f"better than LoRA in accuracy by 11.0 ± {100 * half:.1f} points" in ahead
    # Of the method and the frozen upper level the differences are 0, 0 and -.01.
    third = t.ppf(0.975, 2) * error / 3**0.5
    assert f"upper level: −0.3 ± {100 * third:.1f} points, not significant" in parts
    apart = three((0.5, 0.51, 0.5, 0.5), (0.6, 0.6, 0.6, 0.6), (0.7, 0.7, 0.7, 0.7))
    least = Verdict([0.01, 0.0, 0.0]).detectable
    assert f"with 3 tasks (80 % power): {100 * least:.1f} points" in apart.sentences()[0]
    joined.comparisons["c_1"] = joined.comparisons.pop("c")
    latex = joined.to_latex()
    assert latex.count(r"\\") == 8 and r"c\_1 &" in latex and "±" not in latex
    assert rf"+11.0 $\pm$ {100 * half:.1f}$^*$ \\" in latex and r"& $-$ LoRA \\" in latex
    joined.comparisons["c"] = joined.comparisons.pop("c_1")
    joined.plot(tmp_path / "gaps.png")
    joined.to_csv(tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4 * 2 and {row["task"] for row in rows} == {*"abc"}
    assert joined.spent()[1] == ["a", "LoRA", "3.0", "0.0"]  # lower steps, the choice of rates
    assert "300 passes a run" in joined.heading()
    heads = AcrossTasks({x: made_up(SCORES, passes=0.0) for x in "ab"}).heading()
    assert "heads at their minimum" in heads and "over 2 tasks" in heads
    assert joined.rates()[0] == [
        "task",
        "method",
        "rate",
        "upper rate",
        "accuracy (points)",
        "seeds",
    ]


def test_lower_losses_are_better_and_a_remark_names_its_tasks() -> None:
    layers = {"a": "none is frozen", "b": "five are frozen", "c": "none is frozen"}
    losses = {task: (0.5, *[0.7 + k / 1000] * 3) for k, task in enumerate("abc", start=-1)}
    tasks = {n: made_up(dict(zip(PAIRS, losses[n])), "loss", layers=x) for n, x in layers.items()}
    text = str(AcrossTasks(tasks))
    assert "BiDoRA is worse than LoRA in loss by 0.200" in text
    assert "a, c: none is frozen" in text and "b: five are frozen" in text


SCORES: dict[Candidate, float] = dict.fromkeys(PAIRS, 0.5)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "0 task"),
        ({"a": made_up(SCORES)}, "1 task has no interval"),
        ({"a": made_up(SCORES), "b": made_up(SCORES, passes=100.0)}, "b and a differ"),
        ({"a": made_up(SCORES), "b": made_up(SCORES, "loss")}, "b and a differ"),
        ({"a": made_up(SCORES), "b": made_up(SCORES, methods={"LoRA": LoRA()})}, "b and a differ"),
    ],
)
def test_tasks_that_cannot_be_joined(tasks: dict[str, Comparison], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        AcrossTasks(tasks)
