"""BiLoRA: singular values of an update learned on validation data, its vectors on training data.

    upper: min over Λ          L(P*, Q*, Λ; D_val)
    lower: P*, Q*(Λ) = argmin over P, Q, head   L(P, Q, Λ; D_train) + γ·R(P, Q)

The weight of a layer is W' = W0 + s·P Λ Q with a diagonal Λ. R = Σ over layers of
‖PᵀP − I‖² + ‖QQᵀ − I‖² is 0 where P has orthonormal columns and Q orthonormal rows. D_train and
D_val are disjoint parts of the training set. Qiang et al. 2024, arXiv:2403.13037, variant with real
values in Λ.

    model = use_pseudo_svd(get_peft_model(base, LoraConfig(...)))
    lower, upper = SingularVectors(model, gamma=0.1), SingularValues(model)

`model.save_pretrained` writes a plain LoRA adapter with B = P Λ and A = Q.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hyperopt_peft.adapters.pseudo_svd import (
    orthogonality_penalty,
    pseudo_singular_values,
)
from hyperopt_peft.core.problem import TaskLoss
from hyperopt_peft.problems.common import TaskLevel
from hyperopt_peft.utils.models import trainable


class SingularVectors(TaskLevel):
    """Lower level: min over P, Q, head of L(P, Q, Λ; D_train) + γ·R(P, Q).

    Args:
        model: a PeftModel after `hyperopt_peft.adapters.use_pseudo_svd`.
        gamma: γ, the weight of the orthogonality penalty R.
        task_loss, level: as in `TaskLevel`.

    Raises:
        ProblemError: the model has no pseudo singular values; or as `Problem`.

    Example:
        >>> from hyperopt_peft.adapters import use_pseudo_svd
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = use_pseudo_svd(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config))
        >>> lower = SingularVectors(model, task_loss=lambda x: model(x).square().mean())
        >>> [tuple(variable.shape) for variable in lower.variables]  # Q, P
        [(2, 4), (3, 2)]
    """

    def __init__(
        self, model: Any, *, gamma: float = 0.1, task_loss: TaskLoss | None = None, **level: Any
    ) -> None:
        self.gamma = gamma
        owned = trainable(model, without=pseudo_singular_values(model).values())
        super().__init__(model, owned, task_loss=task_loss, **level)

    def loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """L(P, Q, Λ) + γ·R; L and R are metrics too."""
        task = self.task_loss(batch)
        if self.gamma == 0:
            return task
        penalty = orthogonality_penalty(self.model)
        return {"loss": task + self.gamma * penalty, "task_loss": task, "orthogonality": penalty}


class SingularValues(TaskLevel):
    """Upper level: min over the diagonals of Λ of L(P, Q, Λ; D_val).

    Args:
        model: a PeftModel after `hyperopt_peft.adapters.use_pseudo_svd`.
        task_loss, level: as in `TaskLevel`.

    Raises:
        ProblemError: the model has no pseudo singular values; or as `Problem`.

    Example:
        >>> from hyperopt_peft.adapters import use_pseudo_svd
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = use_pseudo_svd(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config))
        >>> upper = SingularValues(model, task_loss=lambda x: model(x).square().mean())
        >>> [tuple(variable.shape) for variable in upper.variables]
        [(2,)]
    """

    def __init__(self, model: Any, *, task_loss: TaskLoss | None = None, **level: Any) -> None:
        super().__init__(model, pseudo_singular_values(model), task_loss=task_loss, **level)
