"""Losses of single examples, and the upper level of programs that weight examples."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hyperopt_peft.core.labels import ITEMS, MICRO_BATCHES, WEIGHT, require_labels, row_losses
from hyperopt_peft.core.problem import TaskLoss
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.problems.common import TaskLevel

#: Columns that weights are read by, and a Trainer's entries, which are no arguments of a model.
COLUMNS = ("index", "source", ITEMS, MICRO_BATCHES, WEIGHT)


class HeldOut(TaskLevel):
    """Upper level: min over the parameters of ``weights`` of the model's loss on held-out data.

    The examples are clean ones above `Weighted`, and those of a target task above `Mixture`.

    Args:
        model: a model whose forward returns ``.loss``; no parameter of the model moves.
        weights: the module whose parameters the level owns.
        level: as in `TaskLevel`.

    Example:
        >>> HeldOut(None, nn.Linear(1, 1)).names
        ('weight', 'bias')
    """

    def __init__(
        self, model: Any, weights: nn.Module, *, task_loss: TaskLoss | None = None, **level: Any
    ) -> None:
        task_loss = task_loss or partial(_model_loss, model)
        super().__init__(model, weights.named_parameters(), task_loss=task_loss, **level)

    def loss(self, batch: Any) -> Tensor:
        """The loss of the model."""
        require_labels(batch)
        return self.task_loss(batch)


def _model_loss(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model(**without(batch, COLUMNS)).loss
    return loss * batch[WEIGHT].to(loss.dtype) if WEIGHT in batch else loss


def example_losses(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The loss ℓ_i of each example, ``(n,)``: its sum by its count, see `row_losses`.

    An example without a label to score has ℓ_i = 0.

    Raises:
        ProblemError: see `row_losses`.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = BertForSequenceClassification(tiny)
        >>> ids = torch.ones(3, 4, dtype=torch.int64)
        >>> example_losses(model, {"input_ids": ids, "labels": torch.tensor([0, 1, 1])}).shape
        torch.Size([3])
    """
    require_labels(batch)
    sums, counts = row_losses(model, without(batch, COLUMNS))
    return sums / counts.clamp(min=1)


def column(batch: Any, name: str, count: int, what: str) -> Tensor:
    """``batch[name]``: whole numbers from 0 and below ``count``, one for each row, or label.

    Raises:
        ProblemError: there is no such column, or the column has other values or another shape.
    """
    if name not in batch:
        raise ProblemError(
            f"column {name!r}: the batch has only {sorted(batch)}; give each row of the training "
            f"set the number of its {what}, set remove_unused_columns=False in a Trainer, and use "
            "a data_collator that does not drop the column"
        )
    values = batch[name]
    if not isinstance(values, Tensor) or values.dtype != torch.int64:
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise ProblemError(f"column {name!r}: must be a whole number an example, got {kind}")
    labels = batch.get("labels")
    labels = labels if isinstance(labels, Tensor) else values
    if values.shape not in (labels.shape[:1], labels.shape):
        raise ProblemError(
            f"column {name!r}: has the shape {tuple(values.shape)}; give a number for each row or "
            f"label of the batch, whose labels have the shape {tuple(labels.shape)}"
        )
    low, high = (int(x) for x in values.aminmax())
    if low < 0 or high >= count:
        raise ProblemError(
            f"column {name!r}: {low if low < 0 else high} is no {what} of {count}; use "
            f"numbers from 0 to {count - 1}"
        )
    return values


def without(batch: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """``batch`` without the entries ``names``."""
    return {key: value for key, value in batch.items() if key not in names}
