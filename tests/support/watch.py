"""What a Trainer moved its variables by, at each step."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from tests.support.trainers import trainer

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
