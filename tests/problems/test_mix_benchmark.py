"""The statistics of benchmarks/mix.py, against their definitions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from attribution_tables import Runs
from mix_tables import best_baseline, paired, tables_of, targets_of, verdicts

#: Accuracies of two seeds, and trusted losses of two rows.
METHODS: dict[str, tuple[tuple[float, float], list[float] | None]] = {
    "trusted only": ((0.5, 0.6), [0.9, 1.1]),
    "all, equal weights": ((0.6, 0.7), [0.8, 0.8]),
    "learnt": ((0.7, 0.9), [0.5, 0.7]),
    "learnt, no prior": ((0.9, 0.9), None),  # not judged
}


@pytest.fixture
def runs() -> Runs:
    found = Runs(None)
    for method, (scores, losses) in METHODS.items():
        for seed, score in enumerate(scores):
            key = {"part": "cells", "task": "trec", "model": "head", "trusted": 30, "seed": seed}
            row: dict[str, Any] = found.entry(**key, method=method)
            row |= {"accuracy": score, "loss": 1.0, "tests": 100, "passes": 10.0}
            if losses is not None:
                row["cv"] = losses
    return found


def test_the_gap_is_paired_by_seed(runs: Runs) -> None:
    def of(method: str) -> dict[int, Any]:
        return {row["seed"]: row for row in runs.rows if row["method"] == method}

    middle, half = paired(of("learnt"), of("all, equal weights"))  # gaps of .1 and .2
    assert middle == pytest.approx(0.15)
    assert half == pytest.approx(12.7062 * 0.05, rel=1e-4)  # t of one degree of freedom


def test_the_best_other_way_is_no_learnt_one(runs: Runs) -> None:
    cell = {name: {0: {"accuracy": score[0]}} for name, (score, _) in METHODS.items()}
    assert best_baseline(cell) == "all, equal weights"
    (target, *_) = targets_of(runs)
    assert target.value == pytest.approx(0.15 - 12.7062 * 0.05, rel=1e-4)


def test_a_verdict_is_judged_by_test_accuracy(runs: Runs) -> None:
    first, second = verdicts(runs)
    assert (first["lowest"], first["best"]) == ("learnt", "learnt")
    assert first["lowest: good"]
    for row in runs.rows:
        if row["method"] == "trusted only":
            row["cv"] = [0.1, 0.1]  # the lowest loss, and the worst accuracy
    assert [row["lowest: good"] for row in verdicts(runs)] == [False, False]
    assert verdicts(runs)[1]["lowest: behind"] == pytest.approx(0.3)
    assert second["best"] == "learnt"


def test_every_cell_has_a_table(runs: Runs) -> None:
    tables = tables_of(runs)
    rows = {row["method"]: row for row in tables["trec, head, 30 trusted rows"]}
    assert set(rows) == set(METHODS)
    assert rows["learnt"]["accuracy"] == pytest.approx(0.8)
    assert rows["learnt"]["trainings"] == 1.0  # as many passes as one with equal weights
