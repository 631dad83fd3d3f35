"""`compare_methods`: equal passes, chosen rates, ablations, a store that goes on, processes."""

from __future__ import annotations

import json
import re
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch
from torch import nn

from hyperopt_peft import BiDoRA, ProblemError
from hyperopt_peft.problems import LoRA
from tests.support.comparisons import compared


def lines(folder: Path) -> dict[str, Any]:
    """The stored scores and passes by what distinguishes a run."""
    found = {}
    for path in folder.glob("runs*.jsonl"):
        for line in path.read_text().splitlines()[1:]:
            if line.startswith('{"unfinished'):
                continue
            entry = json.loads(line)
            names = ("method", "kind", "seed", "rate", "upper_rate", "development")
            found[str([entry[name] for name in names])] = entry["score"], entry["passes"]
    return found


def test_every_run_has_the_passes_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another count: the gradients that arrive at the logits, in rows."""
    counted: list[int] = []
    forward = nn.Module.__call__

    def count(module: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(module, *args, **kwargs)
        if type(module).__name__ == "BertForSequenceClassification" and torch.is_grad_enabled():
            output.logits.register_hook(lambda g: counted.append(len(g)))
        return output

    monkeypatch.setattr(nn.Module, "__call__", count)
    comparison = compared({"LoRA": LoRA(), "BiDoRA": BiDoRA()}, seeds=[0, 1])
    results = comparison.store.results.values()
    assert {(r["method"], r["kind"]) for r in results} == {
        ("LoRA", "method"),
        *(("BiDoRA", kind) for kind in ("method", "frozen", "one level")),
    }
    assert all(11 <= result["passes"] <= 13 for result in results)
    # The prices' first steps are counted here as well.
    spent = sum(result["passes"] for result in results)
    prices = sum(counted) / 4 - spent
    assert 0 < prices <= 6 * (4 + 30 / 4)


def test_a_product_of_second_derivatives_is_paid_for() -> None:
    """cg with two exact products takes four passes more an upper step than direct."""
    steps = {}
    for name in ("direct", "cg:steps=2,tolerance=1e-12"):
        method = BiDoRA()
        method.__dict__["defaults"] = {"hypergradient": name}
        comparison = compared({"LoRA": LoRA(), "BiDoRA": method}, passes=80, rates=(6e-2,))
        (run, _) = comparison.plan.runs_of(comparison.store, "BiDoRA", "method")
        result = comparison.store.results[run]
        assert 74 <= result["passes"] <= 86  # one upper step has up to six
        steps[name[:2]] = result["steps"][0]
    assert steps["cg"] < 0.6 * steps["di"]


def test_killed_twice_it_goes_on_with_the_same_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compared(folder=tmp_path / "whole")
    from hyperopt_peft.comparison.store import Store

    add = Store.add
    for kill in (3, 9):

        def interrupted(store: Store, result: Any, kill: int = kill) -> None:
            if len(store.results) == kill:
                raise KeyboardInterrupt
            add(store, result)

        monkeypatch.setattr(Store, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compared(folder=tmp_path / "killed")
        with (tmp_path / "killed" / "runs.jsonl").open("a") as file:
            file.write('{"unfinished": ')
    monkeypatch.setattr(Store, "add", add)
    again = compared(folder=tmp_path / "killed")
    assert str(again).splitlines()[0] == str(whole).splitlines()[0]
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    with pytest.raises(ProblemError, match="passes"):
        compared(folder=tmp_path / "killed", passes=20)


def test_parts_of_a_job_array_join(tmp_path: Path) -> None:
    options: dict[str, Any] = {"folder": tmp_path / "parts", "rates": (6e-2,)}
    whole = compared(folder=tmp_path / "whole", rates=(6e-2,))
    for _ in range(3):  # two stages of rates, and the reported runs
        for number in (1, 2):
            with suppress(ProblemError):  # the other part is not done
                compared(part=(number, 2), **options)
    parts = compared(part=(1, 2), **options)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert parts.scores("BiDoRA") == whole.scores("BiDoRA")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky", "dask"])
def test_other_processes_give_the_same_lines(tmp_path: Path, backend: str) -> None:
    options: dict[str, Any] = {"rates": (6e-2,), "seeds": [0, 1]}
    compared(folder=tmp_path / "one", **options)
    if backend == "loky":
        compared(folder=tmp_path / "two", jobs=2, **options)
    else:
        distributed = pytest.importorskip("distributed")
        workers = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
        with (
            distributed.LocalCluster(**workers) as cluster,
            distributed.Client(cluster),
            joblib.parallel_config(backend="dask"),
        ):
            compared(folder=tmp_path / "two", jobs=2, **options)
    one, two = (lines(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, (score, passes) in one.items():
        assert two[key] == (pytest.approx(score, abs=0.051), passes)  # a row of 20


def test_the_answer(tmp_path: Path) -> None:
    comparison = compared()
    table = comparison.table()
    assert [row[0] for row in table[1:]] == [
        *("LoRA", "DoRA", "BiDoRA", "BiDoRA, upper level frozen", "BiDoRA, one level")
    ]
    text = str(comparison)
    assert "at the edge of the rates" in text and "DoRA" in text
    (parts,) = [line for line in text.splitlines() if line.startswith("BiDoRA − LoRA is the sum")]
    gaps = [float(gap) for gap in re.findall(r"([+-][.0-9]+) ±", parts)]
    whole = statistics.fmean(comparison.differences(("BiDoRA", "method"), ("LoRA", "method")))
    assert len(gaps) == 3 and sum(gaps) == pytest.approx(whole, abs=2e-4)
    assert comparison.to_latex().count(r"\\") == 6
    comparison.to_html(tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert page.count("<tr>") == 6 + (1 + 4 * 2) + 6 and page.count("data:image/png") == 1
    comparison.plot(tmp_path / "c.png")
    comparison.to_csv(tmp_path / "c.csv")
    assert (tmp_path / "c.png").stat().st_size > 10_000
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 1 + len(comparison.store.results)
    assert len(comparison.rates()) == 1 + 4 * 2
