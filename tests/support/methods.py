"""Small methods of several kinds, and a trainer of one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PrinterCallback

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Method
from hyperopt_peft.adapters import lora_layers
from hyperopt_peft.core.labels import row_losses
from tests.support.trainers import data, peft_model

ARGUMENTS = {
    "max_steps": 6,
    "lower_steps": 2,
    "hypergradient": "darts",
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "upper_learning_rate": 1e-1,
    "logging_steps": 3,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
}


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return self.log_scale.exp() * weight


@dataclass
class LayerScales(Method):
    """A scale of each layer's update, folded into B."""

    limit: float | None = None

    def prepare(self, model: Any) -> None:
        self.scales = []
        for _, layer in lora_layers(model):
            self.scales.append(Scale())
            b = layer.lora_B[model.active_adapter]
            parametrize.register_parametrization(b, "weight", self.scales[-1])

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        return {n: p for n, p in model.named_parameters() if n.endswith(".log_scale")}

    def after_upper_step(self) -> None:
        for scale in self.scales if self.limit is not None else ():
            scale.log_scale.clamp_(-self.limit, self.limit)

    def finish(self, model: Any) -> Any:
        for _, layer in lora_layers(model):
            parametrize.remove_parametrizations(layer.lora_B[model.active_adapter], "weight")
        return model


@dataclass
class Ranks(LayerScales):
    """A new adapter, of rank 1 where the scale is below 1 or the searched B small."""

    def prepare(self, model: Any) -> None:
        self.fresh = deepcopy(model)
        super().prepare(model)

    def finish(self, model: Any) -> Any:
        config = deepcopy(model.peft_config[model.active_adapter])
        config.rank_pattern = {}
        for (name, layer), scale in zip(lora_layers(model), self.scales):
            size = layer.lora_B[model.active_adapter].weight.abs().mean()
            small = scale.log_scale < 0 or size < 0.05
            name = re.escape(name.removeprefix("base_model.model."))
            config.rank_pattern[f"^{name}"] = 1 if small else 3
        return get_peft_model(self.fresh.unload(), config)


@dataclass
class RowWeights(Method):
    """A weight of each row, by its number; the second phase is on rows of weight over ½."""

    tags = ("index",)

    def rows(self, train: Any, upper: Any) -> tuple[Any, Any]:
        self.logits = nn.Parameter(torch.zeros(len(train)))
        return train, upper

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        return {"logits": self.logits}

    def lower_loss(self, model: Any, batch: Any, task_loss: Any) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "index"}
        sums, counts = row_losses(model, inputs)
        return (self.logits[batch["index"]].sigmoid() * sums).sum() / counts.sum()

    def all_rows(self, train: Any, upper: Any) -> Any:
        return train.select([k for k, w in zip(train["index"], self.logits) if w >= 0])


class Plain(Method):
    """A baseline."""


def method_trainer(
    folder: Path,
    callbacks: Sequence[Any] = (),
    *,
    method: Method,
    kind: Any = BilevelTrainer,
    task: str = "classes",
    options: Any = None,
    **settings: Any,
) -> Any:
    args = BilevelTrainingArguments(str(folder), **{**ARGUMENTS, **settings})
    options = {"train_dataset": data(task), **(options or {})}
    model = peft_model(task, dora=False)
    made = kind(model, args, method=method, callbacks=list(callbacks), **options)
    made.remove_callback(PrinterCallback)
    return made
