"""Small methods of several kinds, and a trainer of one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Method
from hyperopt_peft.core.labels import row_losses
from hyperopt_peft.problems import BiDoRA
from tests.support.trainers import QUIET, data, peft_model

ARGUMENTS = {
    **QUIET,
    "max_steps": 6,
    "lower_steps": 2,
    "hypergradient": "darts",
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "upper_learning_rate": 1e-1,
    "logging_steps": 3,
    "seed": 3,
}


class FullBatch(BiDoRA):
    """With all upper rows in each upper batch."""

    full_upper_batch = True


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


def method_trainer(
    folder: Path,
    callbacks: Sequence[Any] = (),
    *,
    method: Method,
    kind: Any = BilevelTrainer,
    task: str = "classes",
    options: Any = None,
    model: Any = None,
    **settings: Any,
) -> Any:
    args = BilevelTrainingArguments(str(folder), **{**ARGUMENTS, **settings})
    options = {"train_dataset": data(task), **(options or {})}
    model = model or peft_model(task, dora=False)
    return kind(model, args, method=method, callbacks=list(callbacks), **options)
