"""A Trainer whose upper variable, a weight for each class, is no parameter of the model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hyperopt_peft import BilevelTrainer, BilevelTrainingArguments, Problem
from tests.support.trainers import QUIET


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.linear(x)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Weighted(Problem):
    """Cross-entropy with a weight for each class, which is the upper level's."""

    def __init__(self, model: nn.Module, weight: Tensor, **level: Any) -> None:
        self.model, self.weight = model, weight
        super().__init__(model.named_parameters(), **level)

    def loss(self, batch: Any) -> Any:
        logits, labels = self.model(**batch)["logits"], batch["labels"]
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        pull = sum(p.square().sum() for p in self.model.parameters())
        return (3 * self.weight.softmax(0)[labels] * each).mean() + 0.1 * pull


class Plain(Problem):
    """The model's own loss, over the class weights."""

    def __init__(self, model: nn.Module, weight: Tensor, **level: Any) -> None:
        self.model = model
        super().__init__([("weight", weight)], **level)

    def loss(self, batch: Any) -> Any:
        return self.model(**batch)["loss"]


class Penalised(Plain):
    """The model's own loss, and a term that reads the class weights."""

    def loss(self, batch: Any) -> Any:
        return super().loss(batch) + self.variables[0].square().mean()


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return [{"x": x[i], "labels": int(x[i, :3].argmax())} for i in range(count)]


def pair(
    folder: Path,
    data: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    lower: type[Problem] = Weighted,
    upper: type[Problem] = Plain,
    upper_rows: Any = None,
    evaluation: Any = None,
    **settings: Any,
) -> tuple[BilevelTrainer, Tensor]:
    """A program whose upper variable is no parameter of the model, over plain lists or ``data``."""
    torch.manual_seed(0)
    model, weight = Scaled(), torch.tensor([1.0, -1.0, 0.0], requires_grad=True)
    options = {
        **QUIET,
        "logging_steps": 500,
        "learning_rate": 0.1,
        "upper_learning_rate": 0.1,
        "per_device_train_batch_size": 8,
        "max_steps": 40,
        "lr_scheduler_type": "constant",
        "hypergradient": "cg:steps=5",
        **settings,
    }
    return BilevelTrainer(
        model,
        lower=lower(model, weight),
        upper=upper(model, weight),
        args=BilevelTrainingArguments(output_dir=str(folder), **options),
        train_dataset=rows(64, 0) if data is None else data,
        upper_dataset=rows(64, 1) if upper_rows is None else upper_rows,
        eval_dataset=evaluation,
        callbacks=list(callbacks),
    ), weight


class Stream(IterableDataset):
    """``count`` rows, or those of ``table``, that are read in order."""

    def __init__(self, count: int, table: Any = None) -> None:
        self.rows = rows(count, 0) if table is None else table

    def __iter__(self) -> Any:
        return iter(self.rows)


def streamed(
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    count: int = 20,
    data: Any = None,
    **settings: Any,
) -> BilevelTrainer:
    """A trainer over a stream, of ``count`` rows where none is given, four to a micro-batch."""
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 1,
        "lr_scheduler_type": "linear",
        "hypergradient": "darts",
        **settings,
    }
    return pair(folder, data or Stream(count), callbacks, **options)[0]
