"""A level whose loss is the loss of a task."""

from __future__ import annotations

from typing import Any

from hyperopt_peft.core.problem import Problem, TaskLoss
from hyperopt_peft.core.validation import Variables


class TaskLevel(Problem):
    """A level with the loss ``task_loss(batch)``, by default ``model(**batch).loss``.

    For the other arguments see `Problem`.

    Example:
        >>> from torch import nn, ones
        >>> model = nn.Linear(2, 1)
        >>> level = TaskLevel(model, [model.bias], task_loss=lambda x: model(x).square().mean())
        >>> level.loss(ones(3, 2)).shape
        torch.Size([])
    """

    def __init__(
        self, model: Any, variables: Variables, *, task_loss: TaskLoss | None = None, **level: Any
    ) -> None:
        self.model = model
        self.task_loss = task_loss or (lambda batch: model(**batch).loss)
        super().__init__(variables, **level)

    def loss(self, batch: Any) -> Any:
        """The task's loss."""
        return self.task_loss(batch)
