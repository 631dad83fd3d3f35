"""The price of a training: the passes that are counted, and the number of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import grad
from transformers import Trainer

from hyperopt_peft import BilevelTrainingArguments
from hyperopt_peft.hypergradients import get_estimator
from hyperopt_peft.trainer.passes import PassCounter
from tests.support.trainers import QUIET, data, peft_model, trainer


def test_a_product_of_second_derivatives_is_two_passes(tmp_path: Path) -> None:
    """And a forward alone a third of one, without gradients nothing."""
    counter, model = PassCounter(), nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    args = BilevelTrainingArguments(str(tmp_path), per_device_train_batch_size=4, **QUIET)
    counter.on_train_begin(args, None, None, model=model)
    counts, weights = [], tuple(model.parameters())
    with torch.no_grad():
        model(torch.ones(4, 2))
    counts.append(counter.passes)
    loss = model(torch.randn(4, 2)).square().mean()
    counts.append(counter.passes)
    gradient = grad(loss, weights, create_graph=True)
    counts.append(counter.passes)
    for _ in range(2):
        products = grad(gradient, weights, [torch.ones_like(g) for g in gradient], True)
        counts.append(counter.passes)
    counter.end()
    assert any(product.any() for product in products)
    assert counts == pytest.approx([0, 1 / 3, 1, 3, 5])


class Rows(nn.Module):
    def forward(self, x: torch.Tensor, position_ids: Any = None) -> torch.Tensor:
        return x


@pytest.mark.parametrize("joined", [False, True])
def test_rows_that_are_joined_into_one_are_a_full_micro_batch(tmp_path: Path, joined: bool) -> None:
    """Without padding their positions begin again and again."""
    counter, model = PassCounter(), Rows()
    args = BilevelTrainingArguments(str(tmp_path), per_device_train_batch_size=4, **QUIET)
    counter.on_train_begin(args, None, None, model=model)
    x, places = torch.ones(1, 9, requires_grad=True), torch.tensor([[0, 1, 0, 1, 2, 0, 1, 0, 1]])
    model(x=x, position_ids=places if joined else None).sum().backward()
    counter.end()
    assert counter.passes == (1 if joined else 0.25)


@pytest.mark.parametrize(
    "estimator",
    [
        *("direct", "darts:scheme=forward", "darts", "sama", "unrolled", "neumann:terms=2"),
        *(f"minres:steps={k},tolerance=0.0,damping=30.0" for k in (1, 3)),
        "minres:steps=2,tolerance=0.0,damping=30.0,product=difference",
    ],
)
def test_an_estimator_costs_what_it_says(tmp_path: Path, estimator: str) -> None:
    """A lower and an upper step on equally many rows, by the counter."""
    size = dict(lower_steps=1, per_device_train_batch_size=4, per_device_upper_batch_size=4)
    passes = []
    for steps in (1, 2):
        made = trainer(tmp_path, hypergradient=estimator, dropout=0.0, max_steps=steps, **size)
        passes.append(made.train().metrics["passes"])
    assert passes[1] - passes[0] == pytest.approx(get_estimator(estimator).cost())


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("rows", "accumulation", "epochs"), [(10, 1, 2), (13, 2, 1), (9, 3, 1.5)])
def test_the_steps_are_those_of_the_trainer(
    tmp_path: Path, rows: int, accumulation: int, epochs: float, drop_last: bool
) -> None:
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation}
    settings |= {"num_train_epochs": epochs, "dataloader_drop_last": drop_last}
    args = BilevelTrainingArguments(str(tmp_path), **settings, **QUIET)
    made = Trainer(peft_model(dora=False), args, train_dataset=data(rows=rows))
    made.train()
    assert args.steps_of(rows) == made.state.global_step
