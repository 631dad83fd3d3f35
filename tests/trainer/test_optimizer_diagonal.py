"""`sama` reads the lower optimizer's state, under the Trainer, whose optimizer it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.optim import AdamW

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Problem

X, STEPS, RATES = [1.0, 2.0, 4.0, 5.0], 5, (0.05, 0.2)
BETAS, EPS, DECAY = (0.8, 0.95), 1e-3, 0.1


def f(w: Any, u: Any, x: Any) -> Any:
    """A lower loss whose gradient and Hessian change from step to step."""
    return ((w.square() - u * x[:, None]).square()).mean() + 0.3 * w.square().sum()


def upper_f(w: Any, u: Any) -> Any:
    return (w - torch.arange(3).double()).square().sum() / 2 + u.square() / 20


class Lower(Problem):
    def __init__(self, model: Any) -> None:
        self.model = model
        super().__init__([("w", model.w)])

    def loss(self, batch: Any) -> Any:
        return f(self.model.w, self.model.u, batch["x"].double())


class Upper(Problem):
    def __init__(self, model: Any) -> None:
        self.model = model
        super().__init__([("u", model.u)])

    def loss(self, batch: Any) -> Any:
        return upper_f(self.model.w, self.model.u)


def start() -> Any:
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([0.5, -0.8, 1.2], dtype=torch.float64))
    model.u = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
    return model


def trained(
    folder: Path, method: Any, lower_steps: Any, accumulation: Any, max_grad_norm: Any
) -> Any:
    """w and u after a run; each of its steps has all of ``X``."""
    model = start()
    BilevelTrainer(
        model,
        lower=Lower(model),
        upper=Upper(model),
        args=BilevelTrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=len(X) // accumulation,
            gradient_accumulation_steps=accumulation,
            lower_steps=lower_steps,
            hypergradient=method,
            optim="adamw_torch",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=DECAY,
            upper_weight_decay=0.0,
            lr_scheduler_type="constant",
            learning_rate=RATES[0],
            upper_learning_rate=RATES[1],
            max_grad_norm=max_grad_norm,
            upper_max_grad_norm=0.0,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"x": X}),
        upper_dataset=Dataset.from_dict({"x": [0.0, 3.0]}),
    ).train()
    return model.w.detach(), model.u.detach()


class ByHand:
    """The same run in plain torch: AdamW's step on w as a differentiable function of u."""

    def __init__(self, max_grad_norm: Any) -> None:
        self.max_grad_norm = max_grad_norm
        self.m = self.v = torch.zeros(3, dtype=torch.float64)
        self.t = 0

    def step(self, w: Any, u: Any) -> Any:
        """w after a step, clipping included."""
        (g,) = torch.autograd.grad(f(w, u, torch.tensor(X).double()), w, create_graph=True)
        if self.max_grad_norm:
            g = g * (self.max_grad_norm / (g.norm() + 1e-6)).clamp(max=1.0)
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g * g
        m, v = (x / (1 - beta**self.t) for x, beta in zip((self.m, self.v), BETAS, strict=True))
        return w * (1 - RATES[0] * DECAY) - RATES[0] * m / (v.sqrt() + EPS)

    def hypergradient(self, w: Any, u: Any, after: Any) -> Any:
        """At w, where the step to ``after`` begins."""
        direct, b = torch.autograd.grad(upper_f(w, u), (u, w))
        return direct + torch.autograd.grad(after, u, b, retain_graph=True)[0]

    def run(self, lower_steps: Any) -> Any:
        model = start()
        w, u = model.w, model.u
        upper = AdamW([u], lr=RATES[1], betas=BETAS, eps=EPS, weight_decay=0.0)
        for step in range(1, STEPS + 1):
            self.m, self.v = self.m.detach(), self.v.detach()
            after = self.step(w, u)
            if step % lower_steps == 0:
                u.grad = self.hypergradient(w, u, after)
                upper.step()
            w = after.detach().requires_grad_()
        return w.detach(), u.detach()


@pytest.mark.parametrize("method", ["sama:product=exact", "sama"])
@pytest.mark.parametrize(
    ("lower_steps", "accumulation", "max_grad_norm"), [(1, 1, 0.0), (2, 2, 0.0), (2, 1, 0.5)]
)
def test_a_run_is_that_of_plain_torch(
    tmp_path: Path, method: Any, lower_steps: Any, accumulation: Any, max_grad_norm: Any
) -> None:
    """The step is the one about to be taken, from the optimizer's state before it."""
    found = trained(tmp_path, method, lower_steps, accumulation, max_grad_norm)
    expected = ByHand(max_grad_norm).run(lower_steps)
    tolerance = 1e-7 if method == "sama" else 1e-10
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert abs(found[1].item() - 0.4) > 0.1
