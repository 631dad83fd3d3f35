"""BiLoRA: the update's singular values and vectors, learnt on different data as a bilevel program.

    upper: min over Λ          L(P*, Q*, Λ; D_val)
    lower: P*, Q*(Λ) = argmin over P, Q, head   L(P, Q, Λ; D_train) + γ·R(P, Q)

where W' = W0 + s·P Λ Q with a diagonal Λ, and R = Σ over layers of ‖PᵀP − I‖² + ‖QQᵀ − I‖² keeps
P and Q near orthonormal columns and rows. D_train and D_val are parts of the training set. Qiang
et al. 2024, arXiv:2403.13037, whose Λ with real values this is.

    model = use_pseudo_svd(get_peft_model(base, LoraConfig(...)))
    lower, upper = SingularVectors(model, gamma=0.1), SingularValues(model)

`model.save_pretrained` writes a plain LoRA adapter with B = P Λ and A = Q.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hyperopt_peft.adapters.parametrizations.pseudo_svd import (
    orthogonality_penalty,
    pseudo_singular_values,
)
from hyperopt_peft.problems.common import TaskLevel, TaskLoss, trainable


class SingularVectors(TaskLevel):
    """Lower level: all P and Q, and the task head, on D_train; Λ is read and never moved.

    Args:
        model: a PeftModel after `hyperopt_peft.adapters.use_pseudo_svd`.
        gamma: γ, the weight of the penalty; 0 leaves it out.
        task_loss: L as a function of the batch, in place of the model's own.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.

    Raises:
        ProblemError: the model has no pseudo singular values; as `Problem`.
    """

    def __init__(
        self, model: Any, *, gamma: float = 0.1, task_loss: TaskLoss | None = None, **level: Any
    ) -> None:
        self.gamma = gamma
        owned = trainable(model, without=pseudo_singular_values(model))
        super().__init__(model, owned, task_loss=task_loss, **level)

    def loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """L(P, Q, Λ) + γ·R; the two are logged apart."""
        task = self.task_loss(batch)
        if self.gamma == 0:
            return task
        penalty = orthogonality_penalty(self.model)
        return {"loss": task + self.gamma * penalty, "task_loss": task, "orthogonality": penalty}


class SingularValues(TaskLevel):
    """Upper level: the diagonal of every Λ, on D_val; P, Q and head are read.

    Args:
        model: a PeftModel after `hyperopt_peft.adapters.use_pseudo_svd`.
        task_loss: L as a function of the batch, in place of the model's own.
        level: what `Problem` takes: data, optimizer, scheduler, max_grad_norm.

    Raises:
        ProblemError: the model has no pseudo singular values; as `Problem`.
    """

    def __init__(self, model: Any, *, task_loss: TaskLoss | None = None, **level: Any) -> None:
        super().__init__(model, pseudo_singular_values(model), task_loss=task_loss, **level)
