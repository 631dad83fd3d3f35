"""`compare_methods`: equal passes, chosen rates, ablations, a store that goes on, processes."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, cycle, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState, TrainingArguments

from hyperopt_peft import ProblemError
from hyperopt_peft.comparison import Comparison
from hyperopt_peft.comparison.budget import Budget
from hyperopt_peft.comparison.store import SETTINGS, Store, read_entries
from hyperopt_peft.comparison.task import Price, Task
from tests.support.comparisons import METHODS, TITLES, compared, passes_of


def lines(folder: Path) -> dict[str, Any]:
    """The stored scores and passes by what distinguishes a run."""
    found = {}
    names = ("method", "kind", "seed", "rate", "upper_rate", "split")
    for path in folder.glob("runs*.jsonl"):
        for entry in read_entries(path):
            if SETTINGS not in entry:
                found[str([entry[name] for name in names])] = (
                    entry["metrics"]["eval_accuracy"],
                    passes_of(entry),
                )
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
        patch.setattr(Task, "check", lambda *_: Price(0))  # whose passes are of no run
        comparison = compared(folder=folder, **RATES)
    return Whole(comparison, folder, sum(counted))


def test_every_run_has_the_passes_of_the_budget(whole: Whole) -> None:
    results = whole.comparison.store.results.values()
    # All of it, to one step of the last phase, of four rows; nothing else is trained.
    assert all(11 < passes_of(result) <= 12 for result in results)
    assert whole.rows / 4 == pytest.approx(sum(passes_of(result) for result in results))


def phase(budget: Budget, counter: Any, costs: Iterator[float]) -> tuple[int, list[float]]:
    """The steps of a phase of made-up ``costs`` in passes, and what the schedule said of each."""
    args = TrainingArguments("unused", use_cpu=True, warmup_steps=0.1)
    state, control = TrainerState(), TrainerControl()
    rates = LambdaLR(SGD([torch.zeros(1)], lr=1.0), lambda _: 1.0)
    budget.on_train_begin(args, state, control, lr_scheduler=rates)
    shown = []
    while not control.should_training_stop:
        counter.passes += next(costs)
        state.global_step += 1
        shown.append(rates.lr_lambdas[0](state.global_step))
        budget.on_step_end(args, state, control)
    return state.global_step, shown


def test_no_step_more_is_within_a_budget() -> None:
    """Whatever the rows, the batch, the upper steps and the phases, and however many upper steps.

    The first phase of two ends with an upper step, and has about as many steps as the second one.
    """
    draw = random.Random(0)
    for _ in range(300):
        rows, every = draw.randint(1, 60), draw.randint(0, 5)
        batch, unit, upper = draw.randint(1, 20), draw.randint(1, 9), 3 * draw.random()
        again, copies = draw.random() < 0.5 and every > 0, draw.choice((1, 2)) if every > 1 else 1
        epoch = [min(batch, rows - k) * copies / unit for k in range(0, rows, batch)]
        budget, counter = Budget(draw.uniform(50, 400)), SimpleNamespace(passes=0.0)
        trainer: Any = SimpleNamespace(passes=counter, upper=every or None, has_second_phase=again)
        trainer.args = SimpleNamespace(
            lower_steps=every, train_batch_size=batch, gradient_accumulation_steps=1
        )
        budget.begin(trainer, unit)
        lower, step = cycle(epoch), max(batch * copies / unit, epoch[0])
        both = (next(lower) + upper * (k % every == 0) for k in count(1))
        search, rates = phase(budget, counter, both if every else lower)
        last = step + (upper if every and not again else 0)
        if again:
            a_cycle = every * step + upper
            assert search % every == 0
            room = budget.passes - counter.passes - search * step
            assert room < a_cycle + every * step + 1e-6 or search == every
            assert rates[-1] <= 1.2 * (a_cycle + every * step + 1e-6) / budget.passes
            second, rates = phase(budget, counter, cycle(epoch))
            assert second >= search or search == every
        assert budget.passes - last - 1e-6 < counter.passes
        assert counter.passes <= budget.passes + 1e-6 + (last if search <= every else 0)
        assert sum(budget.spent.values()) == pytest.approx(counter.passes)
        assert all(later <= rate for rate, later in pairwise(rates[len(rates) // 9 + 2 :]))
        assert rates[-1] <= 1.2 * (last + 1e-6) / (budget.passes - budget.start)


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
    assert lines(tmp_path) == of_one and len(of_one) == 10
    assert parts.scores()["LoRA"].equals(whole.comparison.scores()["LoRA"])


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
    scores, differences = comparison.scores(), comparison.differences()
    assert [*scores] == [*comparison.table().index] == TITLES and [*scores.index] == [0, 1]
    assert "at an end of the grid" in str(comparison)
    (effects,) = [x for x in comparison.sentences() if x.startswith("BiDoRA − LoRA is the sum")]
    gaps = [float(gap) for gap in re.findall(r"([+-][.0-9]+) ±", effects.replace("−", "-"))]
    whole = (scores["BiDoRA"] - scores["LoRA"]).mean()
    assert differences.estimate["BiDoRA", "LoRA"] == pytest.approx(whole)
    assert len(gaps) == 3 and sum(gaps) == pytest.approx(100 * whole, abs=0.2)
    assert comparison.plot(tmp_path / "c.png").axes
    assert (tmp_path / "c.png").stat().st_size > 10_000
    runs = comparison.runs()
    assert len(runs) == len(comparison.store.results)
    assert runs["metrics.eval_accuracy"].notna().all()
    assert len(comparison.rates()) == 3 * 2
