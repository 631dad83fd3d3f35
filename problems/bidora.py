"""BiDoRA: DoRA's magnitudes and directions, learnt on different data as a bilevel program.

    upper: min over m        L(A*, B*, m; D_val)
    lower: A*, B*(m) = argmin over A, B, head   L(A, B, m; D_train) + γ·R(W0 + sBA)

where W' = m ⊙ (W0 + sBA)/‖W0 + sBA‖, one norm an output row, D_train and D_val are parts of
the training set, and R pushes the directions' columns towards orthogonality. Qin et al. 2024,
arXiv:2410.09758.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hyperopt_peft.adapters import gram_penalty, split_parameters
from hyperopt_peft.core.problem import Problem
from hyperopt_peft.errors import ProblemError

TaskLoss = Callable[[Any], Tensor]


class Direction(Problem):
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
        self.model, self.gamma = model, gamma
        self.task_loss = task_loss or own_loss(model)
        parts = split_parameters(model)
        super().__init__([*parts.directions.items(), *parts.rest.items()], **level)

    def loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """L(A, B, m) + γ·R; the two are logged apart."""
        task = self.task_loss(batch)
        if self.gamma == 0:
            return task
        penalty = gram_penalty(self.model)
        return {"loss": task + self.gamma * penalty, "task_loss": task, "gram": penalty}


class Magnitude(Problem):
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
        self.model, self.decay = model, decay
        self.task_loss = task_loss or own_loss(model)
        super().__init__(split_parameters(model).magnitudes.items(), **level)
        self.start = [m.detach().clone() for m in self.variables]

    def loss(self, batch: Any) -> Tensor:
        """L(A, B, m) + decay·½‖m − m0‖²."""
        task = self.task_loss(batch)
        if self.decay == 0:
            return task
        moved = zip(self.variables, self.start, strict=True)
        return task + self.decay / 2 * sum((m - m0.to(m)).square().sum() for m, m0 in moved)


class Adapter(Problem):
    """One level alone, all trainable parameters: LoRA, or DoRA, the controls.

    Args:
        model: a PeftModel whose forward returns ``.loss``.
        task_loss: L as a function of the batch, in place of the model's own.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.
    """

    def __init__(self, model: Any, *, task_loss: TaskLoss | None = None, **level: Any) -> None:
        self.task_loss = task_loss or own_loss(model)
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not trained:
            raise ProblemError(
                "no parameter of the model is trainable; load the adapter with "
                "PeftModel.from_pretrained(..., is_trainable=True)"
            )
        super().__init__(trained, **level)

    def loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """L of the adapter."""
        return self.task_loss(batch)


def own_loss(model: Any) -> TaskLoss:
    """The loss that ``model``'s forward returns for a batch of its arguments."""

    def loss(batch: Any) -> Tensor:
        result: Tensor = model(**batch).loss
        return result

    return loss
