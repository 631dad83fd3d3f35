"""`compare_methods`: equal passes, chosen rates, ablations, a store that goes on, processes."""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.utils import parametrize

from hyperopt_peft import BiDoRA, BilevelTrainingArguments, Method, ProblemError
from hyperopt_peft.comparison import Comparison, compare_methods
from hyperopt_peft.problems import DoRA, LoRA
from tests.support.trainers import base_model, data

METHODS = {"LoRA": LoRA(), "DoRA": DoRA(), "BiDoRA": BiDoRA()}


def accuracy(outputs: Any) -> dict[str, float]:
    return {"accuracy": float((outputs.predictions.argmax(1) == outputs.label_ids).mean())}


def compared(
    methods: Any = METHODS, folder: Path | None = None, kind: str = "classes", **options: Any
) -> Comparison:
    """A comparison of few runs of 12 passes over batches of four of 30 rows."""
    common = {"report_to": "none", "use_cpu": True, "lower_steps": 2}
    args = BilevelTrainingArguments("unused", per_device_train_batch_size=4, **common)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    settings: dict[str, Any] = {
        "train_dataset": data(rows=30),
        "test_dataset": data(rows=20, seed=5),
        "passes": 12,
        "seeds": [0, 1],
        "development": [100],
        "rates": (3e-2, 6e-2),
        "upper_rates": (1e-2,),
        "metric": "accuracy",
        "compute_metrics": accuracy,
        "progress": False,
        "folder": folder,
    }
    model = functools.partial(base_model, kind)
    return compare_methods(methods, model, config, args, **{**settings, **options})


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


@dataclass
class Idle(Method):
    """Its loss has another tensor than the model's."""

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        return 0.0 * task_loss(batch)


class Left(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


@dataclass
class Parametrised(Method):
    """Leaves a parametrisation of the first A."""

    def prepare(self, model: Any) -> None:
        layer = next(m for n, m in model.named_modules() if n.endswith("lora_A.default"))
        parametrize.register_parametrization(layer, "weight", Left())


@dataclass
class Greedy(Method):
    """Sends rows through the model twice from its sixth step on."""

    steps: int = 0

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        self.steps += 1
        loss = task_loss(batch)
        return loss + task_loss(batch) if self.steps > 5 else loss


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ({"m": Idle()}, {}, "changed none of its variables"),
        ({"m": Parametrised()}, {}, "leaves a parametrisation at .*lora_A"),
        ({"m": Greedy()}, {"passes": 20}, "its 20 passes ended after"),
        (
            METHODS,
            {"test_dataset": data(rows=30)},
            "all of its rows are training rows",
        ),
        (METHODS, {"metric": "f1"}, "metric: f1 is none of .*accuracy"),
        (METHODS, {"seeds": [0]}, "one seed has no interval"),
        (METHODS, {"passes": 2}, "passes: 2"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_one_line(methods: Any, options: Any, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        compared(methods, **{"rates": (6e-2,), **options})


@dataclass
class Shifting(Method):
    """Changes the logits at the end."""

    def finish(self, model: Any) -> Any:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("classifier.bias") or ("classifier" in name and "bias" in name):
                    parameter.add_(torch.arange(len(parameter)).to(parameter))
        return model


def test_a_finish_that_changes_the_logits_is_said() -> None:
    text = str(compared({"LoRA": LoRA(), "mine": Shifting()}, rates=(6e-2,)))
    assert "mine: finish changes the logits" in text and "LoRA: finish" not in text


def finite(values: Iterable[float]) -> bool:
    return all(math.isfinite(value) for value in values)


def test_a_regression_is_scored_by_its_loss() -> None:
    comparison = compared(
        {"LoRA": LoRA(), "BiDoRA": BiDoRA()},
        kind="regression",
        metric="loss",
        compute_metrics=None,
        train_dataset=data("regression", 30),
        test_dataset=data("regression", 20, seed=5),
    )
    assert comparison.plan.lower_is_better and finite(comparison.scores("BiDoRA"))
