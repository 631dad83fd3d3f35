from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hyperopt_peft.method import Method, PositiveFloat, TaskLoss, WeightedRows, option


@dataclass
class Shifted(Method):
    size: PositiveFloat = option(1.0, help="of the bias at first")
    names: list[str] = option(default_factory=list, help="of the classes")

    tags = ("index",)
    defaults = {"hypergradient": "cg:steps=5", "lower_steps": 4}

    def prepare(self, model: torch.nn.Module) -> None:
        self.bias = torch.full((3,), self.size, requires_grad=True)

    def upper_variables(self, model: torch.nn.Module) -> dict[str, Tensor]:
        return {"bias": self.bias}

    def upper_loss(self, model: Any, batch: dict[str, Tensor], task_loss: TaskLoss) -> Tensor:
        return (self.logits_of(model, batch) + self.bias).square().mean()

    def lower(self, model: torch.nn.Module, task_loss: TaskLoss) -> WeightedRows:
        return WeightedRows(model, lambda batch: torch.ones_like(batch["index"]), tags=self.tags)


size: float = Shifted(size=2.0, names=["a", "b", "c"]).size
