"""Variables that the model does not hold: the Trainer clears, saves and moves the model's alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn

from hyperopt_peft import BilevelTrainer
from tests.support.quadratic import FunctionLevel
from tests.support.trainers import arguments


@pytest.mark.parametrize(("lower_steps", "accumulation"), [(1, 1), (2, 2)])
def test_every_step_is_that_of_its_own_gradients(
    tmp_path: Path, lower_steps: int, accumulation: int
) -> None:
    """f = ½ mean (w − u x)² + ½ (v − u)², F = ½ (w − 1)² + ½ (v − 2)²; only w is the model's."""
    model = nn.Module()
    w = model.w = nn.Parameter(torch.tensor(-0.4, dtype=torch.float64))
    v, u = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 0.5))
    x = torch.tensor([1.0, 2.0, 4.0, 5.0])
    lower = FunctionLevel(
        lambda batch: ((w - u * batch["x"].double()) ** 2).mean() / 2 + (v - u) ** 2 / 2,
        {"w": w, "v": v},
        name="lower",
    )
    upper = FunctionLevel(lambda _: ((w - 1) ** 2 + (v - 2) ** 2) / 2, {"u": u}, name="upper")
    args = arguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        lower_steps=lower_steps,
        optim="sgd",
        lr_scheduler_type="constant",
        learning_rate=0.1,
        upper_learning_rate=0.2,
        max_grad_norm=0.0,
        upper_max_grad_norm=0.0,
        remove_unused_columns=False,
    )
    BilevelTrainer(
        model,
        lower=lower,
        upper=upper,
        args=args,
        train_dataset=Dataset.from_dict({"x": x.tolist()}),
        upper_dataset=Dataset.from_dict({"x": [0.0, 3.0]}),
    ).train()

    w0, v0, u0, mean = -0.4, 0.3, 0.5, float(x.mean())
    for step in range(1, 5):
        hypergradient = mean * (w0 - 1) + (v0 - 2)  # −∂²f/∂u∂w · ∂F/∂w
        w0, v0, old = w0 - 0.1 * (w0 - u0 * mean), v0 - 0.1 * (v0 - u0), u0
        u0 = old - 0.2 * hypergradient if step % lower_steps == 0 else old
    assert [float(w), float(v), float(u)] == pytest.approx([w0, v0, u0], abs=1e-6)
