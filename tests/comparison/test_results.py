"""`Comparison`: significance, tables and sentences on made-up runs, by closed forms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pandas
import pytest
from scipy import stats

from hyperopt_peft import BiDoRA
from hyperopt_peft.comparison import Choice, Comparison
from hyperopt_peft.comparison.choice import Plan
from hyperopt_peft.comparison.result import Candidate
from hyperopt_peft.comparison.store import Result, Store
from hyperopt_peft.comparison.task import Kind
from hyperopt_peft.problems import LoRA
from hyperopt_peft.utils.verdict import Verdict, holm

METHODS = {"LoRA": LoRA(), "BiDoRA": BiDoRA(), "my_method": LoRA()}
FROZEN = "BiDoRA, upper level frozen"
LORA = [0.70, 0.72, 0.69, 0.71, 0.70]


class MadeUp(Comparison):
    """Reported runs and held-out scores that are given."""

    runs: Mapping[Candidate, Sequence[Result]]
    tried: Mapping[str, Mapping[float, float]]

    def reported(self, name: str, kind: Kind = "method", stopped: bool = False) -> list[Result]:
        return [*self.runs[name, kind]]


def made_up(gains: Mapping[Candidate, Sequence[float]], **more: Any) -> MadeUp:
    """Five seeds whose scores are those of LoRA and ``gains``; ``more`` entries of BiDoRA's."""
    metric, scale = more.pop("metric", "accuracy"), more.pop("scale", 1)
    plan = Plan(METHODS, Choice([1e-3], [1e-2]), range(5), metric, metric == "loss", 300)
    made = MadeUp(plan, Store(None, {}), scored=1200)
    made.runs = {
        pair: [
            {
                **{"metrics": {f"eval_{metric}": scale * (start + gain)}, "layers": ""},
                **{"rate": 1e-3, "upper_rate": None, "seconds": 1.0, "memory": 1.0},
                **{"spent": {"steps": 300.0}, "influence": {f"eval_{metric}": [0.0] * 4}},
                **{k: x[seed] for k, x in more.items() if pair == ("BiDoRA", "method")},
            }
            for seed, (start, gain) in enumerate(zip(LORA, gains.get(pair, [0.0] * 5), strict=True))
        ]
        for pair in plan.candidates()
    }
    return made


SMALL = [0.010, 0.018, 0.012, 0.004, 0.001]  # p = .04 alone


def test_each_family_is_corrected_by_itself() -> None:
    gains: dict[Candidate, list[float]] = {("BiDoRA", "method"): [0.05] * 5}
    made = made_up({**gains, ("my_method", "method"): SMALL})
    forms = [*made.plan.candidates()[1:4], ("LoRA", "method")]
    to_first: list[Candidate] = [("BiDoRA", "method"), ("my_method", "method")]
    for family in [(each, forms[-1]) for each in to_first], [*pairwise(forms)]:
        alone = [made.difference(*pair).p_value for pair in family]
        assert [made.verdicts[pair].corrected for pair in family] == pytest.approx(holm(alone))
        assert all(made.verdicts[pair].family == len(family) for pair in family)
    found = made.differences()
    assert len(found) == 2 + 2 + 3 - 1  # of methods, of ablations, and effects, one of which is one
    assert found.corrected.count() == 5  # the frozen form, beside LoRA, is in no family
    assert found.corrected["my_method", "LoRA"] == made.verdicts[to_first[1], forms[-1]].corrected
    assert found.loc[("BiDoRA", "LoRA"), ["estimate", "detectable"]].tolist() == pytest.approx(
        [0.05, 0.0], abs=1e-6
    )
    text = made.sentences()
    assert "BiDoRA is better than LoRA in accuracy by 5.0 ± 0.0 points" in text[0]
    assert text[0].endswith(", of which its upper level contributes +5.0 ± 0.0 points")
    printed = [cell.endswith("*") for cell in made.tables()["Scores"]["− LoRA"]]
    assert printed == [False, True, False, False, True] and found.significant["my_method", "LoRA"]
    # Two differences: p = .04 is still significant, since the smaller p-value of 0 is tested first.
    alone = Verdict(SMALL)
    assert 0.03 < alone.p_value < 0.05 and "my_method is better" in text[2]
    weaker = made_up({("my_method", "method"): SMALL})
    assert f"p = {alone.p_value:.2g}, by Holm's correction {2 * alone.p_value:.2g}" in str(weaker)


