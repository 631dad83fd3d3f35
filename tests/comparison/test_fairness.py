"""Whatever a method, a metric or a user's model does, methods are compared alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from transformers import get_scheduler

from hyperopt_peft import Method
from hyperopt_peft.comparison.budget import Budget
from hyperopt_peft.comparison.rows import Rows
from hyperopt_peft.comparison.task import Run, Task
from hyperopt_peft.problems import LayerScales, LoRA
from tests.support.comparisons import compared, parts_of, passes_of
from tests.support.trainers import data


def task(methods: Any, arguments: Any = None) -> Task:
    """What runs of ``methods`` share."""
    rows = Rows(data(rows=30), None, data(rows=20, seed=5))
    return Task(methods, *parts_of("classes", arguments), rows, "loss")


@pytest.mark.parametrize(("name", "lower"), [("mse", True), ("score", False)])
def test_the_direction_of_a_score_is_that_of_its_name(name: str, lower: bool) -> None:
    """In which `Plan` chooses rates; see test_bad_input.py."""
    comparison = compared({"LoRA": LoRA()}, metric=name, compute_metrics=lambda _: {name: 0.5})
    assert comparison.plan.lower_is_better == lower == ("lower is better" in str(comparison))


@dataclass
class Bounded(Method):
    """A factor u ≥ 0 of the loss, which descent would take below; with rates of its own."""

    defaults = MappingProxyType(
        {"learning_rate": 1e-3, "upper_learning_rate": 0.5, "hypergradient": "darts"}
    )

    def prepare(self, model: Any) -> None:
        self.factor = torch.ones((), requires_grad=True)

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        return {"factor": self.factor}

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        return self.factor * task_loss(batch)

    def after_upper_step(self) -> None:
        self.factor.clamp_(min=0.9)


def test_a_rate_of_the_grid_is_not_that_of_the_method(tmp_path: Path) -> None:
    run = Run("m", "method", 0, 5e-5, 1e-3, 40)
    whole = task({"m": Bounded()})
    args = whole.make(run, whole.data.of(0), str(tmp_path)).args
    assert (args.learning_rate, args.upper_learning_rate) == (5e-5, 1e-3)


def test_one_level_keeps_the_bounds_of_a_method(tmp_path: Path) -> None:
    whole = task({"m": Bounded()})
    run = Run("m", "one level", 0, 0.5, passes=40)
    trainer = whole.make(run, whole.data.of(0), str(tmp_path), budget := Budget(4.0))
    budget.begin(trainer, 4)
    trainer.train()
    assert float(trainer.method.method.factor.detach()) == pytest.approx(0.9)


def test_seeds_are_other_starts_of_a_model_that_seeds_itself(tmp_path: Path) -> None:
    whole = task({"m": LoRA()})
    starts = []
    for seed in (0, 1):
        run = Run("m", "method", seed, 1e-3, passes=40)
        model = whole.make(run, whole.data.of(seed), str(tmp_path)).model
        starts.append(next(p for n, p in model.named_parameters() if "lora_A" in n).detach())
    assert not torch.equal(*starts)


class Dearer(Method):
    """Its upper loss takes ever more passes, as a solver with a tolerance may."""

    defaults = MappingProxyType({"hypergradient": "direct", "lower_steps": 2})
    calls = 0

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        return {n: x for n, x in model.named_parameters() if n.endswith("lora_A.default.weight")}

    def upper_loss(self, model: Any, batch: Any, task_loss: Any) -> Any:
        self.calls += 1
        return torch.stack([task_loss(batch) for _ in range(min(12, self.calls))]).mean()


class AtItsRate(LayerScales):
    """Its estimator has two passes less at a rate of 0."""

    defaults = MappingProxyType({"hypergradient": "darts:xi=lr", "retrain": "scratch"})


@pytest.mark.parametrize(
    ("method", "arguments", "passes"),
    [(Dearer(), {}, 60), (AtItsRate(), {"warmup_steps": 0.5}, 50)],
    ids=["dearer steps", "an estimator that does nothing at a rate of 0, as in a warm-up"],
)
def test_a_method_whose_steps_grow_dearer_has_fewer_of_them(
    method: Any, arguments: Any, passes: int
) -> None:
    """Its two phases are done, within the budget to one step."""
    methods = {"LoRA": LoRA(), "m": method}
    found = compared(methods, arguments=arguments, passes=passes, ablations={})
    for result in found.store.results.values():
        assert passes - 1 < passes_of(result) <= passes and all(result["steps"])


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("schedule", ["linear", "constant_with_warmup", "cosine"])
def test_rates_follow_the_passes(tmp_path: Path, schedule: str, pieces: int) -> None:
    """A warm-up of 5 steps lasts 5 of the 40 passes, of a plain method and of a search alike."""
    settings = {"per_device_train_batch_size": 4 // pieces, "gradient_accumulation_steps": pieces}
    settings |= {"warmup_steps": 5, "lr_scheduler_type": schedule, "retrain": "none"}
    rule = get_scheduler(schedule, SGD([torch.zeros(1)]), 5, 40).lr_lambdas[0]
    whole = task({"p": LoRA(), "m": Bounded()}, settings)
    for name in whole.methods:
        rates, run = Rates(), Run(name, "method", 0, 0.01, 0.01, 40)
        trainer = whole.make(run, whole.data.of(0), str(tmp_path), rates)
        rates.begin(trainer, 4)
        trainer.train()
        assert all(rate == pytest.approx(0.01 * rule(passes)) for passes, rate in rates.seen)


class Rates(Budget):
    """Notes the rate after each step, beside the passes."""

    def __init__(self) -> None:
        super().__init__(40)
        self.seen: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        super().on_step_end(args, state, control, **more)
        rate = more["optimizer"].param_groups[0]["lr"]
        self.seen.append((self.counter.passes, rate))
