"""BiDoRA: DoRA's magnitudes and directions, learnt on different data as a bilevel program.

    upper: min over m        L(A*, B*, m; D_val)
    lower: A*, B*(m) = argmin over A, B, head   L(A, B, m; D_train) + γ·R(W0 + sBA)

where W' = m ⊙ (W0 + sBA)/‖W0 + sBA‖, one norm an output row, D_train and D_val are parts of
the training set, and R pushes the directions' columns towards orthogonality. Qin et al. 2024,
arXiv:2410.09758.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hyperopt_peft.adapters import gram_penalty, split_parameters
from hyperopt_peft.problems.common import TaskLevel, TaskLoss


class Direction(TaskLevel):
    """Lower level: all A and B, and the task head, on D_train; m is read and never moved.

    Args:
        model: a PeftModel with ``use_dora=True`` whose forward returns ``.loss``.
        gamma: γ, the weight of the Gram regulariser; 0 leaves it out.
        task_loss: L as a function of the batch, in place of the model's own.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.
    """

    def __init__(
        self, model: Any, *, gamma: float = 0.0, task_loss: TaskLoss | None = None, **level: Any
    ) -> None:
        self.gamma = gamma
        parts = split_parameters(model)
        owned = [*parts.directions.items(), *parts.rest.items()]
        super().__init__(model, owned, task_loss=task_loss, **level)

    def loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """L(A, B, m) + γ·R; the two are logged apart."""
        task = self.task_loss(batch)
        if self.gamma == 0:
            return task
        penalty = gram_penalty(self.model)
        return {"loss": task + self.gamma * penalty, "task_loss": task, "gram": penalty}


class Magnitude(TaskLevel):
    """Upper level: all m, on D_val; A, B and head are read.

    Args:
        model: a PeftModel with ``use_dora=True`` whose forward returns ``.loss``.
        decay: the weight of ½‖m − m0‖², m0 being m as it is now; decay towards zero, as an
            optimizer's weight decay would have it, shrinks the pretrained weights themselves.
        task_loss: L as a function of the batch, in place of the model's own.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.
    """

    def __init__(
        self, model: Any, *, decay: float = 0.0, task_loss: TaskLoss | None = None, **level: Any
    ) -> None:
        self.decay = decay
        owned = split_parameters(model).magnitudes
        super().__init__(model, owned, task_loss=task_loss, **level)
        self.start = [m.detach().clone() for m in self.variables]

    def loss(self, batch: Any) -> Tensor:
        """L(A, B, m) + decay·½‖m − m0‖²."""
        task = self.task_loss(batch)
        if self.decay == 0:
            return task
        moved = zip(self.variables, self.start, strict=True)
        return task + self.decay / 2 * sum((m - m0.to(m)).square().sum() for m, m0 in moved)