def test_tables_for_a_paper() -> None:
    made = made_up({("BiDoRA", "method"): [0.05] * 5, ("BiDoRA", "frozen"): [0.01] * 5})
    heading = made.heading()
    assert "1,200 test rows" in heading and "p < 0.05 (Holm)" in heading
    printed = made.tables()["Scores"].set_index("method")
    assert printed["accuracy (points)"]["BiDoRA"] == "75.4 ± 1.4"
    assert printed["− LoRA"].tolist() == [
        "",
        "+5.0 ± 0.0*",
        "+1.0 ± 0.0",
        "+0.0 ± 0.0",
        "+0.0 ± 0.0",
    ]
    assert "75.4 ± 1.4 & +5.0 ± 0.0* & " in printed.to_latex(escape=True)
    assert made.differences()["estimate"]["BiDoRA", FROZEN] == pytest.approx(0.04)


def test_the_numbers_of_two_comparisons_are_one_table() -> None:
    """By the means and intervals of scipy."""
    found = [made_up({("BiDoRA", "method"): [gain] * 5}) for gain in (0.05, 0.02)]
    table = pandas.concat({task: x.table() for task, x in zip("ab", found)}, names=["task"])
    means = table["mean"].unstack("task")
    assert means["a"]["BiDoRA"] - means["b"]["BiDoRA"] == pytest.approx(0.03)
    low, high = stats.t.interval(0.95, 4, scale=stats.sem(LORA))
    assert table.half_width["a", "LoRA"] == pytest.approx((high - low) / 2)
    assert found[0].scores()["LoRA"].tolist() == LORA and table.passes["a", "LoRA"] == 300


@pytest.mark.parametrize(
    ("method", "frozen", "words"),
    [
        (0.04, 0.035, "is better than LoRA in accuracy by 4.0 ± 0.0 points, but not by its upper"),
        (0.04, 0.01, "points, of which its upper level contributes +3.0"),
        (0.02, 0.05, "points, although its upper level contributes −3.0"),
        (-0.02, -0.05, "worse than LoRA in accuracy by 2.0 ± 0.0 points, although its upper level"),
        (-0.05, -0.02, "worse than LoRA in accuracy by 5.0 ± 0.0 points, of which its upper level"),
        (0.0, -0.05, "no significant difference between BiDoRA and LoRA in accuracy"),
    ],
)
def test_one_sentence_has_the_verdict_and_the_part_of_the_upper_level(
    method: float, frozen: float, words: str
) -> None:
    noise = [0.02 * (abs(method - frozen) < 0.01) * (-1) ** seed for seed in range(5)]
    gains = {("BiDoRA", "method"): [method] * 5, ("BiDoRA", "frozen"): [frozen + x for x in noise]}
    sentence = made_up(gains).sentences()[0]
    assert words in sentence
    assert ("upper level" in sentence) == (method != 0)


def test_a_method_is_recommended_where_it_is_better_than_the_next_one() -> None:
    assert "recommended" not in made_up({("BiDoRA", "method"): SMALL[::-1]}).sentences()[0]
    noisy = [0.02, -0.015, 0.02, -0.01, 0.0]
    assert "recommended" not in made_up({("BiDoRA", "method"): noisy}).recommendation()
    better = made_up({("BiDoRA", "method"): [0.05] * 5}).recommendation()
    assert better.startswith("BiDoRA is recommended")


def test_seeds_that_an_interval_is_not_made_for_are_named() -> None:
    """Grubbs' statistic of four equal scores and one other is the largest possible."""
    collapsed = made_up({("BiDoRA", "method"): [0.0, 0.0, 0.0, -0.3, 0.0]}).remarks()
    assert [x for x in collapsed if x.startswith("BiDoRA: seed 3 scores 41.0, far")]
    assert len(collapsed) == 1 and not made_up({("BiDoRA", "method"): [0.05] * 5}).remarks()
    two = made_up({})
    two.plan = replace(two.plan, seeds=range(2))
    two.runs = {pair: runs[:2] for pair, runs in two.runs.items()}
    assert [x for x in two.remarks() if x.startswith("two seeds")]


