"""The base of methods that learn gains of LoRA layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from hyperopt_peft.adapters.gains import gain_variables, gained_layers, squares
from hyperopt_peft.adapters.regularizers import regularised
from hyperopt_peft.core.problem import TaskLoss
from hyperopt_peft.trainer.method import Method


class Gained(Method):
    """A method with gains of LoRA layers above, and a penalty below while they are learned.

    Example:
        >>> from hyperopt_peft.method import add_gains
        >>> class Scales(Gained):
        ...     decay = 0.01
        ...     def prepare(self, model):
        ...         add_gains(model, lambda u: u.exp(), columns=False)
        >>> Scales().absorbed
        False
    """

    #: The name of the penalty's weight, and the penalty.
    penalty: ClassVar[tuple[str, Callable[[Any], Tensor]]] = ("decay", squares)

    @property
    def absorbed(self) -> bool:
        """True without the penalty."""
        return bool(getattr(self, self.penalty[0]) == 0)

    def upper_variables(self, model: Any) -> dict[str, Tensor]:
        """The gain's variable u of every layer."""
        return gain_variables(model)

    def lower_loss(self, model: Any, batch: Any, task_loss: TaskLoss) -> Any:
        """L and the weighted penalty, both metrics too; L alone in the second phase."""
        name, penalty = self.penalty
        weight = 0 if self.absorbed or not gained_layers(model) else getattr(self, name)
        return regularised(task_loss(batch), weight, penalty, model)
