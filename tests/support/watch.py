"""What a Trainer moved its variables by, at each step."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from hyperopt_peft import Problem
from hyperopt_peft.adapters import use_fast_dora
from hyperopt_peft.problems.bidora import Direction, Magnitude
from tests.support.trainers import peft_model, trainer

SGD = {"optim": "sgd", "max_grad_norm": 0.0, "upper_max_grad_norm": 0.0}


class Watch(TrainerCallback):
    """Keeps gradients and variables as they are just before each optimizer step."""

    def __init__(self) -> None:
        self.gradients, self.points = [], []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.points.append({n: p.detach().clone() for n, p in named})
        self.gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in named})


def watched(folder: Path, model: nn.Module, **settings: Any) -> tuple[Any, ...]:
    watch = Watch()
    run = trainer(
        folder, model=model, dropout=0.0, options={"callbacks": [watch]}, **{**SGD, **settings}
    )
    return run, watch


def replayed(watch: Watch, prior: float | None = None) -> tuple[Problem, Problem, Any]:
    """Lower and upper level over a fresh model, and what moves it to a step of ``watch``."""
    model = peft_model(dropout=0.0).double()
    use_fast_dora(model, "full")
    named = dict(model.named_parameters())

    @torch.no_grad()
    def move(step: int) -> None:
        for name, value in watch.points[step].items():
            named[name].copy_(value)

    return Direction(model), Magnitude(model, prior=prior), move


def batches_of(run: Any, steps: int) -> Any:
    """The lower batches that ``run`` will train on, in order."""
    loader = run.get_train_dataloader()
    found = []
    epoch = 0
    while len(found) < steps:
        loader.set_epoch(epoch)
        found += list(loader)
        epoch += 1
    return found[:steps]
