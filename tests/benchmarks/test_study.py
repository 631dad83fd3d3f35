"""The study of BiDoRA: its plan, its choices, and its statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.last_layers import disjoint
from benchmarks.measure import mean_and_half
from benchmarks.store import Store
from benchmarks.study.plan import BIDORA, DORA, FROZEN, STOPPED, Run, quick
from benchmarks.study.report import of_tasks, per_task, sections
from benchmarks.study.training import calibration_error, temperature

CELL = (40, 12)


def result(run: Run, score: float) -> dict[str, Any]:
    values = {"score": score, "loss": 1 - score, "ece": 0.1}
    parts = {part: values for part in ("train", "held_out", "test", "scaled")}
    return {"key": run.key, "seconds": 1.0, **parts}


def test_half_an_interval_and_differences_of_the_same_task_and_seed() -> None:
    middle, half = mean_and_half([1.0, 2.0, 3.0])
    assert (middle, half) == (2.0, pytest.approx(4.302653 / 3**0.5))
    one = {("a", 0): 0.5, ("a", 1): 0.7, ("c", 0): 0.9, ("c", 1): 0.3}
    other = {("a", 1): 0.4, ("b", 0): 0.1, ("c", 0): 0.4, ("c", 1): 0.4}
    values = ({key: {"x": x} for key, x in each.items()} for each in (one, other))
    assert of_tasks(*values, lambda row: row["x"]) == [pytest.approx(0.3), pytest.approx(0.2)]


def test_calibration_error_is_the_gap_of_each_bin() -> None:
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.6, 0.6])
    logits = torch.stack([confidence, 1 - confidence], dim=1).log()
    labels = torch.tensor([0, 0, 1, 1, 1])  # two of three are right at .9, none at .6
    expected = 3 / 5 * (0.9 - 2 / 3) + 2 / 5 * 0.6
    assert calibration_error(logits, labels) == pytest.approx(expected, rel=1e-5)


def test_the_temperature_makes_the_confidence_the_accuracy() -> None:
    logits = torch.tensor([[7.0, 0.0]]).repeat(4, 1)
    found = temperature(logits, torch.tensor([0, 0, 0, 1]))  # 3/4 = sigmoid(7 / T)
    assert found == pytest.approx(7 / math.log(3), rel=1e-3)


def test_no_row_is_alike_in_two_parts() -> None:
    texts = ["one two", "three", "one two four", "five", "three", "six", "one two"]
    parts = torch.arange(7).split([3, 2, 2])
    found = disjoint(parts, texts, length=4)  # the class token, two words, the end
    assert [part.tolist() for part in found] == [[0, 1, 2], [3], [5]]


def test_rates_are_chosen_by_the_held_out_score_of_seeds_that_are_not_judged() -> None:
    study, store, measured = quick(), Store(None), list[Run]()
    best = {DORA: {"rate": 6e-3}, BIDORA: {"rate": 2.5e-3, "upper_rate": 1e-1}}
    for run in study.runs(store):
        if run.key not in store.by_key:
            upper_rate = run.options.get("upper_learning_rate")
            right = (
                {"rate": run.rate, "upper_rate": upper_rate} if upper_rate else {"rate": run.rate}
            )
            agree = sum(best.get(run.method, {}).get(k) == v for k, v in right.items())
            store.save(result(run, 0.5 + 0.1 * agree))
            measured.append(run)
    assert {name: study.chosen(store, CELL, name) for name in best} == best
    judged = [run for run in measured if run.seed not in study.development]
    tried = [run for run in measured if run.seed in study.development]
    # The runs that choose come first: the rates of four methods, and BiDoRA's other upper rate.
    assert measured[: len(tried)] == tried
    assert len(tried) == (4 * 2 + 1) * len(study.tasks) * len(study.development)
    (frozen,) = {run.rate for run in judged if run.method == FROZEN}
    assert frozen == best[BIDORA]["rate"]
    stopped = [run for run in judged if run.method == STOPPED]
    assert {run.rate for run in stopped} == {6e-3}
    assert [run.until for run in stopped] == pytest.approx([0.3] * len(stopped))
    assert len({run.key for run in measured}) == len(measured)
    assert "All six layers adapted" in sections(study, store)
    assert sections(study, Store(None)) == "No table is complete yet.\n"


def test_a_rate_of_each_task_is_scored_on_the_seed_that_did_not_choose_it() -> None:
    study, store = quick(), Store(None)
    study = type(study)(**{**vars(study), "tasks": ("a",), "development": (0, 1)})
    trials = [study.trials(CELL, DORA, rate=rate) for rate in study.rates]
    for runs, scores in zip(trials, ((0.9, 0.2), (0.6, 0.5)), strict=True):
        for run, score in zip(runs, scores, strict=True):
            store.save(result(run, score))
    # Seed 1 is scored by the rate that is best on seed 0, and the other way round.
    assert per_task(study, store, trials) == pytest.approx((0.2 + 0.6) / 2)
