"""`compare_methods`: equal passes, chosen rates, ablations, a store that goes on, processes."""

from __future__ import annotations

import json
import random
import re
import statistics
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import pandas
import pytest
import torch
from torch import nn

from hyperopt_peft import BiDoRA, ProblemError
from hyperopt_peft.comparison import Comparison
from hyperopt_peft.comparison.folds import Rows
from hyperopt_peft.comparison.price import Price
from hyperopt_peft.comparison.store import Store
from hyperopt_peft.comparison.task import Run, Task
from hyperopt_peft.problems import BiLoRA
from tests.support.comparisons import METHODS, compared, parts_of
from tests.support.trainers import data


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


RATES: dict[str, Any] = {"rates": (3e-2, 6e-2)}


@dataclass(frozen=True)
class Whole:
    """A comparison without interruption, and the rows by another count of all its passes."""

    comparison: Comparison
    folder: Path
    rows: int


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The gradients that arrive at the logits are counted."""
    counted: list[int] = []
    forward, folder = nn.Module.__call__, tmp_path_factory.mktemp("whole")

    def count(module: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(module, *args, **kwargs)
        if (
            type(module).__name__ == "PeftModelForSequenceClassification"
            and torch.is_grad_enabled()
        ):
            output.logits.register_hook(lambda g: counted.append(len(g)))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__call__", count)
        comparison = compared(folder=folder, **RATES)
    return Whole(comparison, folder, sum(counted))


def test_every_run_has_the_passes_of_the_budget(whole: Whole) -> None:
    results = whole.comparison.store.results.values()
    assert {(r["method"], r["kind"]) for r in results} == {
        ("LoRA", "method"),
        *(("BiDoRA", kind) for kind in ("method", "frozen", "one level")),
    }
    # All of it, to one step of the last phase, of four rows.
    assert all(11 < result["passes"] <= 12 for result in results)
    # The prices' first steps are counted here as well: of three ways, on two sizes of data.
    spent = sum(result["passes"] for result in results)
    assert 0 < whole.rows / 4 - spent <= 6 * (4 + 30 / 4)


def test_no_step_more_is_within_a_budget() -> None:
    """Whatever the rows, the batch, the upper steps and the phases, and however many upper steps.

    The first phase of two ends with an upper step, and has as many steps as the second one.
    """
    draw = random.Random(0)
    for _ in range(300):
        lower, every, again = draw.randint(1, 60), draw.randint(0, 5), draw.random() < 0.5
        unit, batch, upper = draw.randint(1, 9), draw.randint(1, 20), 30 * draw.random()
        price = Price(unit, batch, lower, lower + 10, every, upper, again=again and every > 0)
        steps = price.steps(passes := draw.randint(200, 400))
        spent = [sum(price.spent([*steps[:-1], steps[-1] + more]).values()) for more in (0, 1)]
        assert spent[0] <= passes < spent[1]
        if price.again:
            search, second = steps
            longer = [search + every, search + every]
            assert search % every == 0 and search <= second
            assert sum(price.spent(longer).values()) > passes


@pytest.mark.filterwarnings("ignore::hyperopt_peft.errors.HypergradientWarning")
def test_a_product_of_second_derivatives_is_paid_for() -> None:
    """cg with two exact products takes four passes more an upper step than direct."""
    steps, rows = {}, Rows(data(rows=30), None, data(rows=20, seed=5))
    for name in ("direct", "cg:steps=2,tolerance=1e-12"):
        args = {"hypergradient": name, "max_steps": 4}
        task = Task({"BiDoRA": BiDoRA()}, *parts_of("classes", args), rows, 80, "loss")
        run = Run("BiDoRA", "method", 0, 6e-2, 1e-2)
        result = task.run(run, task.price(run))
        assert 74 <= result["passes"] <= 86  # one upper step has up to six
        steps[name[:2]] = result["steps"][0]
    assert steps["cg"] < 0.6 * steps["di"]


def test_a_method_without_a_second_training_spends_all_on_its_search() -> None:
    """By its own defaults."""
    rows = Rows(data(rows=30), None, data(rows=20, seed=5))
    task = Task({"BiLoRA": BiLoRA()}, *parts_of("classes"), rows, 40, "loss")
    run = Run("BiLoRA", "method", 0, 6e-2, 1e-2)
    result = task.run(run, task.price(run))
    assert len(result["steps"]) == 1 and 34 <= result["passes"] <= 41  # less than a cycle


def test_killed_twice_it_goes_on_with_the_same_lines(
    tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Store.add
    for kill in (3, 9):

        def interrupted(store: Store, result: Any, kill: int = kill) -> None:
            if len(store.results) == kill:
                raise KeyboardInterrupt
            add(store, result)

        monkeypatch.setattr(Store, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compared(folder=tmp_path, **RATES)
        with (tmp_path / "runs.jsonl").open("a") as file:
            file.write('{"unfinished": ')
    monkeypatch.setattr(Store, "add", add)
    again = compared(folder=tmp_path, **RATES)
    assert str(again).splitlines()[0] == str(whole.comparison).splitlines()[0]
    assert lines(tmp_path) == lines(whole.folder)


def test_parts_of_a_job_array_join(tmp_path: Path, whole: Whole) -> None:
    """Of the first method, whose runs do not depend on the others."""
    one = {"LoRA": METHODS["LoRA"]}
    for _ in range(2):  # the rates, and the reported runs
        for number in (1, 2):
            with suppress(ProblemError):  # the other part is not done
                compared(one, part=(number, 2), folder=tmp_path, **RATES)
    parts = compared(one, part=(1, 2), folder=tmp_path, **RATES)
    of_one = {run: x for run, x in lines(whole.folder).items() if run.startswith("['LoRA'")}
    assert lines(tmp_path) == of_one and len(of_one) == 4
    assert parts.scores("LoRA") == whole.comparison.scores("LoRA")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky", "dask"])
def test_other_processes_give_the_same_lines(tmp_path: Path, backend: str) -> None:
    compared(folder=tmp_path / "one")
    if backend == "loky":
        compared(folder=tmp_path / "two", jobs=2)
    else:
        distributed = pytest.importorskip("distributed")
        workers = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
        with (
            distributed.LocalCluster(**workers) as cluster,
            distributed.Client(cluster),
            joblib.parallel_config(backend="dask"),
        ):
            compared(folder=tmp_path / "two", jobs=2)
    one, two = (lines(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, (score, passes) in one.items():
        assert two[key] == (pytest.approx(score, abs=0.051), passes)  # a row of 20


def test_the_answer(tmp_path: Path, whole: Whole) -> None:
    comparison = whole.comparison
    table = comparison.table()
    assert [row[0] for row in table[1:]] == [
        *("LoRA", "BiDoRA", "BiDoRA, upper level frozen", "BiDoRA, one level")
    ]
    text = str(comparison)
    assert "at the edge of the rates" in text
    (parts,) = [x for x in comparison.sentences() if x.startswith("BiDoRA − LoRA is the sum")]
    gaps = [float(gap) for gap in re.findall(r"([+-][.0-9]+) ±", parts.replace("−", "-"))]
    whole = statistics.fmean(comparison.differences(("BiDoRA", "method"), ("LoRA", "method")))
    assert len(gaps) == 3 and sum(gaps) == pytest.approx(whole, abs=2e-4)
    heading, versions, begin, *_ = (latex := comparison.to_latex()).splitlines()
    assert heading == f"% {comparison.heading()}" and f"torch {version('torch')}" in versions
    assert begin.startswith(r"\begin{tabular}") and latex.count(r"\\") == 5
    assert comparison.plot(tmp_path / "c.png").axes
    comparison.to_csv(tmp_path / "c.csv")
    assert (tmp_path / "c.png").stat().st_size > 10_000
    runs = pandas.read_csv(tmp_path / "c.csv")
    assert len(runs) == len(comparison.store.results)
    assert runs["metrics.eval_accuracy"].equals(runs["score"])
    assert len(comparison.rates()) == 1 + 3 * 2
