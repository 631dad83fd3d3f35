"""BiDoRA: the magnitudes of DoRA learned on validation data, the directions on training data.

    upper: min over m        L(A*, B*, m; D_val)
    lower: A*, B*(m) = argmin over A, B, head   L(A, B, m; D_train) + γ·R(W0 + sBA)

The weight of a layer is W' = m ⊙ (W0 + sBA)/‖W0 + sBA‖, with one norm for each output row. D_train
and D_val are disjoint parts of the training set. R is small where the columns of the directions
are orthogonal. Qin et al. 2024, arXiv:2410.09758.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hyperopt_peft.adapters import gram_penalty, split_parameters
from hyperopt_peft.problems.common import TaskLevel, TaskLoss


class Direction(TaskLevel):
    """Lower level: min over A, B, head of L(A, B, m; D_train) + γ·R.

    Args:
        model: a PeftModel with ``use_dora=True`` whose forward returns ``.loss``.
        gamma: γ, the weight of the Gram regulariser R.
        task_loss, level: as in `TaskLevel`.

    Raises:
        ProblemError: the model has no DoRA layer; or as `Problem`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, target_modules=["0"], use_dora=True)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> lower = Direction(model, task_loss=lambda x: model(x).square().mean())
        >>> [tuple(variable.shape) for variable in lower.variables]  # A, B
        [(2, 4), (3, 2)]
    """

    def __init__(
        self, model: Any, *, gamma: float = 0.0, task_loss: TaskLoss | None = None, **level: Any
    ) -> None:
        self.gamma = gamma
        parts = split_parameters(model)
        owned = [*parts.directions.items(), *parts.rest.items()]
        super().__init__(model, owned, task_loss=task_loss, **level)

    def loss(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """L(A, B, m) + γ·R; L and R are metrics too."""
        task = self.task_loss(batch)
        if self.gamma == 0:
            return task
        penalty = gram_penalty(self.model)
        return {"loss": task + self.gamma * penalty, "task_loss": task, "gram": penalty}


class Magnitude(TaskLevel):
    """Upper level: min over m of L(A, B, m; D_val).

    The weight decay of an optimizer would shrink m towards 0, and with m the pretrained weights; a
    ``prior`` pulls m to its initial value.

    Args:
        model: a PeftModel with ``use_dora=True`` whose forward returns ``.loss``.
        task_loss, level: as in `TaskLevel`.

    Raises:
        ProblemError: the model has no DoRA layer; or as `Problem`.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> config = LoraConfig(r=2, target_modules=["0"], use_dora=True)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
        >>> upper = Magnitude(model, task_loss=lambda x: model(x).square().mean())
        >>> [tuple(variable.shape) for variable in upper.variables]
        [(3,)]
    """

    def __init__(self, model: Any, *, task_loss: TaskLoss | None = None, **level: Any) -> None:
        owned = split_parameters(model).magnitudes
        super().__init__(model, owned, task_loss=task_loss, **level)
