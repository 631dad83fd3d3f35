"""The methods: disjoint parts, the scores, and tables from stores alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.methods import report, runs
from benchmarks.methods.settings import SETTINGS
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
        # Of tags 0 and 1 two are right, one is missed, one is wrongly found; 2 is O, -100 no word.
        ([[0, 1, -100], [2, 1, 2]], [[0, 1, 0], [0, 2, 2]], {"f1": 2 / 3}),
    ],
)
def test_the_score(truth: list[Any], guess: list[Any], expected: dict[str, float]) -> None:
    found = score(SimpleNamespace(label_ids=np.array(truth), predictions=np.eye(3)[guess]))
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def result(run: Run, score: float | None = None) -> dict[str, Any]:
    """A made-up result: by default a rate of .002 is best, as is an upper rate of .1."""
    best = 0.5 + 0.1 * (run.rate == 2e-3) + 0.1 * (run.upper_rate == 1e-1) + 0.01 * run.seed
    metrics = {"eval_accuracy": best if score is None else score}
    more = {"metrics": metrics, "curve": [(run.passes, metrics)], "spent": {"lower steps": 300.0}}
    return {**asdict(run), "layers": "", "seconds": 5.0, "memory": 1.0, **more}


def test_tables_need_all_runs_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    for name in ("trec", "sst2"):
        before, plan = report.complete("magnitudes"), SETTINGS["magnitudes"].plan(name)
        store = Store(runs.folder("magnitudes", name), {x: {"method": x} for x in plan.methods})
        for stage in plan.stages(store):
            assert [*report.complete("magnitudes")] == [*before]
            for run in store.missing(stage):
                store.add(result(run))
    found = report.complete("magnitudes")
    assert [*found] == ["trec", "sst2"]
    rows = {row["method"]: row for row in report.scores(found)}
    assert rows["LoRA"]["sst2"] == "62.0 ± 2.0" and rows["LoRA"]["− LoRA"] == "–"
    assert rows["BiDoRA"]["− LoRA"] == "+10.0 ± 0.0, +10.0 ± 0.0"
    assert "mean" not in rows["BiDoRA"]
    tried = {row["method"]: row for row in report.rates(found)}
    assert tried["BiDoRA"]["upper 0.1"] == "72.0" and tried["LoRA"]["upper 0.1"] == "–"
    assert report.prices(found)[2]["trec"] == "0.002 (0.1)"
    assert "### Magnitudes" in report.details("magnitudes", found)


def test_the_best_way_by_held_out_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    setting = SETTINGS["sources"]
    plan = setting.plan("movies")
    store = Store(runs.folder("sources", "movies"), {x: {"method": x} for x in plan.methods})
    for stage in plan.stages(store):
        for run in store.missing(stage):
            best = 0.9 if run.method == "each source alike" else 0.5
            score = 0.1 * len(run.method) / 10 if run.split is None else best
            store.add(result(run, score))
    row, *others = report.summary("sources", report.complete("sources"))
    assert len(others) == 4 and others[0]["− frozen"] == "–"
    assert row["− best other method"] == "−10.0 ± 0.0 (each source alike)"
    assert row["− LoRA"] == "+3.0 ± 0.0" and row["− frozen"] == "+0.0 ± 0.0"
