"""The methods: disjoint parts, the scores, and tables from stores alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from benchmarks.methods import report, runs
from benchmarks.methods.settings import SETTINGS
from benchmarks.methods.simple import wrong_share
from benchmarks.methods.tasks import disjoint, score
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import Run


def test_no_row_is_alike_in_two_parts() -> None:
    rows = [{"input_ids": ids} for ids in ([1, 2], [3], [1, 2, 4], [5], [3], [6], [1, 2])]
    found = disjoint(rows[:3], rows[3:5], rows[5:])
    assert found == [rows[:3], [rows[3]], [rows[5]]]


@pytest.mark.parametrize(
    ("truth", "guess", "expected"),
    [
        ([0, 1, 1], [0, 1, 0], {"accuracy": 2 / 3, "macro_f1": 2 / 3, "matthews": 0.5}),
        ([0, 0, 1], [0, 0, 2], {"macro_f1": 0.5}),
    ],
)
def test_the_score(truth: list[Any], guess: list[Any], expected: dict[str, float]) -> None:
    found = score(SimpleNamespace(label_ids=np.array(truth), predictions=np.eye(3)[guess]))
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def result(run: Run) -> dict[str, Any]:
    """A made-up result: a loss correction is best, and each upper level adds 10 points."""
    best = 0.5 + 0.1 * (run.method == "loss correction") + 0.1 * (run.upper_rate is not None)
    metrics = {"eval_accuracy": best + 0.01 * (run.seed % 2)}
    more = {"curve": [(point, metrics) for point in run.points], "seconds": 5.0, "memory": 1.0}
    spent = {"lower steps": run.passes}
    return {**asdict(run), "metrics": metrics, "layers": "", "spent": spent, **more}


def filled(setting: str, task: str, names: list[str], heads: bool = False) -> None:
    """All runs of some methods, in a store."""
    for plan in SETTINGS[setting].plans(task, heads, names).values():
        store = Store(runs.folder(setting, task, heads), {x: {"method": x} for x in plan.methods})
        for stage in plan.stages(store):
            for run in store.missing(stage):
                store.add(result(run))


def test_a_table_has_the_methods_with_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    some = ["LoRA", "trusted rows 10 times", "loss correction", "RowWeights"]
    assert report.complete("wrong labels") is None
    filled("wrong labels", "trec", some[1:])
    assert report.complete("wrong labels") is None  # without the first one
    filled("wrong labels", "trec", some)
    filled("wrong labels", "trec", some, heads=True)
    found = report.complete("wrong labels")
    assert found is not None and [*found.adapters] == [*found.heads] == ["trec"]
    table = report.scores(found)
    assert [*table.method] == [
        "loss correction",
        "trusted rows 10 times",
        "LoRA",
        "RowWeights",
        "RowWeights, upper level frozen",
    ]
    assert [*table][2:] == ["1,200 passes", "1,200 passes, stopped", "heads, solved"]
    assert table["1,200 passes"][0] == "60.4 ± 0.7" and table["heads, solved"][2].startswith("50.")
    text = report.section(found)
    gap = "`RowWeights` differs from its frozen form by +10.0 ± 0.0 points"
    assert "*loss correction*. At 1,200 passes it differs from LoRA" in text and gap in text
    assert [*report.panel(found)[1]] == [
        "LoRA",
        "best simple way",
        "bilevel method",
        "its upper level frozen",
    ]
    assert "#### Wrong labels: trec, heads" in report.details(found)


def test_the_share_of_wrong_labels_is_estimated() -> None:
    """Three groups of classes, of which a head on trusted rows predicts all; 30 % are wrong."""
    draw = np.random.default_rng(0)
    right, known = draw.integers(3, size=2000), np.tile(np.arange(3), 20)
    wrong = draw.random(2000) < 0.3
    labels = (right + wrong * draw.integers(1, 3, size=2000)) % 3
    head = LogisticRegression()
    found = wrong_share(head, 5 * np.eye(3)[right], labels, 5 * np.eye(3)[known], known)
    assert found == pytest.approx(wrong.mean(), abs=1e-9)
