"""`sama` reads the lower optimizer's state, under the Trainer, whose optimizer it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import AdamW

from hyperopt_peft import BilevelTrainer
from tests.support.by_hand import BATCHES, ByHand, f, start, upper_f
from tests.support.quadratic import FunctionLevel
from tests.support.trainers import arguments

STEPS, RATES = 5, (0.05, 0.2)
BELOW = {"lr": RATES[0], "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
ABOVE = {**BELOW, "lr": RATES[1], "weight_decay": 0.0}


def trained(
    folder: Path, method: str, lower_steps: int, accumulation: int, max_grad_norm: float
) -> list[Tensor]:
    """w and u after a run, each of whose micro-batches is the same."""
    w, u = start()
    model = nn.Module()
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "lower_steps": lower_steps,
        "hypergradient": method,
        "optim": "adamw_torch",
        "adam_beta1": BELOW["betas"][0],
        "adam_beta2": BELOW["betas"][1],
        "adam_epsilon": BELOW["eps"],
        "weight_decay": BELOW["weight_decay"],
        "upper_weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "learning_rate": RATES[0],
        "upper_learning_rate": RATES[1],
        "max_grad_norm": max_grad_norm,
        "upper_max_grad_norm": 0.0,
        "remove_unused_columns": False,
    }
    BilevelTrainer(
        model,
        lower=FunctionLevel(lambda _: f(w, u, BATCHES[0]), w, name="lower"),
        upper=FunctionLevel(lambda _: upper_f(w, u), u, name="upper"),
        args=arguments(folder, **settings),
        train_dataset=Dataset.from_dict({"x": [1.0, 2.0, 3.0, 4.0]}),
        upper_dataset=Dataset.from_dict({"x": [5.0, 6.0]}),
    ).train()
    return [x.detach() for x in (*w, *u)]


def by_hand(lower_steps: int, max_grad_norm: float) -> list[Tensor]:
    """The same run in plain torch: AdamW's step on w as a differentiable function of u."""
    w, u = start()
    hand = ByHand(AdamW, [BELOW] * len(w))
    hand.max_norm = max_grad_norm or None
    upper = AdamW(u, **ABOVE)
    for step in range(1, STEPS + 1):
        hand.forget_the_graph()
        after = hand.step(w, u, BATCHES[0])
        if step % lower_steps == 0:  # at w, where the step begins
            b = torch.autograd.grad(upper_f(w, u), w)
            implicit = torch.autograd.grad(after, u, b, retain_graph=True)
            direct = torch.autograd.grad(upper_f(w, u), u, materialize_grads=True)
            for x, *parts in zip(u, implicit, direct, strict=True):
                x.grad = sum(parts)
            upper.step()
        w = [x.detach().requires_grad_() for x in after]
    return [x.detach() for x in (*w, *u)]


@pytest.mark.parametrize(
    ("method", "lower_steps", "accumulation", "max_grad_norm"),
    [("sama:product=exact", 1, 1, 0.0), ("sama:product=exact", 2, 1, 0.5), ("sama", 2, 2, 0.0)],
)
def test_a_run_is_that_of_plain_torch(
    tmp_path: Path, method: str, lower_steps: int, accumulation: int, max_grad_norm: float
) -> None:
    """The step is the one about to be taken, from the optimizer's state before it."""
    found: Any = trained(tmp_path, method, lower_steps, accumulation, max_grad_norm)
    tolerance = 1e-7 if method == "sama" else 1e-10
    for a, b in zip(found, by_hand(lower_steps, max_grad_norm), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert (found[-2] - start()[1][0]).abs().max() > 0.1