def test_a_table_fits_a_hundred_columns() -> None:
    made = made_up({("BiDoRA", "method"): [0.05] * 5})
    heading, _, *table = str(made).split("\n")
    assert max(map(len, [heading, *table[: table.index("")]])) <= 100
    assert "recommended" not in str(made)


def test_losses_have_three_digits() -> None:
    made = made_up({("BiDoRA", "method"): [0.001, 0.002] * 2 + [0.003]}, metric="loss", scale=3)
    gap = made.difference(("BiDoRA", "method"), ("LoRA", "method"))
    assert str(gap) == f"+{gap.estimate:.5f} ± {gap.half:.5f}"
    assert f"BiDoRA is worse than LoRA in loss by {gap.estimate:.5f}" in str(made)
    assert made.tables()["Scores"]["loss"][0] == "2.11 ± 0.04" and "points" not in str(made)


def test_what_the_upper_level_did() -> None:
    entries = {"steps": 6, "moved": 0.345, "moved_in_rates": None, "implicit_ratio": float("inf")}
    upper = [{**entries, "steps": steps, "residual": 0.01} for steps in (5, 6, 7, 6, 6)]
    made = made_up({}, upper=upper, rate=[1e-3, 2e-3, 4e-3, 2e-3, 1e-3], upper_rate=[1e-2] * 5)
    did = made.table().loc["BiDoRA"]
    assert (did["upper.steps"], did["upper.moved"], did["upper.residual"]) == pytest.approx(
        (6, 0.345, 0.01)
    )
    assert "upper.implicit_ratio" not in did  # of no finite entry
    zero = made_up({}, upper=[{"start": 0.0, "moved": 0.8, "lower_steps": 4, "steps": 6}] * 5)
    assert zero.table()["upper.lower_steps"]["BiDoRA"] == 4
    assert "upper steps that moved the upper variables from 0 to a norm of 0.8: no" in str(zero)
    begin = "at 300 passes, with 6 upper steps that moved the upper variables by 34.5 %: no "
    assert made.sentences()[0].startswith(begin)
    printed = made.tables()["Scores"].loc[1]
    assert [printed["rate"], printed["upper rate"]] == ["0.002", "0.01"]
    assert did.rate == 0.002 and math.isnan(made.table().upper_rate["LoRA"])
    one = made_up({}, upper=[{**entries, "steps": 1}] * 5)
    assert one.sentences()[0].startswith("at 300 passes, with 1 upper step that moved")
    assert made_up({}).sentences()[0].startswith("at 300 passes: no significant difference")


def test_rates_are_counted_and_ends_are_named() -> None:
    """Of a plan with grids, whose development runs have made-up curves."""
    nan = float("nan")
    choice, seeds, store = Choice([1e-3, 1e-2, 1e-1], [1e-2], splits=2), range(3), Store(None, {})
    plan = Plan({"LoRA": LoRA()}, choice, seeds, "accuracy", False, 300)
    best = {0: 1e-3, 1: 1e-2, 2: 1e-3}  # the rate of each seed
    stages = plan.stages(store)
    for run in next(stages):
        score = 0.5 + 0.2 * (run.rate == best[run.seed]) + 0.02 * (run.split or 0)
        score = nan if run.rate == 1e-1 else score
        store.add({**vars(run), "curve": [(300, {"eval_accuracy": score})]})
    *_, last = stages
    for run in last:
        more = {"layers": "", "spent": {"steps": 300.0}, "seconds": 1.0, "memory": 1.0}
        store.add({**vars(run), "metrics": {"eval_accuracy": 0.7}, **more})
    made = Comparison(plan, store)
    rates = made.rates()
    assert rates.rate.tolist() == [1e-3, 1e-2, 1e-1] and rates.seeds.tolist() == [2, 1, 0]
    expected = [0.51 + 0.2 * 2 / 3, 0.51 + 0.2 / 3, nan]
    assert rates["mean"].tolist() == pytest.approx(expected, nan_ok=True)
    assert rates.upper_rate.isna().all() and {*rates.method} == {"LoRA"}
    remarks = made.remarks()
    assert remarks[0] == "LoRA: at the rate 0.1 a score is not finite, which counts as the worst"
    assert remarks[1].startswith("LoRA: 2 of 3 seeds chose a rate at an end of the grid, 0.001;")
