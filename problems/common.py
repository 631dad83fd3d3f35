"""What programs over a model with an adapter share: the task's loss, and levels that have it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from hyperopt_peft.core.problem import Problem
from hyperopt_peft.core.validation import Variables
from hyperopt_peft.errors import ProblemError

#: The loss of a batch.
TaskLoss = Callable[[Any], Tensor]


def own_loss(model: Any) -> TaskLoss:
    """The loss that ``model``'s forward returns for a batch of its arguments."""

    def loss(batch: Any) -> Tensor:
        result: Tensor = model(**batch).loss
        return result

    return loss


def trainable(model: Any, *, without: Collection[str] = ()) -> list[tuple[str, Tensor]]:
    """The parameters of ``model`` that require a gradient, by name, but those ``without``.

    Example:
        >>> from torch import nn
        >>> [name for name, _ in trainable(nn.Linear(2, 1), without=["bias"])]
        ['weight']
    """
    named = model.named_parameters()
    return [(n, p) for n, p in named if p.requires_grad and n not in without]


class TaskLevel(Problem):
    """A level with the loss of a task: what its subclasses own, and which terms they add, differs.

    Args:
        model: a model whose forward returns ``.loss``.
        variables: what the level owns.
        task_loss: the loss as a function of the batch, in place of the model's own.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.
    """

    def __init__(
        self, model: Any, variables: Variables, *, task_loss: TaskLoss | None = None, **level: Any
    ) -> None:
        self.model = model
        self.task_loss = task_loss or own_loss(model)
        super().__init__(variables, **level)

    def loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """The task's loss."""
        return self.task_loss(batch)


class Adapter(TaskLevel):
    """One level alone, all trainable parameters: LoRA, or DoRA, the controls.

    Args:
        model: a PeftModel whose forward returns ``.loss``.
        task_loss: L as a function of the batch, in place of the model's own.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.

    Raises:
        ProblemError: no parameter of the model is trainable.
    """

    def __init__(self, model: Any, *, task_loss: TaskLoss | None = None, **level: Any) -> None:
        trained = trainable(model)
        if not trained:
            raise ProblemError(
                "model: no parameter is trainable; load the adapter with "
                "PeftModel.from_pretrained(..., is_trainable=True)"
            )
        super().__init__(model, trained, task_loss=task_loss, **level)
