"""A penalty beside a loss, and a level with the loss of a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hyperopt_peft.core.problem import Problem, TaskLoss
from hyperopt_peft.core.validation import Variables
from hyperopt_peft.errors import ProblemError
from hyperopt_peft.utils.distributed import is_sharded


def require_weight(name: str, value: float) -> None:
    """Raise ProblemError unless the option ``name``, the weight of a penalty, is one."""
    if not 0 <= value < float("inf"):
        raise ProblemError(f"{name}: must be finite and not negative, got {value}")


def regularised(task: Any, weight: float, penalty: Callable[[Any], Tensor], model: Any) -> Any:
    """L + weight·penalty(model), with both terms as metrics; L alone where ``weight`` is 0."""
    if weight == 0:
        return task
    if is_sharded(*model.parameters()):
        raise ProblemError(
            "penalty: it reads parameters outside of the model's forward pass, where FSDP2 has "
            "shards only; set its weight to 0"
        )
    value = penalty(model)
    return {"loss": task + weight * value, "task_loss": task, "penalty": value}


class TaskLevel(Problem):
    """A level with the loss of a task: ``task_loss(batch)``, by default ``model(**batch).loss``.

    Further arguments are those of `Problem`.

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
