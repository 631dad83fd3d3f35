"""Variables that the model does not hold: the Trainer clears, saves and moves the model's alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Problem


class Follow(Problem):
    """f = ½ mean (w − u x)² + ½ (v − u)²; only w is the model's."""

    def __init__(self, model: Any, v: Any, u: Any) -> None:
        self.model, self.v, self.u = model, v, u
        super().__init__([("w", model.w), ("v", v)])

    def loss(self, batch: Any) -> Any:
        return ((self.model.w - self.u * batch["x"].double()) ** 2).mean() / 2 + (
            self.v - self.u
        ) ** 2 / 2


class Target(Problem):
    """F = ½ (w − 1)² + ½ (v − 2)²."""

    def __init__(self, model: Any, v: Any, u: Any) -> None:
        self.model, self.v = model, v
        super().__init__([("u", u)])

    def loss(self, batch: Any) -> Any:
        return ((self.model.w - 1) ** 2 + (self.v - 2) ** 2) / 2


def number(value: Any) -> Any:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("lower_steps", [1, 2])
@pytest.mark.parametrize("estimator", ["darts:scheme=forward", "darts:product=exact"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_step_is_that_of_its_own_gradients(
    tmp_path: Path, lower_steps: Any, estimator: Any, accumulation: Any
) -> None:
    model, v, u = nn.Module(), number(0.3), number(0.5)
    model.w = nn.Parameter(number(-0.4).detach())
    x = torch.tensor([1.0, 2.0, 4.0, 5.0])
    args = BilevelTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        lower_steps=lower_steps,
        hypergradient=estimator,
        optim="sgd",
        lr_scheduler_type="constant",
        learning_rate=0.1,
        upper_learning_rate=0.2,
        max_grad_norm=0.0,
        upper_max_grad_norm=0.0,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    BilevelTrainer(
        model,
        lower=Follow(model, v, u),
        upper=Target(model, v, u),
        args=args,
        train_dataset=Dataset.from_dict({"x": x.tolist()}),
        upper_dataset=Dataset.from_dict({"x": [0.0, 3.0]}),
    ).train()

    w0, v0, u0, mean = -0.4, 0.3, 0.5, float(x.mean())
    for step in range(1, 5):
        hypergradient = mean * (w0 - 1) + (v0 - 2)  # −∂²f/∂u∂w · ∂F/∂w
        w0, v0, old = w0 - 0.1 * (w0 - u0 * mean), v0 - 0.1 * (v0 - u0), u0
        u0 = old - 0.2 * hypergradient if step % lower_steps == 0 else old
    assert [float(model.w), float(v), float(u)] == pytest.approx([w0, v0, u0], abs=1e-6)
